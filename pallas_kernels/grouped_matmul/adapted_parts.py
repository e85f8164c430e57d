"""Routed experts with low-rank pairs beside their frozen matrices, by kernels for grouped products: `parts.py` with
x W + (x A) B in place of x W, and gradients for the pairs alone.

A matrix in 8 bits is read as it is stored; what it gives is multiplied by the scales of the row's expert.

N rows, K picks of a row, R picks of a part, D features, F hidden features, E experts, A rank, I and O features of the
rows that a pair of matrices reads and writes.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import routed
from pallas_kernels.grouped_matmul.parts import Kernels, Part, owned


class Pair(NamedTuple):
  """A frozen matrix of each expert, the pair beside it, and its scale or None."""
  w_EIO: jax.Array
  a_EIA: jax.Array
  b_EAO: jax.Array
  scale_EO: jax.Array | None

  def scaled(self, y_RO, part: Part) -> jax.Array:
    if self.scale_EO is None:
      return y_RO
    expert_R = jnp.searchsorted(jnp.cumsum(part.sizes_E), jnp.arange(len(y_RO)), side='right')
    return (y_RO * self.scale_EO[jnp.minimum(expert_R, len(self.scale_EO) - 1)]).astype(y_RO.dtype)


class Adapted(NamedTuple):
  kernels: Kernels

  def times(self, part: Part, x_RI, pair: Pair):
    """x W + (x A) B."""
    y_RO = pair.scaled(self.kernels.times(x_RI, pair.w_EIO, part.sizes_E), part)
    if not pair.a_EIA.shape[2]:
      return y_RO
    low_RA = self.kernels.times(x_RI, pair.a_EIA, part.sizes_E)
    return y_RO + self.kernels.times(low_RA, pair.b_EAO, part.sizes_E)

  def back(self, part: Part, dy_RO, pair: Pair):
    """(gradient of x, that of x A) from the gradient of `times`."""
    back = lambda dy, w: self.kernels.times(dy, w, part.sizes_E, transposed=True)
    dx_RI = back(pair.scaled(dy_RO, part), pair.w_EIO)
    if not pair.a_EIA.shape[2]:
      return dx_RI, None
    low_RA = back(dy_RO, pair.b_EAO)
    return dx_RI + back(low_RA, pair.a_EIA), low_RA

  def of_pair(self, part: Part, x_RI, low_RA, dy_RO, pair: Pair):
    """Gradients of a pair, from those of x A and of the result."""
    if low_RA is None:
      return jnp.zeros(pair.a_EIA.shape), jnp.zeros(pair.b_EAO.shape)
    sizes_E = part.sizes_E
    da_EIA = self.kernels.gradient(x_RI, low_RA, sizes_E, jnp.float32)
    return da_EIA, self.kernels.gradient(self.kernels.times(x_RI, pair.a_EIA, sizes_E), dy_RO, sizes_E, jnp.float32)

  def sort(self, expert_NK, E: int) -> routed.Sorted:
    return self.kernels.sort(expert_NK, E)

  def swiglu_fwd(self, devices, x_ND, order: routed.Sorted, weight_NK, gate_up, down):
    """(y_ND, nothing more that the backward pass reads: parts.py)."""
    parts, gate_up, down = self.kernels.parts(order, devices), Pair(*gate_up), Pair(*down)

    def one(part):
      h_RF2 = self.times(part, x_ND[part.pick_R // weight_NK.shape[1]], gate_up)
      y_RD = self.times(part, routed.activate(h_RF2), down)
      return parts.combine(part, owned(y_RD, part.sizes_E), weight_NK)

    return parts.add(one), ()

  def swiglu_bwd(self, devices, x_ND, order: routed.Sorted, weight_NK, gate_up, down, _, dy_ND):
    """Gradients of x, weight, gate_up's pair and down's pair; those of the pairs are added up in float32."""
    parts, K, dtype = self.kernels.parts(order, devices), weight_NK.shape[1], x_ND.dtype
    gate_up, down = Pair(*gate_up), Pair(*down)

    def one(part):
      row_R = part.pick_R // K
      weight_R1 = weight_NK.reshape(-1)[part.pick_R][:, None].astype(jnp.float32)
      x_RD, dy_RD = x_ND[row_R], dy_ND[row_R]
      act_RF, to_hidden = routed.activated(self.times(part, x_RD, gate_up))
      dact_RF, low_RA = self.back(part, dy_RD, down)
      dweight_R1 = owned((dact_RF.astype(jnp.float32) * act_RF).sum(1, keepdims=True), part.sizes_E)
      of_down = self.of_pair(part, (act_RF * weight_R1).astype(dtype), low_RA, dy_RD, down)
      dh_RF2 = to_hidden(dact_RF.astype(jnp.float32) * weight_R1).astype(dtype)
      dx_RD, low_RA = self.back(part, dh_RF2, gate_up)
      of_gate_up = self.of_pair(part, x_RD, low_RA, dh_RF2, gate_up)
      place_NK, inside_NK = parts.places(part)
      return (parts.combine(part, owned(dx_RD, part.sizes_E), jnp.ones_like(weight_NK)),
              jnp.where(inside_NK, dweight_R1[place_NK, 0], 0), *of_gate_up, *of_down)

    dx_ND, dweight_NK, *dpairs = parts.add(one)
    pairs = *gate_up[1:3], *down[1:3]
    return (dx_ND, dweight_NK.astype(weight_NK.dtype), *(d.astype(p.dtype) for d, p in zip(dpairs, pairs)))
