"""Sparse attention without the T x S matrix, with a hand-written backward pass.

Rows of few tokens are one tile, below; long rows go through query chunks (chunks.py). Between forward and backward
only o, lse and the selection survive: scores and probabilities are computed again, by the same products, so that the
backward pass sees the very set that the forward pass chose.

B batch, T query time, S key time, H query heads, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim,
I indexer heads, J indexer head dim.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dense_attention.xla import attend_one
from pallas_kernels.dsa_attention import chunks
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.dsa_attention.row import Options, Row
from pallas_kernels.index_select import search
from pallas_kernels.index_select import xla as index
from pallas_kernels.index_select.selection import Selection, keep_all
from pallas_kernels.index_select.xla import products, score
from pallas_kernels.indexer_warmup.xla import head_mean, kl_gradient_one, kl_one
from pallas_kernels.mask import visible


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


def shape(rows: Row) -> tuple[bool, bool]:
  """(is a row one tile, does the batch go in a loop)."""
  _, G, N, _ = rows.q_GNK.shape
  T, S = rows.q_order_T.shape[1], rows.k_order_S.shape[1]
  small = index.is_small(T, S)
  return small, not small or G * N * S >= tiles.MANY


def _forward(options, rows: Row, selection):
  small, loop = shape(rows)
  o_BGNK, lse_BGN, kl_BT, index_lse_BT, selection = tiles.over_rows(
      functools.partial(forward_one if small else chunks.forward, options), (rows, selection), loop)
  o_BGNK = o_BGNK.astype(rows.q_GNK.dtype)
  return (o_BGNK, lse_BGN, kl_BT, selection), (rows, o_BGNK, lse_BGN, index_lse_BT, selection)


def _backward(options, saved, cotangents):
  rows, o_BGNK, lse_BGN, index_lse_BT, selection = saved
  do_BGNK, _, dkl_BT, _ = cotangents
  delta_BGN = (do_BGNK.astype(jnp.float32) * o_BGNK.astype(jnp.float32)).sum(-1)
  small, loop = shape(rows)
  grads = tiles.over_rows(functools.partial(backward_one if small else chunks.backward, options),
                          (rows, selection, index_lse_BT, lse_BGN, delta_BGN, do_BGNK, dkl_BT), loop)
  grads = [g.astype(x.dtype) for g, x in zip(grads, rows)]
  return Row(*grads, None, None, None, None), None


_attention.defvjp(_forward, _backward)


def scores_one(row: Row):
  """(index products z_ITS, scores that are -inf where the key is not visible)."""
  z_ITS = products(row.iq_ITJ, row.ik_SJ)
  mask_TS = visible(row.q_segment_T[:, None], row.k_segment_S, row.q_order_T[:, None], row.k_order_S, causal=True)
  return z_ITS, jnp.where(mask_TS, score(z_ITS, row.gate_TI), -jnp.inf)


def forward_one(options, row: Row, selection: Selection | None):
  _, score_TS = scores_one(row)
  if selection is None and options.topk >= len(row.k_order_S):
    selection = keep_all(row.q_order_T.shape)
  elif selection is None:
    selection = Selection(*search.kth(score_TS[None], row.k_order_S[None], options.topk))
  mask_TS = search.kept(score_TS, row.k_order_S, *selection)
  o_GNK, lse_GN, p_GNS = attend_one(row.q_GNK, row.k_GSK, row.v_GSK, mask_TS, options.scale)
  kl = kl_one(score_TS, head_mean(p_GNS, len(row.q_order_T)), mask_TS) if options.want_kl else (None, None)
  return o_GNK, lse_GN, *kl, selection


def backward_one(options, row: Row, selection, index_lse_T, lse_GN, delta_GN, do_GNK, dkl_T):
  z_ITS, score_TS = scores_one(row)
  mask_TS = search.kept(score_TS, row.k_order_S, *selection)
  p_GNS, dq, dk, dv = tiles.gradients(row.q_GNK, row.k_GSK, row.v_GSK, lse_GN, delta_GN, do_GNK, mask_TS,
                                      options.scale)
  if options.want_kl:
    p_TS = head_mean(p_GNS, len(row.q_order_T))
    index = kl_gradient_one(z_ITS, p_TS, mask_TS, row.iq_ITJ, row.ik_SJ, row.gate_TI, index_lse_T, dkl_T)
  else:
    index = [jnp.zeros(x.shape) for x in (row.iq_ITJ, row.ik_SJ, row.gate_TI)]
  return dq, dk, dv, *index
