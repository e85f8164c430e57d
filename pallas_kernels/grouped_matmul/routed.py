"""The routed SwiGLU experts: picks sorted by expert, tiles of `xla.py`, results gathered back to their rows.

Rows are read through the sorting permutation inside each tile and the routing weights are applied there in the
backward pass, so of all arrays with a row for every pick only the hidden pre-activations live until then. Nothing is
scattered and added: a row finds its picks by the inverse permutation.

N rows, K picks of a row, M = N K picks, D features, F hidden features, E experts, R picks of a tile.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.grouped_matmul.xla import dot, for_tiles, read, write

FEW_PICKS = 8         # up to here each pick reads its own weights, as decoding does


class Sorted(NamedTuple):
  pick_M: jax.Array         # picks in the order of their experts; the ones of nobody come last
  place_NK: jax.Array       # where each pick is in that order
  sizes_E: jax.Array


def sort(expert_NK: jax.Array, E: int) -> Sorted:
  expert_M = own(expert_NK.reshape(-1), E)
  pick_M = jnp.argsort(expert_M)
  sizes_E = jnp.diff(jnp.searchsorted(expert_M[pick_M], jnp.arange(E + 1))).astype(jnp.int32)
  place_M = jnp.zeros_like(pick_M).at[pick_M].set(jnp.arange(pick_M.size), unique_indices=True)
  return Sorted(pick_M, place_M.reshape(expert_NK.shape), sizes_E)


def own(expert_M, E: int):
  """Experts of this device; E for all others."""
  return jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)


def activate(h_RF2):
  gate_RF, up_RF = jnp.split(h_RF2, 2, -1)
  return jax.nn.silu(gate_RF) * up_RF


def activated(h_RF2):
  """(activate(h), a function from its gradient to that of h), in float32."""
  gate_RF, up_RF = jnp.split(h_RF2.astype(jnp.float32), 2, -1)
  sigmoid_RF = jax.nn.sigmoid(gate_RF)
  silu_RF = gate_RF * sigmoid_RF

  def gradient(dact_RF):
    dsilu_RF = sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    return jnp.concatenate([dact_RF * up_RF * dsilu_RF, dact_RF * silu_RF], -1)
  return silu_RF * up_RF, gradient


def swiglu(devices, x_ND, order: Sorted, weight_NK, gate_up_EDF2, down_EFD):
  """devices: unused, a tile of nobody's picks costs nothing."""
  K = weight_NK.shape[1]

  def body(y_MD, tile):
    x_RD = x_ND[read(order.pick_M, tile) // K]
    act_RF = activate(dot('RD,DF->RF', x_RD, gate_up_EDF2[tile.expert])).astype(x_ND.dtype)
    return write(y_MD, dot('RF,FD->RD', act_RF, down_EFD[tile.expert]), tile)

  y_MD = for_tiles(weight_NK.size, order.sizes_E, body, jnp.zeros((weight_NK.size, x_ND.shape[1]), x_ND.dtype))
  return combine(y_MD, order, weight_NK)


def combine(y_MD, order: Sorted, weight_NK):
  """y[n] = sum_k weight[n, k] * y[place of n's k-th pick]; a sum of gathers, which XLA fuses into one pass."""
  parts = [y_MD[order.place_NK[:, k]].astype(jnp.float32) * weight_NK[:, k, None] for k in range(weight_NK.shape[1])]
  return sum(parts).astype(y_MD.dtype)


def few(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD):
  """Products of one row, written as multiply and sum so that XLA reads the weights in place: a dot would first copy
  the expert's matrix."""
  E, rows = len(down_EFD), []
  times = lambda x_D, w_DF: (x_D.astype(jnp.float32)[:, None] * w_DF.astype(jnp.float32)).sum(0)
  for x_D, expert_K, weight_K in zip(x_ND, expert_NK, weight_NK):
    y_D = 0
    for expert, weight in zip(expert_K, weight_K):
      act_F = activate(times(x_D, gate_up_EDF2[expert])).astype(x_ND.dtype)
      mine = (expert >= 0) & (expert < E)
      y_D += jnp.where(mine, weight, 0) * times(act_F, down_EFD[expert])
    rows.append(y_D)
  return jnp.stack(rows).astype(x_ND.dtype)


def swiglu_fwd(devices, x_ND, order: Sorted, weight_NK, gate_up_EDF2, down_EFD):
  """(y_ND, what the backward pass reads: the pre-activations h_MF2)."""
  M, K = weight_NK.size, weight_NK.shape[1]

  def body(carry, tile):
    y_MD, h_MF2 = carry
    h_RF2 = dot('RD,DF->RF', x_ND[read(order.pick_M, tile) // K], gate_up_EDF2[tile.expert])
    y_RD = dot('RF,FD->RD', activate(h_RF2).astype(x_ND.dtype), down_EFD[tile.expert])
    return write(y_MD, y_RD, tile), write(h_MF2, h_RF2, tile)

  zeros = lambda width: jnp.zeros((M, width), x_ND.dtype)
  y_MD, h_MF2 = for_tiles(M, order.sizes_E, body, (zeros(x_ND.shape[1]), zeros(gate_up_EDF2.shape[2])))
  return combine(y_MD, order, weight_NK), h_MF2


def swiglu_bwd(devices, x_ND, order: Sorted, weight_NK, gate_up_EDF2, down_EFD, h_MF2, dy_ND):
  """Gradients of x, weight, gate_up and down; those of the matrices are added up in float32."""
  (M, K), dtype = (weight_NK.size, weight_NK.shape[1]), x_ND.dtype
  weight_M = weight_NK.reshape(-1).astype(jnp.float32)

  def body(carry, tile):
    dx_MD, dweight_M1, dgate_up_EDF2, ddown_EFD = carry
    pick_R, e = read(order.pick_M, tile), tile.expert
    dy_RD = jnp.where(tile.keep_R1, dy_ND[pick_R // K], 0)
    weight_R1 = weight_M[pick_R][:, None]
    act_RF, gradient = activated(read(h_MF2, tile))
    dact_RF = dot('RD,FD->RF', dy_RD, down_EFD[e])
    dweight_M1 = write(dweight_M1, (dact_RF * act_RF).sum(1, keepdims=True), tile)
    dact_RF *= weight_R1
    dh_RF2 = gradient(dact_RF).astype(dtype)
    dx_MD = write(dx_MD, dot('RF,DF->RD', dh_RF2, gate_up_EDF2[e]), tile)
    dgate_up_EDF2 = dgate_up_EDF2.at[e].add(tiles.inner(x_ND[pick_R // K], dh_RF2))
    ddown_EFD = ddown_EFD.at[e].add(tiles.inner((act_RF * weight_R1).astype(dtype), dy_RD))
    return dx_MD, dweight_M1, dgate_up_EDF2, ddown_EFD

  zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
  start = jnp.zeros((M, x_ND.shape[1]), dtype), zeros(M, 1), zeros(*gate_up_EDF2.shape), zeros(*down_EFD.shape)
  dx_MD, dweight_M1, dgate_up_EDF2, ddown_EFD = for_tiles(M, order.sizes_E, body, start)
  return (combine(dx_MD, order, jnp.ones_like(weight_NK)), dweight_M1[order.place_NK, 0].astype(weight_NK.dtype),
          dgate_up_EDF2.astype(gate_up_EDF2.dtype), ddown_EFD.astype(down_EFD.dtype))
