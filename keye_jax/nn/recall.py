"""How much of the attention lies on the keys that the indexer picks, measured at a few queries while a model trains.

B batch, T query time, S key time, N queries that are looked at, H query heads, G KV heads, R query heads per KV head,
K head dim, I indexer heads, J indexer head dim.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.equation import equation
from pallas_kernels.index_select import search
from pallas_kernels.index_select.xla import masked_score
from pallas_kernels.mask import NEG_INF, visible

QUERIES = 8        # of a row and device: thousands between two records, and a thousandth of a layer's work


class Recall(NamedTuple):
  mass_BN: jax.Array         # float32, share of the attention probability over all visible keys, averaged over heads
  counts_BN: jax.Array       # float32, 1 where a query sees more keys than are picked; elsewhere nothing is lost


def recall(q_BTHK, k_BSGK, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, *,
           topk: int) -> Recall:
  """Of N queries of each row, evenly apart. Without gradients; memory is that of one query where rows are long."""
  (B, T, H, K), (S, G), (I, J) = q_BTHK.shape, k_BSGK.shape[1:3], iq_BTIJ.shape[2:]
  N = min(QUERIES, T)
  at_N = (2 * jnp.arange(N) + 1) * T // (2 * N)
  loop = H * N * S >= tiles.MANY
  queries = [x[:, at_N] for x in (q_BTHK, iq_BTIJ, gate_BTI, q_segment_BT, q_order_BT)]
  keys = k_BSGK, ik_BSJ, k_segment_BS, k_order_BS

  def row(*arrays):
    queries, keys = arrays[:5], arrays[5:]
    return tiles.over_rows(lambda *query: one(query, keys, topk), queries, loop)

  named = equation('indexer_recall', lambda *arrays: tiles.over_rows(row, arrays, loop), B=B, N=N, S=S, H=H, G=G, K=K,
                   I=I, J=J, width=k_BSGK.dtype.itemsize)
  return named(*jax.lax.stop_gradient((*queries, *keys)))


def one(query, keys, topk: int) -> Recall:
  """Of one query; padding does not count."""
  (q_HK, iq_IJ, gate_I, q_segment, q_order), (k_SGK, ik_SJ, k_segment_S, k_order_S) = query, keys
  G, K = k_SGK.shape[1:]
  visible_S = visible(q_segment, k_segment_S, q_order, k_order_S, causal=True)
  x_GRS = tiles.dot('GRK,SGK->GRS', q_HK.reshape(G, -1, K), k_SGK) * K ** -0.5
  p_S = jax.nn.softmax(jnp.where(visible_S, x_GRS, NEG_INF)).mean((0, 1))
  score_1S = masked_score(iq_IJ[:, None], ik_SJ, gate_I[None], q_segment[None], k_segment_S, q_order[None], k_order_S)
  picked_1S = search.kept(score_1S, k_order_S, *search.kth(score_1S[None], k_order_S[None], topk))
  counts = (q_segment > 0) & (visible_S.sum() > topk)
  return Recall(jnp.where(picked_1S[0], p_S, 0).sum(), counts.astype(jnp.float32))
