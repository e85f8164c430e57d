"""The indexer's loss while attention is still dense: KL of its softmax against the head-averaged attention.

B batch, T query time, S key time, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim.
"""
import jax

from pallas_kernels import dispatch
from pallas_kernels.dense_attention import implementation_of
from pallas_kernels.indexer_warmup import gpu, reference, tpu, xla

IMPLEMENTATIONS = {'reference': reference.indexer_warmup, 'xla': xla.indexer_warmup, 'tpu': tpu.indexer_warmup,
                   'gpu': gpu.indexer_warmup}


def indexer_warmup(q_BTHK: jax.Array, k_BSGK: jax.Array, lse_BTH: jax.Array, iq_BTIJ: jax.Array, ik_BSJ: jax.Array,
                   gate_BTI: jax.Array, q_segment_BT: jax.Array, k_segment_BS: jax.Array, q_order_BT: jax.Array,
                   k_order_BS: jax.Array, *, scale: float | None = None,
                   implementation: dispatch.Implementation | None = None) -> jax.Array:
  """KL(p || softmax(score)) over all visible keys, float32 [B, T] (arXiv 2606.10651 §2, `L_warm`; 2512.02556 eq. 3).

  p is the mean over heads of exp(scale * q . k - lse), with lse that of `dense_attention` on the same arguments; score
  is that of `pallas_kernels.index_select`. Differentiates iq, ik and gate only, with the closed form
  (softmax(score) - p) * cotangent. A query that sees nothing has KL 0.
  """
  run = IMPLEMENTATIONS[implementation_of('indexer_warmup', q_BTHK.shape[1], k_BSGK.shape[1], implementation)]
  return run(*jax.lax.stop_gradient((q_BTHK, k_BSGK, lse_BTH)), iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS,
             q_order_BT, k_order_BS, scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale)
