"""Sparse attention without the T x S matrix, with a hand-written backward pass.

Rows of few tokens are one tile, below; long rows go through query chunks (chunks.py). Between forward and backward
only o, lse and the selection survive: scores and probabilities are computed again, by the same products, so that the
backward pass sees the very set that the forward pass chose.

B batch, T query time, S key time, H query heads, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim,
I indexer heads, J indexer head dim.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dense_attention.xla import attend_one
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.index_select import search
from pallas_kernels.index_select.selection import Selection, keep_all, selected
from pallas_kernels.index_select.xla import products, score
from pallas_kernels.indexer_warmup.xla import head_mean, kl_gradient_one, kl_one
from pallas_kernels.mask import visible


class Row(NamedTuple):
  """The arrays of one row, or with a leading B of all rows."""
  q_GNK: jax.Array
  k_GSK: jax.Array
  v_GSK: jax.Array
  iq_ITJ: jax.Array
  ik_SJ: jax.Array
  gate_TI: jax.Array
  q_segment_T: jax.Array
  k_segment_S: jax.Array
  q_order_T: jax.Array
  k_order_S: jax.Array


class Options(NamedTuple):
  topk: int
  scale: float
  want_kl: bool


def dsa_attention(q_BTHK, k_BSGK, v_BSGK, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT,
                  k_order_BS, *, topk, scale, selection, want_kl) -> DSAOutput:
  row = Row(tiles.stack_heads(q_BTHK, k_BSGK.shape[2]), k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2),
            iq_BTIJ.swapaxes(1, 2), ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS)
  o_BGNK, lse_BGN, kl_BT, selection = _attention(Options(topk, scale, want_kl), row, selection)
  T = q_BTHK.shape[1]
  return DSAOutput(tiles.unstack_heads(o_BGNK, T), tiles.unstack_heads(lse_BGN, T), kl_BT, selection)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, rows: Row, selection):
  return _forward(options, rows, selection)[0]


def elements(rows: Row) -> int:
  """Attention logits of one row."""
  return rows.q_GNK.shape[1] * rows.q_GNK.shape[2] * rows.k_GSK.shape[2]


def _forward(options, rows: Row, selection):
  o_BGNK, lse_BGN, kl_BT, selection = tiles.over_rows(functools.partial(forward_one, options), (rows, selection),
                                                      elements(rows))
  o_BGNK = o_BGNK.astype(rows.q_GNK.dtype)
  return (o_BGNK, lse_BGN, kl_BT, selection), (rows, o_BGNK, lse_BGN, selection)


def _backward(options, saved, cotangents):
  rows, o_BGNK, lse_BGN, selection = saved
  do_BGNK, _, dkl_BT, _ = cotangents
  delta_BGN = (do_BGNK.astype(jnp.float32) * o_BGNK.astype(jnp.float32)).sum(-1)
  grads = tiles.over_rows(functools.partial(backward_one, options),
                          (rows, selection, lse_BGN, delta_BGN, do_BGNK, dkl_BT), elements(rows))
  grads = [g.astype(x.dtype) for g, x in zip(grads, rows)]
  return Row(*grads, None, None, None, None), None


_attention.defvjp(_forward, _backward)


def mask_one(row: Row, score_TS, selection: Selection) -> jax.Array:
  chosen_TS = selected(score_TS, row.k_order_S, selection.threshold_BT[:, None], selection.last_BT[:, None])
  return chosen_TS & (score_TS > -jnp.inf)


def scores_one(row: Row):
  """(index products z_ITS, masked scores)."""
  z_ITS = products(row.iq_ITJ, row.ik_SJ)
  mask_TS = visible(row.q_segment_T[:, None], row.k_segment_S, row.q_order_T[:, None], row.k_order_S, causal=True)
  return z_ITS, jnp.where(mask_TS, score(z_ITS, row.gate_TI), -jnp.inf)


def forward_one(options, row: Row, selection: Selection | None):
  _, score_TS = scores_one(row)
  if selection is None and options.topk >= len(row.k_order_S):
    selection = keep_all(row.q_order_T.shape)
  elif selection is None:
    selection = Selection(*search.kth(score_TS, row.k_order_S, options.topk))
  mask_TS = mask_one(row, score_TS, selection)
  o_GNK, lse_GN = attend_one(row.q_GNK, row.k_GSK, row.v_GSK, mask_TS, options.scale)
  kl_T = None
  if options.want_kl:
    p_GNS = tiles.probabilities(row.q_GNK, row.k_GSK, lse_GN, mask_TS, options.scale)
    kl_T, _ = kl_one(score_TS, head_mean(p_GNS, len(row.q_order_T)), mask_TS)
  return o_GNK, lse_GN, kl_T, selection


def backward_one(options, row: Row, selection, lse_GN, delta_GN, do_GNK, dkl_T):
  z_ITS, score_TS = scores_one(row)
  mask_TS = mask_one(row, score_TS, selection)
  p_GNS, dq, dk, dv = tiles.gradients(row.q_GNK, row.k_GSK, row.v_GSK, lse_GN, delta_GN, do_GNK, mask_TS,
                                      options.scale)
  if options.want_kl:
    p_TS = head_mean(p_GNS, len(row.q_order_T))
    _, index_lse_T = kl_one(score_TS, p_TS, mask_TS)
    index = kl_gradient_one(z_ITS, p_TS, mask_TS, row.iq_ITJ, row.ik_SJ, row.gate_TI, index_lse_T, dkl_T)
  else:
    index = [jnp.zeros(x.shape) for x in (row.iq_ITJ, row.ik_SJ, row.gate_TI)]
  return dq, dk, dv, *index
