"""Grouped products as loops over tiles of rows of one expert; runs everywhere, made for CPUs.

An expert's rows lie together, so a tile is a plain slice: nothing is gathered into padded blocks. A tile is as long as
the bucket that holds its expert's rows; there are few buckets, each one loop, and the rows that a tile covers beyond
its own expert are masked. XLA runs a loop's products on all cores; inside `lax.switch` it would not, and it would copy
the results once a branch.

2 cores, float32, 8192 rows, 32 experts, 512 -> 2 x 256 -> 512, against 182 GFLOP/s of one large product: forward 127
(skewed) to 138 (even), backward 128; one einsum over experts padded to the largest 47 to 88; `jax.lax.ragged_dot` 6.

N rows, D input features, F output or hidden features, E experts, R rows of a tile, C tiles.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_TILE = 512


class Tile(NamedTuple):
  """Rows at .. at + R of the arrays, of which keep_R1 belong to this tile."""
  expert: jax.Array
  at: jax.Array
  rows: int
  keep_R1: jax.Array


def buckets(N: int, E: int) -> tuple[int, ...]:
  """Tile lengths for N rows over E experts: quarters of about an expert's mean share, finer right above it, where the
  experts of an even router are."""
  step = 16
  while step < 128 and step * 4 < N / E:
    step *= 2
  sizes = [int(step * n) for n in (1, 2, 3, 4, 4.5, 5, 6, 8) if step * n <= MAX_TILE]
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
  expert_C = jnp.minimum((tile_C[:, None] >= end_E).sum(1), E - 1)
  offset_C = (tile_C - (end_E - tiles_E)[expert_C]) * largest
  first_C = start_E[expert_C] + offset_C
  count_C = jnp.clip(sizes_E[expert_C] - offset_C, 0, largest)
  bucket_C = jnp.where(tile_C < end_E[-1], (count_C[:, None] > jnp.asarray(lengths)).sum(1), len(lengths))
  order_C = jnp.argsort(bucket_C)
  expert_C, first_C, count_C = expert_C[order_C], first_C[order_C], count_C[order_C]
  edges = (bucket_C < jnp.arange(len(lengths) + 1)[:, None]).sum(1)
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


def matmul(x_ND, w_EDF, sizes_E):
  def body(y_NF, tile):
    return write(y_NF, dot('RD,DF->RF', read(x_ND, tile), w_EDF[tile.expert]), tile)

  return for_tiles(len(x_ND), sizes_E, body, jnp.zeros((len(x_ND), w_EDF.shape[2]), x_ND.dtype))


def matmul_bwd(x_ND, w_EDF, sizes_E, dy_NF):
  def body(carry, tile):
    dx_ND, dw_EDF = carry
    dy_RF = jnp.where(tile.keep_R1, read(dy_NF, tile), 0)
    dx_ND = write(dx_ND, dot('RF,DF->RD', dy_RF, w_EDF[tile.expert]), tile)
    return dx_ND, dw_EDF.at[tile.expert].add(dot('RD,RF->DF', read(x_ND, tile), dy_RF))

  dx_ND, dw_EDF = for_tiles(len(x_ND), sizes_E, body, (jnp.zeros_like(x_ND), jnp.zeros(w_EDF.shape, jnp.float32)))
  return dx_ND, dw_EDF.astype(w_EDF.dtype)
