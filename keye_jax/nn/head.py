"""Logits, and statistics of tokens that never hold more than a chunk of them.

float32 logits of 256K tokens over the full vocabulary would be 148 GiB, so training sees them only here, chunk by
chunk and recomputed in the backward pass.

B batch, T time, N flattened tokens, D embed, V vocabulary, K top-k.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keye_jax import sharding
from keye_jax.nn.layers import product


class TokenStats(NamedTuple):
  """What was asked for; the rest is None. All float32 but the ids."""
  logp_BT: jax.Array | None = None         # log-probability of the target
  entropy_BT: jax.Array | None = None
  correct_BT: jax.Array | None = None      # 1 where no token is more likely than the target
  top_logp_BTK: jax.Array | None = None
  top_id_BTK: jax.Array | None = None


def logits(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
  """float32 [B, T, V]."""
  return jnp.einsum('BTD,DV->BTV', hidden_BTD, head_DV, preferred_element_type=jnp.float32)


def token_stats(layout: str, hidden_BTD: jax.Array, head_DV: jax.Array, target_BT: jax.Array,
                want: tuple[str, ...] = ('logp',), top: int = 0, chunk: int = 4096) -> TokenStats:
  """Statistics of the next-token distribution at every place.

  want: of 'logp', 'entropy', 'correct', 'top' (with `top` entries). chunk: tokens whose logits exist at a time on a
  device. Differentiable in hidden and head through logp and entropy.
  """
  names = {'logp': ('logp_BT',), 'entropy': ('entropy_BT',), 'correct': ('correct_BT',),
           'top': ('top_logp_BTK', 'top_id_BTK')}
  fields = tuple(f for w in want for f in names[w])

  def one(h_ND, head_DV, target_N):
    z_NV = product(h_ND, head_DV, dtype='float32')
    lse_N = jax.nn.logsumexp(z_NV, -1)
    hit_NV = jnp.arange(z_NV.shape[-1], dtype=target_N.dtype) == target_N[:, None]
    hit_N = jnp.where(hit_NV, z_NV, 0).sum(-1)
    out = {}
    if 'logp' in want:
      out['logp_BT'] = hit_N - lse_N
    if 'entropy' in want:
      p_NV = jnp.exp(z_NV - lse_N[:, None])
      out['entropy_BT'] = lse_N - (p_NV * z_NV).sum(-1)
    if 'correct' in want:
      out['correct_BT'] = (hit_N >= z_NV.max(-1)).astype(jnp.float32)
    if 'top' in want:
      value, index = jax.lax.top_k(z_NV, top)
      out['top_logp_BTK'], out['top_id_BTK'] = value - lse_N[:, None], index
    return tuple(out[f] for f in fields)

  def fn(hidden_BTD, head_DV, target_BT):
    B, T, D = hidden_BTD.shape
    N, n = B * T, min(chunk, B * T)
    pad = -N % n
    h = jnp.pad(hidden_BTD.reshape(N, D), ((0, pad), (0, 0))).reshape(-1, n, D)
    t = jnp.pad(target_BT.reshape(N), (0, pad)).reshape(-1, n)
    if len(h) == 1:
      stacked = jax.tree.map(lambda a: a[None], one(h[0], head_DV, t[0]))
    else:
      stacked = jax.lax.map(lambda x: jax.checkpoint(one)(x[0], head_DV, x[1]), (h, t))
    return jax.tree.map(lambda a: a.reshape(N + pad, *a.shape[2:])[:N].reshape(B, T, *a.shape[2:]), stacked)

  tokens = ('batch', 'seq')
  out_axes = tuple(tokens + (None,) * (f.endswith('K')) for f in fields)
  values = sharding.local(fn, layout, (tokens + (None,), (None, None), tokens), out_axes)(
      hidden_BTD, head_DV, target_BT)
  return TokenStats(**dict(zip(fields, values)))
