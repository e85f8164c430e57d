"""Hand numbers: values a reader can check on paper."""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.objectives.balance import load_peak, router_balance
from keye_jax.objectives.indexer import indexer_kl
from keye_jax.objectives.lm import by_source, next_token
from keye_jax.objectives.sft import sft


def test_next_token_is_the_weighted_mean_of_surprise():
  logp_BT = jnp.log(jnp.array([[0.5, 0.25, 1.0], [0.125, 0.5, 0.5]]))
  weight_BT = jnp.array([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
  loss, metrics = next_token(logp_BT, weight_BT, jnp.sum(weight_BT))
  bits = 1 + 2 + 2 * 3                                 # of the three places with weight, over a weight of 4
  assert float(loss) == pytest.approx(bits * math.log(2) / 4, rel=1e-6)
  assert [float(v) for v in metrics['loss']] == pytest.approx([bits * math.log(2), 4.0])


def test_next_token_ignores_infinite_surprise_where_nothing_is_asked_and_has_no_nan_gradient():
  logp_BT, weight_BT = jnp.array([[-jnp.inf, -1.0]]), jnp.array([[0.0, 1.0]])
  value, grad = jax.value_and_grad(lambda x: next_token(x, weight_BT, jnp.float32(1))[0])(logp_BT)
  assert float(value) == 1.0 and grad.tolist() == [[0.0, -1.0]]


def test_the_losses_of_sources_are_those_of_their_targets():
  logp_BT, weight_BT = -jnp.array([[1.0, 2.0, 3.0, jnp.inf]]), jnp.array([[1.0, 0.5, 2.0, 0.0]])
  metrics = by_source(logp_BT, weight_BT, jnp.array([[1, 0, 1, 0]]), ['a', 'b', 'c'])
  assert {name: [float(v) for v in pair] for name, pair in metrics.items()} == {
      'loss/a': [1.0, 0.5], 'loss/b': [7.0, 3.0], 'loss/c': [0.0, 0.0]}


def test_a_batch_with_nothing_to_learn_costs_zero():
  loss, _ = next_token(-jnp.ones((1, 3)), jnp.zeros((1, 3)), jnp.float32(0))
  assert float(loss) == 0.0


def test_halves_of_a_batch_add_up_because_totals_are_of_the_whole():
  rng = np.random.default_rng(0)
  logp_BT, weight_BT = -rng.random((4, 5), np.float32), rng.random((4, 5), np.float32)
  total = weight_BT.sum()
  whole = next_token(logp_BT, weight_BT, total)[0]
  halves = sum(next_token(logp_BT[i::2], weight_BT[i::2], total)[0] for i in range(2))
  assert float(whole) == pytest.approx(float(halves), rel=1e-6)
  assert float(whole) == pytest.approx((-logp_BT * weight_BT).sum() / total, rel=1e-6)


def test_balance_is_a_mean_over_layers_and_rows_with_tokens():
  balance_LB = jnp.array([[1.0, 2.0, 100.0], [3.0, 4.0, 100.0]])
  loss, metrics = router_balance(balance_LB, jnp.array([1.0, 1.0, 0.0]), jnp.float32(2))
  assert float(loss) == 2.5 and [float(v) for v in metrics['balance']] == [5.0, 2.0]


def test_load_peak_counts_even_shares():
  total, layers = load_peak(jnp.array([[2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]]))
  assert float(total) == 1.0 + 4.0 and float(layers) == 2.0


def test_indexer_kl_sums_layers_averages_queries_and_leaves_padding_out():
  kl_LBT = jnp.array([[[0.5, 1.5, jnp.nan]], [[1.0, 3.0, jnp.inf]]])
  segment_BT = jnp.array([[256, 257, 0]])
  loss, metrics = indexer_kl(kl_LBT, segment_BT, jnp.float32(2))
  assert float(loss) == (0.5 + 1.5) / 2 + (1.0 + 3.0) / 2
  total, weight = (float(v) for v in metrics['indexer_kl'])
  assert total / weight == 1.5


class Aux(NamedTuple):
  balance_LB: Any = None
  load_LE: Any = None
  kl_LBT: Any = None
  dropped_L: Any = None
  recall: Any = None


class Output(NamedTuple):
  hidden_BTD: Any
  head_DV: Any
  aux: Aux
  stayed: Any = None


class Stats(NamedTuple):
  logp_BT: Any
  correct_BT: Any


class Rows(NamedTuple):
  target_BT: Any
  weight_BT: Any
  segment_BT: Any


def test_sft_adds_the_terms_the_model_produces():
  def stats(layout, hidden_BTD, head_DV, target_BT, want):
    assert (layout, set(want)) == ('train', {'logp', 'correct'})
    return Stats(jnp.log(hidden_BTD[..., 0]), jnp.ones(target_BT.shape))

  objective = sft('train', balance_weight=0.1, indexer_weight=10.0, token_stats=stats)
  batch = Rows(jnp.zeros((2, 2), int), jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.array([[256, 256], [0, 0]]))
  totals = objective.totals(batch)
  assert {k: float(v) for k, v in totals.items()} == {'weight': 1.0, 'rows': 1.0, 'queries': 2.0}
  hidden = jnp.full((2, 2, 1), math.e ** -3)
  plain, metrics = objective.loss(Output(hidden, None, Aux()), batch, totals)
  assert float(plain) == pytest.approx(3.0) and set(metrics) == {'loss', 'accuracy'}
  aux = Aux(jnp.array([[2.0, 9.0]]), jnp.ones((1, 4)), jnp.full((1, 2, 2), 0.5))
  full, metrics = objective.loss(Output(hidden, None, aux, (1.0, 8.0)), batch, totals)
  assert float(full) == pytest.approx(3.0 + 0.1 * 2.0 + 10.0 * 0.5)
  assert set(metrics) == {'loss', 'accuracy', 'balance', 'expert_peak', 'vision_stayed', 'indexer_kl'}
  assert metrics['vision_stayed'] == (1.0, 8.0)
