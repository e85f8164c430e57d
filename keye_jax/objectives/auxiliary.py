"""What every objective of the language model adds for the parts that train beside it: router balance, indexer KL.

B rows, T tokens, L layers, E experts.
"""
import jax
import jax.numpy as jnp

from keye_jax.objectives.balance import load_peak, router_balance
from keye_jax.objectives.common import Metrics
from keye_jax.objectives.indexer import indexer_kl


def totals(batch) -> dict[str, jax.Array]:
  """Denominators of `terms`: rows that hold a token, tokens that are not padding."""
  return {'rows': jnp.sum(row_weight(batch)), 'queries': jnp.sum(batch.segment_BT != 0, dtype=jnp.float32)}


def terms(output, batch, totals, balance_weight: float, indexer_weight: float) -> tuple[jax.Array | float, Metrics]:
  """balance_weight * L_balance + indexer_weight * L_indexer (arXiv 2606.10651 section 2.2), and metrics.

  A term whose auxiliary value the model does not produce (no experts, no indexer) is absent. The KL has gradients in
  the indexer's parameters alone, which are an optimizer group of their own: it never scales the language model's step.
  """
  aux, value, metrics = output.aux, 0.0, {}
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
  if aux.recall is not None:
    metrics['indexer_recall'] = jnp.sum(aux.recall.mass_BN * aux.recall.counts_BN), jnp.sum(aux.recall.counts_BN)
  return value, metrics


def row_weight(batch) -> jax.Array:
  """float32 [B]: 1 where the row holds a token."""
  return jnp.any(batch.segment_BT != 0, axis=1).astype(jnp.float32)
