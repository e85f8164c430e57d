"""Softmax attention over all visible keys, grouped queries, segments, any layout of the sequence.

B batch, T query time, S key time, H query heads, G KV heads, K head dim.
"""
import jax

from pallas_kernels import dispatch
from pallas_kernels.dense_attention import gpu, reference, tpu, xla

IMPLEMENTATIONS = {'reference': reference.dense_attention, 'xla': xla.dense_attention, 'tpu': tpu.dense_attention,
                   'gpu': gpu.dense_attention}


def dense_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, q_segment_BT: jax.Array,
                    k_segment_BS: jax.Array, q_order_BT: jax.Array, k_order_BS: jax.Array, *, causal: bool = True,
                    scale: float | None = None,
                    implementation: dispatch.Implementation | None = None) -> tuple[jax.Array, jax.Array]:
  """Attention of each query over the keys that `pallas_kernels.mask.visible` allows.

  Query head h reads KV head h // (H // G). Segments and orders are int32. `scale` multiplies the logits, K**-0.5 by
  default. Softmax statistics and accumulation are float32 whatever the inputs.

  Returns (o_BTHK in the dtype of q, lse_BTH float32: log of the sum of exp(logits)). A query that sees nothing gets
  o = 0 and lse = NEG_INF (-1e30, finite). o is differentiable in q, k and v; lse is not differentiated.
  Raises ValueError for an unknown implementation or for H not a multiple of G.
  """
  H, G = q_BTHK.shape[2], k_BSGK.shape[2]
  if H % G:
    raise ValueError(f'dense_attention: {H} query heads are not a multiple of {G} KV heads')
  run = IMPLEMENTATIONS[implementation_of('dense_attention', q_BTHK.shape[1], k_BSGK.shape[1], implementation)]
  return run(q_BTHK, k_BSGK, v_BSGK, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, causal=causal,
             scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale)


def implementation_of(op: str, T: int, S: int, implementation: dispatch.Implementation | None = None) -> str:
  """Name of the implementation of an op on dense attention, for rows of T queries and S keys; None asks for the best
  one. Kernels are for rows of more than one tile."""
  name = dispatch.choose(op, implementation)
  return 'xla' if implementation is None and xla.is_small(T, S) else name
