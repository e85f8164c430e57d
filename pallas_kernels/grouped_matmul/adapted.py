"""Routed SwiGLU experts whose frozen matrices each have a low-rank pair beside them: `routed.py` with
x W + (x A) B in place of x W, and gradients for the pairs alone.

In a tile the pair is two thin products more, so neither W + A B nor the gradient of W ever exists: for 128 experts of
2048 -> 2 x 768 -> 2048 the float32 gradient of one layer would be 2.4 GB and a third of the step's products. In
bfloat16 the sum would also round away whatever is smaller than 1/256 of a weight.

W may be in 8 bits with a scale for each expert and output channel. A tile reads its expert's bytes, takes them in the
dtype of its rows and multiplies the product by the scales (the gradient of x: what comes in), so a float copy is as
large as one expert's matrix.

N rows, K picks of a row, M = N K picks, D features, F hidden features, E experts, R picks of a tile, A rank.
"""
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.routed import Sorted, activate, activated, combine
from pallas_kernels.grouped_matmul.routed import sort as sort
from pallas_kernels.grouped_matmul.xla import dot, for_tiles, read, write


def times(x_RI, e, w_EIO, a_EIA, b_EAO, scale_EO):
  """(x W + (x A) B in float32, x A as the gradient of B reads it) for the rows of expert e. scale_EO: None, or W is
  int8."""
  low_RA = dot('RI,IA->RA', x_RI, a_EIA[e]).astype(x_RI.dtype)
  y_RO = dot('RI,IO->RO', x_RI, w_EIO[e].astype(x_RI.dtype))
  if scale_EO is not None:
    y_RO *= scale_EO[e]
  return y_RO + dot('RA,AO->RO', low_RA, b_EAO[e]), low_RA


def back(dy_RO, e, w_EIO, a_EIA, b_EAO, scale_EO):
  """(gradient of x in float32, that of x A) from the gradient of `times`."""
  low_RA = dot('RO,AO->RA', dy_RO, b_EAO[e]).astype(dy_RO.dtype)
  by_w_RO = dy_RO if scale_EO is None else (dy_RO * scale_EO[e]).astype(dy_RO.dtype)
  return dot('RO,IO->RI', by_w_RO, w_EIO[e].astype(dy_RO.dtype)) + dot('RA,IA->RI', low_RA, a_EIA[e]), low_RA


def swiglu_fwd(devices, x_ND, order: Sorted, weight_NK, gate_up, down):
  """(y_ND, what the backward pass reads: the pre-activations h_MF2). devices: as in `routed.swiglu`."""
  M, K = weight_NK.size, weight_NK.shape[1]

  def body(carry, tile):
    y_MD, h_MF2 = carry
    h_RF2, _ = times(x_ND[read(order.pick_M, tile) // K], tile.expert, *gate_up)
    y_RD, _ = times(activate(h_RF2).astype(x_ND.dtype), tile.expert, *down)
    return write(y_MD, y_RD, tile), write(h_MF2, h_RF2, tile)

  zeros = lambda width: jnp.zeros((M, width), x_ND.dtype)
  y_MD, h_MF2 = for_tiles(M, order.sizes_E, body, (zeros(x_ND.shape[1]), zeros(gate_up[0].shape[2])))
  return combine(y_MD, order, weight_NK), h_MF2


def swiglu_bwd(devices, x_ND, order: Sorted, weight_NK, gate_up, down, h_MF2, dy_ND):
  """Gradients of x, weight, gate_up's pair and down's pair; those of the pairs are added up in float32."""
  (M, K), dtype = (weight_NK.size, weight_NK.shape[1]), x_ND.dtype
  weight_M = weight_NK.reshape(-1).astype(jnp.float32)
  add = lambda total, e, equation, x, y: total.at[e].add(dot(equation, x, y))

  def body(carry, tile):
    dx_MD, dweight_M1, dgate_up_a, dgate_up_b, ddown_a, ddown_b = carry
    pick_R, e = read(order.pick_M, tile), tile.expert
    dy_RD = jnp.where(tile.keep_R1, dy_ND[pick_R // K], 0)
    weight_R1 = weight_M[pick_R][:, None]
    act_RF, gradient = activated(read(h_MF2, tile))
    dact_RF, dlow_RA = back(dy_RD, e, *down)
    dweight_M1 = write(dweight_M1, (dact_RF * act_RF).sum(1, keepdims=True), tile)
    weighted_RF = (act_RF * weight_R1).astype(dtype)
    ddown_a = add(ddown_a, e, 'RF,RA->FA', weighted_RF, dlow_RA)
    ddown_b = add(ddown_b, e, 'RA,RD->AD', dot('RF,FA->RA', weighted_RF, down[1][e]).astype(dtype), dy_RD)
    dact_RF *= weight_R1
    dh_RF2 = gradient(dact_RF).astype(dtype)
    dx_RD, dlow_RA = back(dh_RF2, e, *gate_up)
    dx_MD = write(dx_MD, dx_RD, tile)
    x_RD = x_ND[pick_R // K]
    dgate_up_a = add(dgate_up_a, e, 'RD,RA->DA', x_RD, dlow_RA)
    dgate_up_b = add(dgate_up_b, e, 'RA,RF->AF', dot('RD,DA->RA', x_RD, gate_up[1][e]).astype(dtype), dh_RF2)
    return dx_MD, dweight_M1, dgate_up_a, dgate_up_b, ddown_a, ddown_b

  pairs = *gate_up[1:3], *down[1:3]
  start = (jnp.zeros((M, x_ND.shape[1]), dtype), jnp.zeros((M, 1), jnp.float32),
           *(jnp.zeros(p.shape, jnp.float32) for p in pairs))
  dx_MD, dweight_M1, *dpairs = for_tiles(M, order.sizes_E, body, start)
  return (combine(dx_MD, order, jnp.ones_like(weight_NK)), dweight_M1[order.place_NK, 0].astype(weight_NK.dtype),
          *(d.astype(p.dtype) for d, p in zip(dpairs, pairs)))
