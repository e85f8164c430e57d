"""Grouped products on a TPU, by JAX's own megablox kernels (arXiv 2211.15841): rows sorted by expert, each tile of rows
against the weights of the experts it holds, a tile that two experts share visited twice.

N rows, K picks of a row, M = N K picks or sorted rows, D features, F hidden features, E experts, C groups of R picks.
"""
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from pallas_kernels import tiles, tpu_call
from pallas_kernels.grouped_matmul import routed
from pallas_kernels.grouped_matmul.parts import Kernels

ROWS = (512, 256, 128)     # of a tile: the most of which an expert's mean share fills four
FEATURES = 4096, 1024      # bytes of a row of weights in a tile, along the sum and along the result
COUNTED = 256              # picks that are counted together


def rows(M: int, E: int) -> int:
  return next((n for n in ROWS if 4 * n * E <= M), ROWS[-1])


def times(x_MD, w_EDF, sizes_E, transposed: bool = False) -> jax.Array:
  D, F = w_EDF.shape[1:][::-1] if transposed else w_EDF.shape[1:]
  tiling = rows(len(x_MD), len(sizes_E)), *(min(n, b // x_MD.dtype.itemsize) for n, b in zip((D, F), FEATURES))
  return gmm(x_MD, w_EDF, sizes_E, x_MD.dtype, tiling, transpose_rhs=transposed, interpret=tpu_call.INTERPRET)


def gradient(x_MD, dy_MF, sizes_E, dtype) -> jax.Array:
  most = FEATURES[1] // x_MD.dtype.itemsize
  tiling = rows(len(x_MD), len(sizes_E)), min(x_MD.shape[1], most), min(dy_MF.shape[1], most)
  return tgmm(x_MD.T, dy_MF, sizes_E, dtype, tiling, interpret=tpu_call.INTERPRET)


def sort(expert_NK: jax.Array, E: int) -> routed.Sorted:
  """`routed.sort`, by counting: how many picks of its expert lie before a pick is a product with a triangle of ones.
  XLA's sort of a few 100,000 picks takes it 17 s to compile for a TPU."""
  M = expert_NK.size
  expert_CR = tiles.pad(routed.own(expert_NK.reshape(-1), E), 0, COUNTED, E).reshape(-1, COUNTED)
  hot_CRE = expert_CR[..., None] == jnp.arange(E + 1)
  before_RR = jnp.tril(jnp.ones((COUNTED, COUNTED), jnp.bfloat16), -1)
  before_CRE = jnp.einsum('QR,CRE->CQE', before_RR, hot_CRE.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
  number_CE = hot_CRE.sum(1, dtype=jnp.int32)
  total_E = number_CE.sum(0)
  start_CE = jnp.cumsum(total_E) - total_E + jnp.cumsum(number_CE, 0) - number_CE
  place_CR = jnp.where(hot_CRE, before_CRE.astype(jnp.int32) + start_CE[:, None], 0).sum(-1)
  place_M = place_CR.reshape(-1)[:M]
  pick_M = jnp.zeros_like(place_M).at[place_M].set(jnp.arange(M), unique_indices=True)
  return routed.Sorted(pick_M, place_M.reshape(expert_NK.shape), total_E[:E])


KERNELS = Kernels(sort, rows, times, gradient)
