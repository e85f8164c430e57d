"""The objective of pre-training, supervised fine-tuning and DSA adaptation: next token, router balance, indexer KL.

B rows, T tokens, L layers, E experts.
"""
import jax
import jax.numpy as jnp

from keye_jax.nn import head
from keye_jax.objectives.balance import load_peak, router_balance
from keye_jax.objectives.common import Metrics, Objective
from keye_jax.objectives.indexer import indexer_kl
from keye_jax.objectives.lm import next_token


def sft(layout: str, balance_weight: float, indexer_weight: float, token_stats=head.token_stats) -> Objective:
  """L = L_next_token + balance_weight * L_balance + indexer_weight * L_indexer (arXiv 2606.10651 section 2.2).

  A term whose auxiliary value the model does not produce (no experts, no indexer) is absent. The KL has gradients in
  the indexer's parameters alone, which are an optimizer group of their own: it never scales the language model's step.

  Args:
    layout: sharding layout of the model, `ModelConfig.layout`.
    token_stats: `nn.head.token_stats`, the one function that forms logits.
  """
  def totals(batch) -> dict[str, jax.Array]:
    real_BT = batch.segment_BT != 0
    return {'weight': jnp.sum(batch.weight_BT), 'rows': jnp.sum(row_weight(batch)),
            'queries': jnp.sum(real_BT, dtype=jnp.float32)}

  def loss(output, batch, totals) -> tuple[jax.Array, Metrics]:
    aux = output.aux
    stats = token_stats(layout, output.hidden_BTD, output.head_DV, batch.target_BT, want=('logp', 'correct'))
    value, metrics = next_token(stats.logp_BT, batch.weight_BT, totals['weight'])
    metrics['accuracy'] = (jnp.sum(stats.correct_BT * batch.weight_BT), jnp.sum(batch.weight_BT))
    if aux.balance_LB is not None:
      term, more = router_balance(aux.balance_LB, row_weight(batch), totals['rows'])
      value, metrics = value + balance_weight * term, metrics | more | {'expert_peak': load_peak(aux.load_LE)}
    if aux.dropped_L is not None:
      metrics['experts_dropped'] = jnp.sum(aux.dropped_L), jnp.sum(aux.load_LE)
    if output.stayed is not None:
      metrics['vision_stayed'] = tuple(output.stayed)
    if aux.kl_LBT is not None:
      term, more = indexer_kl(aux.kl_LBT, batch.segment_BT, totals['queries'])
      value, metrics = value + indexer_weight * term, metrics | more
    return value, metrics

  return Objective(totals, loss)


def row_weight(batch) -> jax.Array:
  """float32 [B]: 1 where the row holds a token."""
  return jnp.any(batch.segment_BT != 0, axis=1).astype(jnp.float32)
