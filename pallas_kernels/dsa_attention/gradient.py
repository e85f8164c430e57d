"""Sparse attention with a hand-written backward pass, around the two passes of an implementation.

Between forward and backward only o, lse and the selection survive: scores and probabilities are computed again, by the
same products, so that the backward pass sees the very set that the forward pass chose.

B batch, T query time, S key time, H query heads, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim,
I indexer heads, J indexer head dim.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.dsa_attention.row import Options, Row, stacked
from pallas_kernels.equation import equation, kept


class Passes(NamedTuple):
  """Of an implementation, over all rows of a batch.

  forward(options, rows, selection or None) -> (o_BGNK, lse_BGN, kl_BT, log-sum-exp of the selected scores [B, T],
  selection); backward(options, rows, selection, index_lse_BT, lse_BGN, delta_BGN, do_BGNK, dkl_BT) -> float32
  gradients of q, k, v, iq, ik, gate. delta is the sum of do * o over K.
  """
  forward: Callable
  backward: Callable


def attend(passes: Passes, q_BTHK, k_BSGK, v_BSGK, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT,
           k_order_BS, *, topk, scale, selection, want_kl, way) -> DSAOutput:
  rows = stacked(q_BTHK, k_BSGK, v_BSGK, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS)
  o_BGNK, lse_BGN, kl_BT, selection = _attention(passes, Options(topk, scale, want_kl, way), rows, selection)
  T = q_BTHK.shape[1]
  return DSAOutput(tiles.unstack_heads(o_BGNK, T), tiles.unstack_heads(lse_BGN, T), kl_BT, selection)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(passes, options, rows: Row, selection):
  return _forward(passes, options, rows, selection)[0]


def _forward(passes, options, rows: Row, selection):
  forward = named('forward', options, functools.partial(passes.forward, options), rows)
  o_BGNK, *rest = forward(rows, selection)
  o_BGNK, lse_BGN, kl_BT, index_lse_BT, selection = kept((o_BGNK.astype(rows.q_GNK.dtype), *rest))
  return (o_BGNK, lse_BGN, kl_BT, selection), (rows, o_BGNK, lse_BGN, index_lse_BT, selection)


def _backward(passes, options, saved, cotangents):
  rows, o_BGNK, lse_BGN, index_lse_BT, selection = saved
  do_BGNK, _, dkl_BT, _ = cotangents
  delta_BGN = (do_BGNK.astype(jnp.float32) * o_BGNK.astype(jnp.float32)).sum(-1)
  backward = named('backward', options, functools.partial(passes.backward, options), rows)
  grads = backward(rows, selection, index_lse_BT, lse_BGN, delta_BGN, do_BGNK, dkl_BT)
  grads = [g.astype(x.dtype) for g, x in zip(grads, rows)]
  return Row(*grads, None, None, None, None), None


def named(direction: str, options: Options, fn: Callable, rows: Row) -> Callable:
  (B, G, N, K), (_, I, T, J) = rows.q_GNK.shape, rows.iq_ITJ.shape
  return equation(f'dsa_attention_{direction}' + ('_kl' if options.want_kl else ''), fn, B=B, G=G, N=N, K=K,
                  S=rows.k_GSK.shape[2], I=I, T=T, J=J, width=rows.q_GNK.dtype.itemsize)


_attention.defvjp(_forward, _backward)
