"""Index scores and the exact top-k as their definitions: one T x S matrix and a full sort.

B batch, T queries, S keys, I indexer heads, J indexer head dim.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.index_select.selection import Selection, keep_all
from pallas_kernels.mask import visible


def score(iq_BTIJ, ik_BSJ, gate_BTI):
  """sum_i gate[t, i] * relu(iq[t, i] . ik[s]), float32 [B, T, S], without negative zeros."""
  z_BTIS = jnp.einsum('BTIJ,BSJ->BTIS', iq_BTIJ.astype(jnp.float32), ik_BSJ.astype(jnp.float32), precision='highest')
  score_BTS = jnp.einsum('BTIS,BTI->BTS', jax.nn.relu(z_BTIS), gate_BTI.astype(jnp.float32), precision='highest')
  return score_BTS - jax.lax.stop_gradient(jnp.where(score_BTS == 0, score_BTS, 0))     # -0.0 becomes +0.0


def top_k(score_BTS, visible_BTS, k_order_BS, k) -> Selection:
  """The k-th visible key by (score descending, order ascending)."""
  score_BTS = jax.lax.stop_gradient(score_BTS)
  if k >= score_BTS.shape[-1]:
    return keep_all(score_BTS.shape[:2])
  order_BTS = jnp.broadcast_to(k_order_BS[:, None], score_BTS.shape)
  ranked_BTS = jnp.lexsort((order_BTS, jnp.where(visible_BTS, -score_BTS, jnp.inf)))
  kth_BT1 = ranked_BTS[..., k - 1:k]
  at = lambda x_BTS: jnp.take_along_axis(x_BTS, kth_BT1, -1)[..., 0]
  choose_BT = visible_BTS.sum(-1) > k
  every = keep_all(choose_BT.shape)
  return Selection(jnp.where(choose_BT, at(score_BTS), every.threshold_BT),
                   jnp.where(choose_BT, at(order_BTS), every.last_BT))


def index_select(iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, *, topk):
  visible_BTS = visible(q_segment_BT[:, :, None], k_segment_BS[:, None], q_order_BT[:, :, None], k_order_BS[:, None],
                        causal=True)
  return top_k(score(iq_BTIJ, ik_BSJ, gate_BTI), visible_BTS, k_order_BS, topk)
