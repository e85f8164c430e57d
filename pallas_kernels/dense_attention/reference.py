"""Dense attention as its definition: one T x S matrix. B batch, T queries, S keys, H heads, G KV heads, K head dim."""
import jax
import jax.numpy as jnp

from pallas_kernels.mask import NEG_INF, visible


def logits(q_BTHK, k_BSGK, scale):
  """[B, T, H, S] float32, unmasked."""
  H, G = q_BTHK.shape[2], k_BSGK.shape[2]
  k_BSHK = jnp.repeat(k_BSGK.astype(jnp.float32), H // G, axis=2)
  return jnp.einsum('BTHK,BSHK->BTHS', q_BTHK.astype(jnp.float32), k_BSHK, precision='highest') * scale


def attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, scale):
  """Softmax attention under any mask: (o_BTHK, lse_BTH)."""
  H, G = q_BTHK.shape[2], k_BSGK.shape[2]
  mask_BT1S = mask_BTS[:, :, None]
  x_BTHS = jnp.where(mask_BT1S, logits(q_BTHK, k_BSGK, scale), NEG_INF)
  p_BTHS = jnp.where(mask_BT1S, jax.nn.softmax(x_BTHS, axis=-1), 0)       # a row that sees nothing is all 0
  v_BSHK = jnp.repeat(v_BSGK.astype(jnp.float32), H // G, axis=2)
  o_BTHK = jnp.einsum('BTHS,BSHK->BTHK', p_BTHS, v_BSHK, precision='highest')
  lse_BTH = jnp.where(mask_BT1S.any(-1), jax.nn.logsumexp(x_BTHS, axis=-1), NEG_INF)
  return o_BTHK.astype(q_BTHK.dtype), jax.lax.stop_gradient(lse_BTH)


def dense_attention(q_BTHK, k_BSGK, v_BSGK, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, *, causal, scale):
  mask_BTS = visible(q_segment_BT[:, :, None], k_segment_BS[:, None], q_order_BT[:, :, None], k_order_BS[:, None],
                     causal)
  return attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, scale)
