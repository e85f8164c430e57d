"""Sparse attention as its definition: dense attention under the mask of the selected keys.

B batch, T queries, S keys, H heads, G KV heads, K head dim, I indexer heads, J indexer head dim.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.dense_attention.reference import attend, logits
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.index_select.reference import score, top_k
from pallas_kernels.index_select.selection import selected
from pallas_kernels.mask import NEG_INF, visible


def kl(score_BTS, q_BTHK, k_BSGK, lse_BTH, mask_BTS, scale):
  """KL(p || softmax(score)) over the mask, [B, T]; p is the head mean of the attention probabilities, held constant."""
  x_BTHS = jnp.where(mask_BTS[:, :, None], logits(q_BTHK, k_BSGK, scale) - lse_BTH[..., None], NEG_INF)
  p_BTS = jax.lax.stop_gradient(jnp.exp(x_BTHS).mean(2))
  log_q_BTS = jnp.where(mask_BTS, jax.nn.log_softmax(jnp.where(mask_BTS, score_BTS, NEG_INF), axis=-1), 0)
  return (jax.scipy.special.xlogy(p_BTS, p_BTS) - p_BTS * log_q_BTS).sum(-1)


def dsa_attention(q_BTHK, k_BSGK, v_BSGK, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT,
                  k_order_BS, *, topk, scale, selection, want_kl, way) -> DSAOutput:
  del way       # all keys under a mask, the definition of both
  mask_BTS = visible(q_segment_BT[:, :, None], k_segment_BS[:, None], q_order_BT[:, :, None], k_order_BS[:, None],
                     causal=True)
  score_BTS = score(iq_BTIJ, ik_BSJ, gate_BTI)
  if selection is None:
    selection = top_k(score_BTS, mask_BTS, k_order_BS, topk)
  mask_BTS &= selected(jax.lax.stop_gradient(score_BTS), k_order_BS[:, None], selection.threshold_BT[..., None],
                       selection.last_BT[..., None])
  o_BTHK, lse_BTH = attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, scale)
  kl_BT = kl(score_BTS, q_BTHK, k_BSGK, lse_BTH, mask_BTS, scale) if want_kl else None
  return DSAOutput(o_BTHK, lse_BTH, kl_BT, selection)
