"""Next-token prediction.

B rows, T tokens.
"""
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from keye_jax.objectives.common import Metrics, over


def next_token(logp_BT: jax.Array, weight_BT: jax.Array, total: jax.Array) -> tuple[jax.Array, Metrics]:
  """Weighted negative log-likelihood, L = -sum_bt w_bt log p(target_bt) / total.

  Args:
    logp_BT: float32 log-probability (nats) of each target under the model.
    weight_BT: float32 loss weight of each target; 0 on prompts and padding. Non-finite log-probabilities at weight 0
      do not count.
    total: sum of the weights of the whole batch, all micro-batches together (nats become nats per target).
  """
  nll = jnp.sum(losses(logp_BT, weight_BT))
  return over(total, nll), {'loss': (nll, jnp.sum(weight_BT))}


def losses(logp_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
  """Weighted nats of each target, [B, T]."""
  return jnp.where(weight_BT > 0, -logp_BT * weight_BT, 0.0)


def by_source(logp_BT: jax.Array, weight_BT: jax.Array, origin_BT: jax.Array, sources: Sequence[str]) -> Metrics:
  """'loss/NAME': the loss over the targets of each source of a mixture. sources: their names, in the order that
  `origin_BT` counts them."""
  mine = lambda x_BT, i: jnp.sum(jnp.where(origin_BT == i, x_BT, 0.0))
  nll_BT = losses(logp_BT, weight_BT)
  return {f'loss/{name}': (mine(nll_BT, i), mine(weight_BT, i)) for i, name in enumerate(sources)}
