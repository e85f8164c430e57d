"""The objective of pre-training, supervised fine-tuning and DSA adaptation: next token, router balance, indexer KL.

B rows, T tokens.
"""
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from keye_jax.nn import head
from keye_jax.objectives import auxiliary
from keye_jax.objectives.common import Metrics, Objective
from keye_jax.objectives.lm import by_source, next_token


def sft(layout: str, balance_weight: float, indexer_weight: float, token_stats=head.token_stats,
        sources: Sequence[str] = ()) -> Objective:
  """L = L_next_token + balance_weight * L_balance + indexer_weight * L_indexer (arXiv 2606.10651 section 2.2).

  The last two are `auxiliary.terms`.

  Args:
    layout: sharding layout of the model, `ModelConfig.layout`.
    token_stats: `nn.head.token_stats`, the one function that forms logits.
    sources: names of a mixture's sources, whose losses are metrics too.
  """
  def totals(batch) -> dict[str, jax.Array]:
    return {'weight': jnp.sum(batch.weight_BT), **auxiliary.totals(batch)}

  def loss(output, batch, totals) -> tuple[jax.Array, Metrics]:
    stats = token_stats(layout, output.hidden_BTD, output.head_DV, batch.target_BT, want=('logp', 'correct'))
    value, metrics = next_token(stats.logp_BT, batch.weight_BT, totals['weight'])
    metrics['accuracy'] = (jnp.sum(stats.correct_BT * batch.weight_BT), jnp.sum(batch.weight_BT))
    metrics |= by_source(stats.logp_BT, batch.weight_BT, batch.origin_BT, sources) if sources else {}
    beside, more = auxiliary.terms(output, batch, totals, balance_weight, indexer_weight)
    return value + beside, metrics | more

  return Objective(totals, loss)
