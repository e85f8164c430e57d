"""Grouped products on a GPU: a program for each tile of the rows of one expert and of their features.

M sorted rows, R rows of a tile, D features, F features of the result, E experts, C tiles.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import gpu_call
from pallas_kernels.gpu_call import dot
from pallas_kernels.grouped_matmul import routed
from pallas_kernels.grouped_matmul.parts import Kernels

ROWS, FEATURES = 128, 128          # of a tile
STEP = {2: 64, 4: 32}              # features, or for gradients rows, of a step, by bytes of a number
WARPS = 8
STAGES = {2: 4, 4: 2}


def rows(M: int, E: int) -> int:
  return ROWS


def tiles_of(M: int, sizes_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(expert, first row, number of rows) of tiles that cover the rows of every expert; those too many have no rows."""
  end_E, number_E = jnp.cumsum(sizes_E), (sizes_E + ROWS - 1) // ROWS
  last_E, tile_C = jnp.cumsum(number_E), jnp.arange(M // ROWS + len(sizes_E))
  expert_C = jnp.minimum((tile_C[:, None] >= last_E).sum(1), len(sizes_E) - 1).astype(jnp.int32)
  first_C = (end_E - sizes_E)[expert_C] + (tile_C - (last_E - number_E)[expert_C]) * ROWS
  return expert_C, first_C, jnp.clip(end_E[expert_C] - first_C, 0, ROWS)


def feature_tile(n: int) -> int:
  return min(max(gpu_call.ceil_pow2(n), gpu_call.SMALLEST), FEATURES)


def load(ref, place: tuple, mask: jax.Array) -> jax.Array:
  """ref[place] where mask is True, else 0; elsewhere a place need not exist."""
  return triton.load(ref.at[*place], mask=mask, other=0)


def below(place: jax.Array, limit: int, step: int) -> jax.Array:
  """place < limit, for places that come in whole steps: known where these fill the limit. What Triton does not see to
  be true of 8 neighbours together it loads one by one."""
  return place < limit if limit % step else jnp.full(place.shape, True)


def call(kernel, grid, arrays, out: jax.ShapeDtypeStruct, width: int) -> jax.Array:
  return gpu_call.call(functools.partial(kernel, step=STEP[width]), grid, arrays, [out], warps=WARPS,
                       stages=STAGES[width])[0]


def times(x_MD, w_EDF, sizes_E, transposed: bool = False) -> jax.Array:
  M, F = len(x_MD), w_EDF.shape[1 if transposed else 2]
  tile, places = feature_tile(F), tiles_of(M, sizes_E)
  return call(functools.partial(_times, tile=tile, transposed=transposed), (pl.cdiv(F, tile), len(places[0])),
              [*places, x_MD, w_EDF], jax.ShapeDtypeStruct((M, F), x_MD.dtype), x_MD.dtype.itemsize)


def _times(expert_ref, first_ref, count_ref, x_ref, w_ref, y_out, *, tile, transposed, step):
  n, c = pl.program_id(0), pl.program_id(1)
  expert, count, D = expert_ref[c], count_ref[c], x_ref.shape[1]
  row_R1 = jnp.arange(ROWS, dtype=jnp.int32)[:, None]
  column_1F = n * tile + jnp.arange(tile, dtype=jnp.int32)[None]
  place_R1, mine_R1, real_1F = first_ref[c] + row_R1, row_R1 < count, below(column_1F, y_out.shape[1], tile)

  @pl.when(count > 0)
  def _():
    def one(i, y_RF):
      d_S = i * step + jnp.arange(step, dtype=jnp.int32)
      real_S = below(d_S, D, step)
      x_RS = load(x_ref, (place_R1, d_S[None]), mine_R1 & real_S[None])
      if transposed:
        w_SF = load(w_ref, (expert, column_1F.T, d_S[None]), real_1F.T & real_S[None]).T
      else:
        w_SF = load(w_ref, (expert, d_S[:, None], column_1F), real_S[:, None] & real_1F)
      return y_RF + dot(x_RS, w_SF.astype(x_RS.dtype))

    y_RF = jax.lax.fori_loop(0, pl.cdiv(D, step), one, jnp.zeros((ROWS, tile), jnp.float32))
    gpu_call.store(y_out, (place_R1, column_1F), y_RF.astype(y_out.dtype), mine_R1 & real_1F)


def gradient(x_MD, dy_MF, sizes_E, dtype) -> jax.Array:
  (D, F), E, start_E = (x_MD.shape[1], dy_MF.shape[1]), len(sizes_E), jnp.cumsum(sizes_E) - sizes_E
  sizes = feature_tile(D), feature_tile(F)
  return call(functools.partial(_gradient, sizes=sizes), (pl.cdiv(F, sizes[1]), pl.cdiv(D, sizes[0]), E),
              [start_E, sizes_E, x_MD, dy_MF], jax.ShapeDtypeStruct((E, D, F), dtype), x_MD.dtype.itemsize)


def _gradient(start_ref, size_ref, x_ref, dy_ref, dw_out, *, sizes, step):
  n, m, e = (pl.program_id(i) for i in range(3))
  d_D1 = m * sizes[0] + jnp.arange(sizes[0], dtype=jnp.int32)[:, None]
  f_1F = n * sizes[1] + jnp.arange(sizes[1], dtype=jnp.int32)[None]
  real_D1, real_1F = below(d_D1, x_ref.shape[1], sizes[0]), below(f_1F, dy_ref.shape[1], sizes[1])
  size = size_ref[e]

  def one(i, dw_DF):
    row_S = i * step + jnp.arange(step, dtype=jnp.int32)
    place_S1, mine_S1 = start_ref[e] + row_S[:, None], (row_S < size)[:, None]
    x_SD = load(x_ref, (place_S1, d_D1.T), mine_S1 & real_D1.T)
    dy_SF = load(dy_ref, (place_S1, f_1F), mine_S1 & real_1F)
    return dw_DF + dot(x_SD.T, dy_SF)

  dw_DF = jax.lax.fori_loop(0, pl.cdiv(size, step), one, jnp.zeros(sizes, jnp.float32))
  gpu_call.store(dw_out, (e, d_D1, f_1F), dw_DF.astype(dw_out.dtype), real_D1 & real_1F)


KERNELS = Kernels(routed.sort, rows, times, gradient)
