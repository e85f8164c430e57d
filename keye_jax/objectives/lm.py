"""Next-token prediction.

B rows, T tokens.
"""
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
  nll = jnp.sum(jnp.where(weight_BT > 0, -logp_BT * weight_BT, 0.0))
  return over(total, nll), {'loss': (nll, jnp.sum(weight_BT))}
