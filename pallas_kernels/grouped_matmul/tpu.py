"""Grouped products and routed experts on a TPU, by JAX's own megablox kernels (arXiv 2211.15841): rows sorted by
expert, each tile of rows against the weights of the experts it holds, a tile that two experts share visited twice.

Rows are gathered before the products, a part of the sorted picks at a time: where picks of several devices are told
apart, a part holds as many as this one is likely to own, and parts in which it owns none are not visited. What the
kernels leave in rows that belong to nobody is undefined and made 0.

Picks are sorted by counting: XLA's sort of a few 100,000 takes it 17 s to compile for a TPU, and most of its passes
when it runs are not needed for so few kinds.

N rows, K picks of a row, M = N K picks, R picks of a part, D features, F hidden features, E experts; C groups of rows
or picks.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from pallas_kernels import tiles, tpu_call
from pallas_kernels.grouped_matmul import routed

ROWS = (512, 256, 128)     # of a tile: the most of which an expert's mean share fills four
FEATURES = 4096, 1024      # bytes of a row of weights in a tile, along the sum and along the result
SPARE = 1.25               # picks of a part, over those that a device owns if all own as many
COUNTED = 256              # picks that are counted together
COMBINED = 1024            # rows whose results are gathered together


def rows(M: int, E: int) -> int:
  return next((n for n in ROWS if 4 * n * E <= M), ROWS[-1])


def times(x_MD, w_EDF, sizes_E, transposed: bool = False) -> jax.Array:
  """x[m] @ w[expert of m], or its transpose, in the dtype of x; undefined beyond sum(sizes_E)."""
  D, F = w_EDF.shape[1:][::-1] if transposed else w_EDF.shape[1:]
  tiling = rows(len(x_MD), len(sizes_E)), *(min(n, b // x_MD.dtype.itemsize) for n, b in zip((D, F), FEATURES))
  return gmm(x_MD, w_EDF, sizes_E, x_MD.dtype, tiling, transpose_rhs=transposed, interpret=tpu_call.INTERPRET)


def gradient(x_MD, dy_MF, sizes_E, dtype) -> jax.Array:
  """Sum of the outer products of x and dy over the rows of each expert: [E, D, F]."""
  most = FEATURES[1] // x_MD.dtype.itemsize
  tiling = rows(len(x_MD), len(sizes_E)), min(x_MD.shape[1], most), min(dy_MF.shape[1], most)
  return tgmm(x_MD.T, dy_MF, sizes_E, dtype, tiling, interpret=tpu_call.INTERPRET)


def owned(x_MD: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """x with zeros in the rows of nobody."""
  return jnp.where(jnp.arange(len(x_MD))[:, None] < sizes_E.sum(), x_MD, 0)


def fill(x_ND: jax.Array, E: int) -> jax.Array:
  """Rows filled up to whole tiles."""
  return tiles.pad(x_ND, 0, rows(len(x_ND), E))


def matmul(x_ND, w_EDF, sizes_E):
  return owned(times(fill(x_ND, len(w_EDF)), w_EDF, sizes_E), sizes_E)[:len(x_ND)]


def matmul_bwd(x_ND, w_EDF, sizes_E, dy_NF):
  x_MD, dy_MF = fill(x_ND, len(w_EDF)), fill(dy_NF, len(w_EDF))
  dx_MD = owned(times(dy_MF, w_EDF, sizes_E, transposed=True), sizes_E)
  return dx_MD[:len(x_ND)], gradient(x_MD, dy_MF, sizes_E, w_EDF.dtype)


def sort(expert_NK: jax.Array, E: int) -> routed.Sorted:
  """`routed.sort`: how many picks of its expert lie before a pick is a product with a triangle of ones."""
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


class Part(NamedTuple):
  """Picks at .. at + R of the sorted order, and how many of them each expert has."""
  at: jax.Array
  pick_R: jax.Array
  sizes_E: jax.Array


class Parts(NamedTuple):
  order: routed.Sorted
  size: int
  number: int

  def part(self, c) -> Part:
    at = c * self.size
    pick_M = tiles.pad(self.order.pick_M, 0, self.size)
    end_E = jnp.cumsum(self.order.sizes_E)
    inside = lambda place_E: jnp.clip(place_E - at, 0, self.size)
    return Part(at, jax.lax.dynamic_slice_in_dim(pick_M, at, self.size),
                inside(end_E) - inside(end_E - self.order.sizes_E))

  def places(self, part: Part) -> tuple[jax.Array, jax.Array]:
    """(where each pick is in a part, is it there at all), [N, K]."""
    place_NK = self.order.place_NK - part.at
    return jnp.clip(place_NK, 0, self.size - 1), (place_NK >= 0) & (place_NK < self.size)

  def combine(self, part: Part, y_RD, weight_NK):
    """What a part adds to `routed.combine`, a few rows at a time: many large gathers in one program take long to
    compile."""
    N, size = len(weight_NK), min(COMBINED, len(weight_NK))
    place_NK, inside_NK = self.places(part)
    weight_NK = jnp.where(inside_NK, weight_NK, 0)
    cut = lambda x_NK: tiles.cut(tiles.pad(x_NK, 0, size), 0, size)

    def one(rows):
      place_CK, weight_CK = rows
      return (y_RD[place_CK].astype(jnp.float32) * weight_CK[..., None]).sum(1).astype(y_RD.dtype)

    return jax.lax.map(one, (cut(place_NK), cut(weight_NK))).reshape(-1, y_RD.shape[1])[:N]

  def add(self, fn):
    """Sum of fn(part) over the parts in which a pick belongs to somebody."""
    if self.number == 1:
      return fn(self.part(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: fn(self.part(0))))
    used = (self.order.sizes_E.sum() + self.size - 1) // self.size
    return jax.lax.fori_loop(0, used, lambda c, total: jax.tree.map(jnp.add, total, fn(self.part(c))), zeros)


def cut(order: routed.Sorted, devices: int) -> Parts:
  M, E = order.pick_M.size, len(order.sizes_E)
  size = -(-M // devices) if devices == 1 else min(-(-int(M * SPARE) // devices), M)
  size = -(-size // rows(size, E)) * rows(size, E)
  return Parts(order, size, -(-M // size))


def hidden(x_ND, part: Part, K: int, gate_up_EDF2):
  """Pre-activations h_RF2 of a part."""
  return times(x_ND[part.pick_R // K], gate_up_EDF2, part.sizes_E)


def swiglu(devices, x_ND, order, weight_NK, gate_up_EDF2, down_EFD):
  parts = cut(order, devices)

  def one(part):
    h_RF2 = hidden(x_ND, part, weight_NK.shape[1], gate_up_EDF2)
    y_RD = times(routed.activate(h_RF2), down_EFD, part.sizes_E)
    return parts.combine(part, owned(y_RD, part.sizes_E), weight_NK)

  return parts.add(one)


def swiglu_fwd(*arguments):
  """(y_ND, nothing more that the backward pass reads: to keep hidden values of all picks, also those of other devices,
  would take more than to compute the own ones again)."""
  return swiglu(*arguments), ()


def swiglu_bwd(devices, x_ND, order, weight_NK, gate_up_EDF2, down_EFD, _, dy_ND):
  """Gradients of x, weight, gate_up and down, those of the matrices one after the other: arrays of picks are large."""
  parts, K = cut(order, devices), weight_NK.shape[1]
  total = [x.dtype if parts.number == 1 else jnp.float32 for x in (gate_up_EDF2, down_EFD)]

  def one(part):
    sizes_E, row_R = part.sizes_E, part.pick_R // K
    weight_R1 = weight_NK.reshape(-1)[part.pick_R][:, None].astype(jnp.float32)
    act_RF, to_hidden = routed.activated(hidden(x_ND, part, K, gate_up_EDF2))
    dy_RD = dy_ND[row_R]
    dact_RF = times(dy_RD, down_EFD, sizes_E, transposed=True).astype(jnp.float32)
    dweight_R1 = owned((dact_RF * act_RF).sum(1, keepdims=True), sizes_E)
    dh_RF2 = to_hidden(dact_RF * weight_R1).astype(x_ND.dtype)
    ddown_EFD = gradient((act_RF * weight_R1).astype(x_ND.dtype), dy_RD, sizes_E, total[1])
    ddown_EFD, row_R = jax.lax.optimization_barrier((ddown_EFD, row_R))
    dgate_up_EDF2 = gradient(x_ND[row_R], dh_RF2, sizes_E, total[0])
    dgate_up_EDF2, dh_RF2 = jax.lax.optimization_barrier((dgate_up_EDF2, dh_RF2))
    dx_RD = owned(times(dh_RF2, gate_up_EDF2, sizes_E, transposed=True), sizes_E)
    place_NK, inside_NK = parts.places(part)
    dweight_NK = jnp.where(inside_NK, dweight_R1[place_NK, 0], 0)
    return parts.combine(part, dx_RD, jnp.ones_like(weight_NK)), dweight_NK, dgate_up_EDF2, ddown_EFD

  dx_ND, dweight_NK, dgate_up_EDF2, ddown_EFD = parts.add(one)
  return (dx_ND, dweight_NK.astype(weight_NK.dtype), dgate_up_EDF2.astype(gate_up_EDF2.dtype),
          ddown_EFD.astype(down_EFD.dtype))
