"""Sparse attention without the T x S matrix. Rows of few tokens are one tile, below; long rows, and those whose keys
are to be gathered, go through query chunks (chunks.py).

B batch, T query time, S key time, H query heads, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim,
I indexer heads, J indexer head dim.
"""
import functools

import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dense_attention.xla import attend_one, masks_first
from pallas_kernels.dsa_attention import chunks
from pallas_kernels.dsa_attention.gradient import Passes, attend
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.dsa_attention.row import Options, Row
from pallas_kernels.index_select import search
from pallas_kernels.index_select import xla as index
from pallas_kernels.index_select.selection import Selection, keep_all
from pallas_kernels.index_select.xla import products, score
from pallas_kernels.indexer_warmup.xla import head_mean, kl_gradient_one, kl_one
from pallas_kernels.mask import visible


def dsa_attention(*arrays, **options) -> DSAOutput:
  return attend(Passes(forward, backward), *arrays, **options)


def shape(options: Options, rows: Row) -> tuple[bool, bool]:
  """(is a row one tile, does the batch go in a loop)."""
  _, G, N, _ = rows.q_GNK.shape
  T, S = rows.q_order_T.shape[1], rows.k_order_S.shape[1]
  small = index.is_small(G * N // T, T, S) and options.way == 'masked_dense'
  return small, not small or G * N * S >= tiles.MANY


def forward(options, rows: Row, selection):
  small, loop = shape(options, rows)
  return tiles.over_rows(functools.partial(forward_one if small else chunks.forward, options), (rows, selection), loop)


def backward(options, rows: Row, selection, *saved):
  small, loop = shape(options, rows)
  if not small:
    return tiles.over_rows(functools.partial(chunks.backward, options), (rows, selection, *saved), loop)
  one = functools.partial(backward_one, options)
  if masks_first(*rows.q_order_T.shape, rows.k_order_S.shape[1]):
    return tiles.over_rows(one, (rows, tiles.over_rows(selected_bias, (rows, selection), loop), *saved), loop)
  return tiles.over_rows(lambda row, selection, *saved: one(row, selected_bias(row, selection), *saved),
                         (rows, selection, *saved), loop)


def scores_one(row: Row):
  """Scores [T, S], -inf where the key is not visible."""
  mask_TS = visible(row.q_segment_T[:, None], row.k_segment_S, row.q_order_T[:, None], row.k_order_S, causal=True)
  return jnp.where(mask_TS, score(products(row.iq_ITJ, row.ik_SJ), row.gate_TI), -jnp.inf)


def forward_one(options, row: Row, selection: Selection | None):
  score_TS = scores_one(row)
  if selection is None and options.topk >= len(row.k_order_S):
    selection = keep_all(row.q_order_T.shape)
  elif selection is None:
    selection = Selection(*search.kth(score_TS[None], row.k_order_S[None], options.topk))
  mask_TS = search.kept(score_TS, row.k_order_S, *selection)
  o_GNK, lse_GN, p_GNS = attend_one(row.q_GNK, row.k_GSK, row.v_GSK, tiles.bias(mask_TS), options.scale)
  kl = kl_one(score_TS, head_mean(p_GNS, len(row.q_order_T)), mask_TS) if options.want_kl else (None, None)
  return o_GNK, lse_GN, *kl, selection


def selected_bias(row: Row, selection: Selection):
  """`tiles.bias` of a row."""
  return tiles.bias(search.kept(scores_one(row), row.k_order_S, *selection))


def backward_one(options, row: Row, bias_TS, index_lse_T, lse_GN, delta_GN, do_GNK, dkl_T):
  p_GNS, dq, dk, dv = tiles.gradients(row.q_GNK, row.k_GSK, row.v_GSK, lse_GN, delta_GN, do_GNK, bias_TS, options.scale)
  if options.want_kl:
    p_TS, z_ITS = head_mean(p_GNS, len(row.q_order_T)), products(row.iq_ITJ, row.ik_SJ)
    index = kl_gradient_one(z_ITS, p_TS, bias_TS, row.iq_ITJ, row.ik_SJ, row.gate_TI, index_lse_T, dkl_T)
  else:
    index = [jnp.zeros(x.shape) for x in (row.iq_ITJ, row.ik_SJ, row.gate_TI)]
  return dq, *tiles.transposed(dk, dv), *index
