"""Routed experts by kernels for grouped products: rows are gathered before the products, a part of the sorted picks at
a time.

Where picks of several devices are told apart, a part holds as many as this one is likely to own, and parts in which it
owns none are not visited. What the kernels leave in rows that belong to nobody is undefined and made 0.

N rows, K picks of a row, M = N K picks, R picks of a part, D features, F hidden features, E experts, C rows of a group.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.grouped_matmul import routed

SPARE = 1.25               # picks of a part, over those that a device owns if all own as many
COMBINED = 1024            # rows whose results are gathered together


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


def owned(x_MD: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """x with zeros in the rows of nobody."""
  return jnp.where(jnp.arange(len(x_MD))[:, None] < sizes_E.sum(), x_MD, 0)


class Kernels(NamedTuple):
  """Grouped products of a platform, and what is made of them: the functions of xla.py and routed.py.

  sort(expert_NK, E) -> routed.Sorted. rows(M, E) -> rows of a tile, of which arrays have a whole number.
  times(x_MD, w_EDF, sizes_E, transposed=False) -> x[m] @ w[expert of m] or its transpose, in the dtype of x, undefined
  beyond sum(sizes_E). gradient(x_MD, dy_MF, sizes_E, dtype) -> sum of their outer products over the rows of each
  expert, [E, D, F].
  """
  sort: Callable
  rows: Callable
  times: Callable
  gradient: Callable

  def fill(self, x_ND: jax.Array, E: int) -> jax.Array:
    return tiles.pad(x_ND, 0, self.rows(len(x_ND), E))

  def matmul(self, x_ND, w_EDF, sizes_E):
    return owned(self.times(self.fill(x_ND, len(w_EDF)), w_EDF, sizes_E), sizes_E)[:len(x_ND)]

  def matmul_bwd(self, x_ND, w_EDF, sizes_E, dy_NF):
    x_MD, dy_MF = (self.fill(x, len(w_EDF)) for x in (x_ND, dy_NF))
    dx_MD = owned(self.times(dy_MF, w_EDF, sizes_E, transposed=True), sizes_E)
    return dx_MD[:len(x_ND)], self.gradient(x_MD, dy_MF, sizes_E, w_EDF.dtype)

  def parts(self, order: routed.Sorted, devices: int) -> Parts:
    M = order.pick_M.size
    size = M if devices == 1 else min(-(-int(M * SPARE) // devices), M)
    tile = self.rows(size, len(order.sizes_E))
    return Parts(order, -(-size // tile) * tile, -(-M // (-(-size // tile) * tile)))

  def hidden(self, x_ND, part: Part, K: int, gate_up_EDF2):
    """Pre-activations h_RF2 of a part."""
    return self.times(x_ND[part.pick_R // K], gate_up_EDF2, part.sizes_E)

  def swiglu(self, devices, x_ND, order, weight_NK, gate_up_EDF2, down_EFD):
    parts = self.parts(order, devices)

    def one(part):
      h_RF2 = self.hidden(x_ND, part, weight_NK.shape[1], gate_up_EDF2)
      y_RD = self.times(routed.activate(h_RF2), down_EFD, part.sizes_E)
      return parts.combine(part, owned(y_RD, part.sizes_E), weight_NK)

    return parts.add(one)

  def swiglu_fwd(self, *arguments):
    """(y_ND, nothing more that the backward pass reads: to keep hidden values of all picks, also those of other
    devices, would take more than to compute the own ones again)."""
    return self.swiglu(*arguments), ()

  def swiglu_bwd(self, devices, x_ND, order, weight_NK, gate_up_EDF2, down_EFD, _, dy_ND):
    """Gradients of x, weight, gate_up and down, those of the matrices one after the other: arrays of picks are
    large."""
    parts, K = self.parts(order, devices), weight_NK.shape[1]
    total = [x.dtype if parts.number == 1 else jnp.float32 for x in (gate_up_EDF2, down_EFD)]

    def one(part):
      sizes_E, row_R = part.sizes_E, part.pick_R // K
      weight_R1 = weight_NK.reshape(-1)[part.pick_R][:, None].astype(jnp.float32)
      act_RF, to_hidden = routed.activated(self.hidden(x_ND, part, K, gate_up_EDF2))
      dy_RD = dy_ND[row_R]
      dact_RF = self.times(dy_RD, down_EFD, sizes_E, transposed=True).astype(jnp.float32)
      dweight_R1 = owned((dact_RF * act_RF).sum(1, keepdims=True), sizes_E)
      dh_RF2 = to_hidden(dact_RF * weight_R1).astype(x_ND.dtype)
      ddown_EFD = self.gradient((act_RF * weight_R1).astype(x_ND.dtype), dy_RD, sizes_E, total[1])
      ddown_EFD, row_R = jax.lax.optimization_barrier((ddown_EFD, row_R))
      dgate_up_EDF2 = self.gradient(x_ND[row_R], dh_RF2, sizes_E, total[0])
      dgate_up_EDF2, dh_RF2 = jax.lax.optimization_barrier((dgate_up_EDF2, dh_RF2))
      dx_RD = owned(self.times(dh_RF2, gate_up_EDF2, sizes_E, transposed=True), sizes_E)
      place_NK, inside_NK = parts.places(part)
      dweight_NK = jnp.where(inside_NK, dweight_R1[place_NK, 0], 0)
      return parts.combine(part, dx_RD, jnp.ones_like(weight_NK)), dweight_NK, dgate_up_EDF2, ddown_EFD

    dx_ND, dweight_NK, dgate_up_EDF2, ddown_EFD = parts.add(one)
    return (dx_ND, dweight_NK.astype(weight_NK.dtype), dgate_up_EDF2.astype(gate_up_EDF2.dtype),
            ddown_EFD.astype(down_EFD.dtype))
