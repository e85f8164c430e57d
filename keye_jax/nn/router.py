"""Top-k softmax router and its load balance.

B batch, T time, D embed, E experts, K experts per token.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
  expert_BTK: jax.Array      # int32; E for padding, which no expert computes
  weight_BTK: jax.Array      # float32, sums to 1 over K
  balance_B: jax.Array       # float32
  load_E: jax.Array          # float32, tokens routed to each expert


def route(x_BTD: jax.Array, router_DE: jax.Array, top_k: int, valid_BT: jax.Array) -> Routing:
  """softmax over experts, top-k (lowest index first on ties), renormalised.

  balance = E * sum_e f_e P_e for each row, with f_e the picks of expert e per valid token (summing to K over
  experts) and P_e the mean router probability: `load_balancing_loss_func` of Hugging Face, taken row by row.
  """
  E = router_DE.shape[-1]
  logits_BTE = jnp.einsum('BTD,DE->BTE', x_BTD.astype(jnp.float32), router_DE.astype(jnp.float32),
                          precision=jax.lax.Precision.HIGHEST)
  p_BTE = jax.nn.softmax(logits_BTE)
  expert_BTK = top_indices(jax.lax.stop_gradient(p_BTE), top_k)
  picked_BTKE = expert_BTK[..., None] == jnp.arange(E)
  weight_BTK = jnp.where(picked_BTKE, p_BTE[:, :, None], 0).sum(-1)
  weight_BTK = weight_BTK / weight_BTK.sum(-1, keepdims=True)

  valid_BT1 = valid_BT[..., None].astype(jnp.float32)
  picks_BTE = picked_BTKE.any(2) * valid_BT1
  tokens_B1 = jnp.maximum(valid_BT1.sum(1), 1)
  balance_B = E * (picks_BTE.sum(1) / tokens_B1 * ((p_BTE * valid_BT1).sum(1) / tokens_B1)).sum(-1)
  return Routing(jnp.where(valid_BT[..., None], expert_BTK, E), weight_BTK, balance_B, picks_BTE.sum((0, 1)))


def top_indices(p_E: jax.Array, k: int) -> jax.Array:
  """Indices of the k largest of the last axis, largest first, lowest index first on ties; k rounds of argmax,
  which a CPU does faster than `lax.top_k` for the few experts of a token."""
  picked = []
  for _ in range(k):
    best = jnp.argmax(p_E, -1)
    picked.append(best)
    p_E = jnp.where(jnp.arange(p_E.shape[-1]) == best[..., None], -1.0, p_E)
  return jnp.stack(picked, -1).astype(jnp.int32)
