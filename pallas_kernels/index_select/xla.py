"""Index scores and top-k in memory linear in the sequence.

B batch, T query time, S key time, I indexer heads, J indexer head dim.
"""
import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.index_select import search
from pallas_kernels.index_select.selection import Selection, keep_all
from pallas_kernels.mask import visible


def products(iq_ITJ, ik_SJ) -> jax.Array:
  """iq . ik, float32 [I, T, S]."""
  I, T, J = iq_ITJ.shape
  return jnp.einsum('NJ,SJ->NS', iq_ITJ.reshape(I * T, J), ik_SJ, precision='highest',
                    preferred_element_type=jnp.float32).reshape(I, T, -1)


def score(z_ITS, gate_TI) -> jax.Array:
  """[T, S] from `products`; one fused loop over the heads."""
  gate_TI = gate_TI.astype(jnp.float32)
  score_TS = sum(jax.nn.relu(z_ITS[i]) * gate_TI[:, i, None] for i in range(len(z_ITS)))
  return jnp.where(score_TS == 0, 0.0, score_TS)


def select_one(iq_ITJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S, *, topk):
  mask_TS = visible(q_segment_T[:, None], k_segment_S, q_order_T[:, None], k_order_S, causal=True)
  score_TS = jnp.where(mask_TS, score(products(iq_ITJ, ik_SJ), gate_TI), -jnp.inf)
  return search.kth(score_TS, k_order_S, topk)


def index_select(iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, *, topk) -> Selection:
  B, T, I, _ = iq_BTIJ.shape
  S = ik_BSJ.shape[1]
  if topk >= S:
    return keep_all((B, T))
  def row(*a):
    return select_one(*a, topk=topk)
  return Selection(*tiles.over_rows(row, (iq_BTIJ.swapaxes(1, 2), ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS,
                                          q_order_BT, k_order_BS), I * T * S))
