"""Grouped products as loops over tiles of rows of one expert; runs everywhere, made for CPUs.

An expert's rows lie together, so a tile is a plain slice of x and of y: nothing is gathered into padded blocks. A tile
is as long as the bucket that holds its expert's rows; there are few buckets, each one loop, and the rows that a tile
covers beyond its own expert are masked. XLA runs a loop's products on all cores; inside `lax.switch` it would not, and
it would copy the results once a branch.

2 cores, float32, 8192 rows, 32 experts, 512 -> 2 x 256 -> 512, against 182 GFLOP/s of one large product: forward 127
(skewed) to 138 (even), backward 128; one einsum over experts padded to the largest 47 to 88; `jax.lax.ragged_dot` 6.

N rows, D input features, F output or hidden features, E experts, R rows of a tile, C tiles.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_TILE = 512
FEW_ROWS = 8          # up to here each row reads its own weights, as decoding does


class Tile(NamedTuple):
  """Rows at .. at + R of the arrays, of which keep_R1 belong to this tile."""
  expert: jax.Array
  at: jax.Array
  rows: int
  keep_R1: jax.Array


def buckets(N: int, E: int) -> tuple[int, ...]:
  """Tile lengths for N rows over E experts: steps of about a quarter of an expert's mean share."""
  step = 16
  while step < 128 and step * 4 < N / E:
    step *= 2
  sizes = [step * n for n in (1, 2, 3, 4, 6, 8) if step * n <= MAX_TILE]
  fits = [b for b in sizes if b < N]
  return tuple(fits) + ((min(N, sizes[-1]),) if len(fits) < len(sizes) else ())


def for_tiles(N: int, sizes_E: jax.Array, body: Callable, carry):
  """carry = body(carry, tile) over tiles that together cover the rows of every expert once."""
  E, lengths = sizes_E.shape[0], buckets(N, sizes_E.shape[0])
  largest = lengths[-1]
  start_E = jnp.cumsum(sizes_E) - sizes_E
  tiles_E = (sizes_E + largest - 1) // largest
  end_E = jnp.cumsum(tiles_E)
  tile_C = jnp.arange(N // largest + E)                       # an upper bound; the rest stays unvisited
  expert_C = jnp.minimum(jnp.searchsorted(end_E, tile_C, side='right'), E - 1)
  offset_C = (tile_C - (end_E - tiles_E)[expert_C]) * largest
  first_C = start_E[expert_C] + offset_C
  count_C = jnp.clip(sizes_E[expert_C] - offset_C, 0, largest)
  bucket_C = jnp.where(tile_C < end_E[-1], jnp.searchsorted(jnp.asarray(lengths), count_C), len(lengths))
  order_C = jnp.argsort(bucket_C)
  expert_C, first_C, count_C = expert_C[order_C], first_C[order_C], count_C[order_C]
  edges = jnp.searchsorted(bucket_C[order_C], jnp.arange(len(lengths) + 1))
  for b, rows in enumerate(lengths):
    def step(i, carry, rows=rows):
      at = jnp.minimum(first_C[i], N - rows)
      n_R1 = at + jnp.arange(rows)[:, None]
      return body(carry, Tile(expert_C[i], at, rows, (n_R1 >= first_C[i]) & (n_R1 < first_C[i] + count_C[i])))
    carry = jax.lax.fori_loop(edges[b], edges[b + 1], step, carry)
  return carry


def read(x_ND, tile: Tile):
  return jax.lax.dynamic_slice_in_dim(x_ND, tile.at, tile.rows)


def write(y_ND, y_RD, tile: Tile):
  y_RD = jnp.where(tile.keep_R1, y_RD.astype(y_ND.dtype), read(y_ND, tile))
  return jax.lax.dynamic_update_slice_in_dim(y_ND, y_RD, tile.at, 0)


def dot(equation: str, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def owners(N: int, sizes_E):
  """(expert_N, mine_N1): which expert each row belongs to, and whether it belongs to one."""
  expert_N = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(N), side='right')
  return expert_N, (expert_N < sizes_E.shape[0])[:, None]


def row_times(x_D, w_EDF, expert):
  """x_D @ w_EDF[expert], written so that XLA reads the weights in place: a dot would first copy them."""
  return (x_D.astype(jnp.float32)[:, None] * w_EDF[expert].astype(jnp.float32)).sum(0)


def matmul(x_ND, w_EDF, sizes_E):
  N, F = x_ND.shape[0], w_EDF.shape[2]
  if N <= FEW_ROWS:
    expert_N, mine_N1 = owners(N, sizes_E)
    y_NF = jnp.stack([row_times(x_ND[n], w_EDF, expert_N[n]) for n in range(N)])
    return jnp.where(mine_N1, y_NF, 0).astype(x_ND.dtype)

  def body(y_NF, tile):
    return write(y_NF, dot('RD,DF->RF', read(x_ND, tile), w_EDF[tile.expert]), tile)

  return for_tiles(N, sizes_E, body, jnp.zeros((N, F), x_ND.dtype))


def matmul_bwd(x_ND, w_EDF, sizes_E, dy_NF):
  def body(carry, tile):
    dx_ND, dw_EDF = carry
    dy_RF = jnp.where(tile.keep_R1, read(dy_NF, tile), 0)
    dx_ND = write(dx_ND, dot('RF,DF->RD', dy_RF, w_EDF[tile.expert]), tile)
    return dx_ND, dw_EDF.at[tile.expert].add(dot('RD,RF->DF', read(x_ND, tile), dy_RF))

  dx_ND, dw_EDF = for_tiles(len(x_ND), sizes_E, body, (jnp.zeros_like(x_ND), jnp.zeros(w_EDF.shape, jnp.float32)))
  return dx_ND, dw_EDF.astype(w_EDF.dtype)


def activate(h_RF2):
  gate_RF, up_RF = jnp.split(h_RF2, 2, -1)
  return jax.nn.silu(gate_RF) * up_RF


def swiglu(x_ND, gate_up_EDF2, down_EFD, sizes_E):
  N = len(x_ND)
  if N <= FEW_ROWS:
    expert_N, mine_N1 = owners(N, sizes_E)
    y_ND = jnp.stack([row_times(activate(row_times(x_ND[n], gate_up_EDF2, expert_N[n])), down_EFD, expert_N[n])
                      for n in range(N)])
    return jnp.where(mine_N1, y_ND, 0).astype(x_ND.dtype)

  def body(y_ND, tile):
    act_RF = activate(dot('RD,DF->RF', read(x_ND, tile), gate_up_EDF2[tile.expert])).astype(x_ND.dtype)
    return write(y_ND, dot('RF,FD->RD', act_RF, down_EFD[tile.expert]), tile)

  return for_tiles(N, sizes_E, body, jnp.zeros_like(x_ND))


def swiglu_fwd(x_ND, gate_up_EDF2, down_EFD, sizes_E):
  """(y_ND, h_NF2): also the pre-activations, which the backward pass reads."""
  def body(carry, tile):
    y_ND, h_NF2 = carry
    h_RF2 = dot('RD,DF->RF', read(x_ND, tile), gate_up_EDF2[tile.expert])
    y_RD = dot('RF,FD->RD', activate(h_RF2).astype(x_ND.dtype), down_EFD[tile.expert])
    return write(y_ND, y_RD, tile), write(h_NF2, h_RF2, tile)

  h_NF2 = jnp.zeros((len(x_ND), gate_up_EDF2.shape[2]), x_ND.dtype)
  return for_tiles(len(x_ND), sizes_E, body, (jnp.zeros_like(x_ND), h_NF2))


def swiglu_bwd(x_ND, gate_up_EDF2, down_EFD, sizes_E, h_NF2, dy_ND):
  """Gradients of x, gate_up and down; those of the weights are added up in float32."""
  dtype = x_ND.dtype

  def body(carry, tile):
    dx_ND, dgate_up_EDF2, ddown_EFD = carry
    e = tile.expert
    dy_RD = jnp.where(tile.keep_R1, read(dy_ND, tile), 0)
    gate_RF, up_RF = jnp.split(read(h_NF2, tile).astype(jnp.float32), 2, -1)
    sigmoid_RF = jax.nn.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    dact_RF = dot('RD,FD->RF', dy_RD, down_EFD[e])
    dsilu_RF = sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    dh_RF2 = jnp.concatenate([dact_RF * up_RF * dsilu_RF, dact_RF * silu_RF], -1).astype(dtype)
    ddown_FD = dot('RF,RD->FD', (silu_RF * up_RF).astype(dtype), dy_RD)
    dgate_up_DF2 = dot('RD,RF->DF', read(x_ND, tile), dh_RF2)
    dx_ND = write(dx_ND, dot('RF,DF->RD', dh_RF2, gate_up_EDF2[e]), tile)
    return dx_ND, dgate_up_EDF2.at[e].add(dgate_up_DF2), ddown_EFD.at[e].add(ddown_FD)

  zeros = lambda w: jnp.zeros(w.shape, jnp.float32)
  dx_ND, dgate_up_EDF2, ddown_EFD = for_tiles(len(x_ND), sizes_E, body,
                                              (jnp.zeros_like(x_ND), zeros(gate_up_EDF2), zeros(down_EFD)))
  return dx_ND, dgate_up_EDF2.astype(gate_up_EDF2.dtype), ddown_EFD.astype(down_EFD.dtype)
