"""Dense attention of others, which `keye bench attention` times beside ours on a GPU.

    cudnn      jax.nn.dot_product_attention through cuDNN, with its causal mask in prefill and without one in decoding
    tokamax    tokamax.dot_product_attention where it is installed: on a Hopper its Mosaic kernel
    einsum     decoding only: two products and a softmax, caches with heads first, which cuBLAS reads without a copy
    pallas     decoding only: jax's flash decoding kernel in Pallas (jax.experimental.pallas.ops.gpu), heads first

B sequences, T query time, S key time, H query heads, G KV heads, M query heads of a KV head, K head dim.
"""
import importlib.util

import jax
import jax.numpy as jnp


def missing() -> dict[str, str]:
  """Peers that cannot be measured here, and why."""
  return {} if importlib.util.find_spec('tokamax') else {'tokamax': 'the package is not installed'}


def cudnn(q_BTHK, k_BSGK, v_BSGK):
  """o_BTHK, causal."""
  return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, is_causal=True, implementation='cudnn')


def tokamax(q_BTHK, k_BSGK, v_BSGK):
  """The same."""
  from tokamax import dot_product_attention
  return dot_product_attention(q_BTHK, k_BSGK, v_BSGK, is_causal=True, implementation=('mosaic', 'triton'))


PREFILL = {'cudnn': cudnn, 'tokamax': tokamax}


def cudnn_decode(q_BTHK, k_BSGK, v_BSGK):
  """o_BTHK of one new token that sees every key."""
  return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, implementation='cudnn')


def einsum(q_BTHK, k_BGSK, v_BGSK):
  """The same with heads first; float32 logits, probabilities in the dtype of v."""
  B, _, H, K = q_BTHK.shape
  q_BGMK = q_BTHK.reshape(B, k_BGSK.shape[1], -1, K)
  x_BGMS = jnp.einsum('BGMK,BGSK->BGMS', q_BGMK, k_BGSK, preferred_element_type=jnp.float32) * K ** -0.5
  p_BGMS = jax.nn.softmax(x_BGMS, axis=-1).astype(v_BGSK.dtype)
  return jnp.einsum('BGMS,BGSK->BGMK', p_BGMS, v_BGSK).reshape(B, 1, H, K)


def pallas(q_BTHK, k_BGSK, v_BGSK, interpret: bool = False):
  """The same; each KV head of a sequence is one with a single KV head, whose keys 16 programs share."""
  from jax.experimental.pallas.ops.gpu import decode_attention
  (B, _, H, K), (_, G, S, _) = q_BTHK.shape, k_BGSK.shape
  merge = lambda x: x.reshape(B * G, -1, K)
  o = decode_attention.mqa(merge(q_BTHK), merge(k_BGSK), merge(v_BGSK), block_k=128, k_splits=min(16, S // 16),
                           interpret=interpret)
  return o.reshape(B, 1, H, K)


HEADS_FIRST = {'einsum': einsum, 'pallas': pallas}
