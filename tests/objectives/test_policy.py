"""Policy objectives: numbers by hand, one response after the other in float64 with finite differences, invariances."""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.schema import PolicyBatch
from keye_jax.nn.decoder import Aux
from keye_jax.objectives.policy import GRPO_CLIP, GSPO_CLIP, group_advantage, grpo, gspo
from tests.tolerances import assert_close

WIDE = (0.5, 0.5)


class Rows(NamedTuple):
  target_BT: Any
  segment_BT: Any


class Output(NamedTuple):
  hidden_BTD: Any            # here the log-probabilities themselves, [B, T]
  head_DV: Any = None
  aux: Any = Aux(None, None, None, None, None)
  stayed: Any = None


class Stats(NamedTuple):
  logp_BT: Any
  entropy_BT: Any


def stats(layout, logp_BT, head_DV, target_BT, want):
  assert (layout, set(want)) == ('train', {'logp', 'entropy'})
  return Stats(logp_BT, -2 * logp_BT)


def rows(old_logp_BT, sequence_BT, advantage_BM) -> PolicyBatch:
  sequence_BT = np.asarray(sequence_BT, np.int32)
  return PolicyBatch(Rows(np.zeros_like(sequence_BT), np.full_like(sequence_BT, 256)),
                     np.asarray(old_logp_BT, np.float32), sequence_BT, np.asarray(advantage_BM, np.float32))


@functools.partial(jax.jit, static_argnums=0)
def step(algorithm, clip, logp_BT, batch, of=None):
  """(loss, its gradient by log-probabilities, metrics). clip: an argument, so that all clips share a program. of: the
  batch that the denominators are of."""
  objective = algorithm('train', 0.0, 0.0, clip, stats)
  totals = objective.totals(batch if of is None else of)
  (loss, metrics), grad_BT = jax.value_and_grad(
      lambda logp_BT: objective.loss(Output(logp_BT), batch, totals), has_aux=True)(logp_BT)
  return loss, grad_BT, metrics


def packed(seed: int = 0, noise: float = 0.3):
  """(log-probabilities, batch): five responses in two rows of ten tokens, their tokens mixed as devices that share a
  row hold them, and prompts in which nothing is finite."""
  rng = np.random.default_rng(seed)
  sequence_BT = np.array([rng.permutation([0] * 3 + [1] + [2] * 4 + [-1] * 2),
                          rng.permutation([1] * 2 + [3] * 5 + [-1] * 3)])
  logp_BT = -3 * rng.random((2, 10))
  old_BT = logp_BT + noise * rng.normal(size=(2, 10))
  logp_BT[sequence_BT < 0], old_BT[sequence_BT < 0] = np.nan, -np.inf
  advantage_BM = np.array([[1.2, -0.7, 0.4, 50.0], [7.0, 0.9, -30.0, -1.3]])     # of absent ones too
  return logp_BT, rows(old_BT, sequence_BT, advantage_BM)


def by_loop(name: str, clip, logp_BT, batch: PolicyBatch) -> tuple[float, dict[str, float]]:
  """(loss, metrics) in float64, one response after the other."""
  values, ratios, clipped, kl, entropy = [], [], [], [], []
  for b, row in enumerate(batch.sequence_BT):
    for m, A in enumerate(batch.advantage_BM[b].astype(np.float64)):
      at = np.flatnonzero(row == m)
      if not len(at):
        continue
      apart = [float(logp_BT[b, t]) - float(batch.old_logp_BT[b, t]) for t in at]
      kl += [math.exp(d) - 1 - d for d in apart]
      entropy += [-2 * float(logp_BT[b, t]) for t in at]
      each = [math.exp(sum(apart) / len(at))] if name == 'gspo' else [math.exp(d) for d in apart]
      pairs = [(r * A, min(max(r, 1 - clip[0]), 1 + clip[1]) * A) for r in each]
      values.append(sum(map(min, pairs)) / len(each))
      clipped.append(sum(held < free for free, held in pairs) / len(each))
      ratios.append(each)
  mean = lambda x: sum(x) / len(x)
  return -mean(values), {'loss': -mean(values), 'ratio': mean([mean(each) for each in ratios]),
                         'ratio_min': min(map(min, ratios)), 'ratio_max': max(map(max, ratios)),
                         'clipped': mean(clipped), 'kl': mean(kl), 'entropy': mean(entropy)}


ALGORITHMS = {'gspo': gspo, 'grpo': grpo}
BOTH = pytest.mark.parametrize('name', ALGORITHMS)


def test_advantages_are_rewards_in_spreads_from_the_mean_of_their_group():
  got_PG = np.asarray(group_advantage(jnp.array([[1.0, 0.0, 0.0, 1.0], [0.1] * 4, [3.0, 1.0, 2.0, 2.0]]), delta=0.5))
  assert_close(got_PG[0], np.array([1, -1, -1, 1]) * 0.5 / (0.5 + 0.5))
  assert not got_PG[1].any()
  assert_close(got_PG[2], np.array([1, -1, 0, 0]) / (math.sqrt(0.5) + 0.5))


def test_two_responses_by_hand():
  """s = sqrt(2) with A = 2 is inside of the clip; s = 1/4 with A = -1 is not, its value stays at -1/2."""
  logp_BT = jnp.log(jnp.array([[1.0, 0.5, 0.5, 0.125, 0.125]]))
  batch = rows(np.log([[0.1, 0.25, 0.5, 0.5, 0.5]]), [[-1, 0, 0, 1, 1]], [[2.0, -1.0]])
  loss, grad_BT, metrics = step(gspo, WIDE, logp_BT, batch)
  value = 2 * math.sqrt(2)
  assert float(loss) == pytest.approx(-(value - 0.5) / 2, rel=1e-6)
  assert grad_BT[0].tolist() == pytest.approx([0, -value / 2 / 2, -value / 2 / 2, 0, 0], rel=1e-6)
  mean = {name: float(s / w) for name, (s, w) in metrics.items()}
  assert mean == pytest.approx({
      'loss': -(value - 0.5) / 2, 'ratio': (math.sqrt(2) + 0.25) / 2, 'ratio_min': 0.25, 'ratio_max': math.sqrt(2),
      'clipped': 0.5, 'advantage': 0.5, 'response_tokens': 2,
      'kl': ((2 - 1 - math.log(2)) + 0 + 2 * (0.25 - 1 + math.log(4))) / 4,
      'entropy': 2 * (1 + 1 + 3 + 3) * math.log(2) / 4}, rel=1e-5)


@BOTH
@pytest.mark.parametrize('clip', [WIDE, (0.1, 0.15)])
def test_loss_metrics_and_gradient_are_those_of_a_loop_in_float64(name, clip):
  logp_BT, batch = packed()
  logp_BT = logp_BT.astype(np.float32).astype(np.float64)           # what both sides can hold
  loss, grad_BT, metrics = step(ALGORITHMS[name], clip, logp_BT.astype(np.float32), batch)
  expected, means = by_loop(name, clip, logp_BT, batch)
  assert_close(loss, expected, what='loss')
  for key, mean in means.items():
    assert_close(metrics[key][0] / metrics[key][1], mean, what=key)
  assert means['clipped'] > 0 if clip != WIDE else means['clipped'] < 0.3
  moved, h = np.zeros_like(logp_BT), 1e-6
  for at in np.argwhere(batch.sequence_BT >= 0):
    up, down = logp_BT.copy(), logp_BT.copy()
    up[*at] += h
    down[*at] -= h
    moved[*at] = (by_loop(name, clip, up, batch)[0] - by_loop(name, clip, down, batch)[0]) / (2 * h)
  assert_close(grad_BT, moved, what='gradient')


@BOTH
def test_packed_is_unpacked(name):
  logp_BT, batch = packed()
  loss, grad_BT, _ = step(ALGORITHMS[name], WIDE, logp_BT.astype(np.float32), batch)
  places = [(b, batch.sequence_BT[b] == m, m) for b in range(2) for m in range(4) if (batch.sequence_BT[b] == m).any()]

  def alone(x_BT, fill):
    return np.array([[*x_BT[b][at], *[fill] * (10 - at.sum())] for b, at, _ in places])
  one = rows(alone(batch.old_logp_BT, 0.0), alone(np.zeros((2, 10)), -1),
             [[batch.advantage_BM[b, m]] for b, _, m in places])
  loss1, grad1_BT, _ = step(ALGORITHMS[name], WIDE, alone(logp_BT, 0.0).astype(np.float32), one)
  assert_close(loss1, loss)
  assert_close(grad1_BT, alone(np.asarray(grad_BT), 0.0))


@BOTH
def test_rows_add_up_because_totals_are_of_the_whole(name):
  logp_BT, batch = packed()
  whole, grad_BT, metrics = step(ALGORITHMS[name], WIDE, logp_BT.astype(np.float32), batch)
  parts = [step(ALGORITHMS[name], WIDE, logp_BT[i:i + 1].astype(np.float32),
                jax.tree.map(lambda x, i=i: x[i:i + 1], batch), batch) for i in range(2)]
  assert_close(sum(p[0] for p in parts), whole)
  assert_close(np.concatenate([p[1] for p in parts]), grad_BT)
  for key in metrics.keys() - {'ratio_min', 'ratio_max'}:           # statistics of each micro-batch
    assert_close(sum(p[2][key][0] for p in parts), metrics[key][0], what=key)


@BOTH
def test_what_the_policy_itself_said_has_the_plain_policy_gradient(name):
  """Ratio 1, on neither side of the clip: the gradient is -A / (tokens of the response x responses)."""
  logp_BT, batch = packed(noise=0)
  logp_BT = logp_BT.astype(np.float32)
  clip = {'gspo': GSPO_CLIP, 'grpo': GRPO_CLIP}[name]
  loss, grad_BT, metrics = step(ALGORITHMS[name], clip, logp_BT, batch)
  there = [(b, m) for b in range(2) for m in range(4) if (batch.sequence_BT[b] == m).any()]
  assert_close(loss, -np.mean([batch.advantage_BM[at] for at in there]))
  expected_BT = np.zeros((2, 10))
  for b, m in there:
    at = batch.sequence_BT[b] == m
    expected_BT[b, at] = -batch.advantage_BM[b, m] / at.sum() / len(there)
  assert_close(grad_BT, expected_BT)
  assert [float(metrics[k][0]) for k in ('clipped', 'kl')] == [0, 0] and float(metrics['ratio_max'][0]) == 1


@BOTH
def test_no_advantage_no_gradient(name):
  logp_BT, batch = packed()
  loss, grad_BT, _ = step(ALGORITHMS[name], WIDE, logp_BT.astype(np.float32),
                          batch._replace(advantage_BM=np.zeros_like(batch.advantage_BM)))
  assert float(loss) == 0 and not np.asarray(grad_BT).any()


@BOTH
@pytest.mark.parametrize('advantage, shift, moves', [
    (1, 0.3, False), (1, -0.3, True), (-1, 0.3, True), (-1, -0.3, False)])
def test_the_clip_ends_what_went_far_enough_and_nothing_else(name, advantage, shift, moves):
  logp_BT, batch = packed(noise=0)
  batch = batch._replace(old_logp_BT=batch.old_logp_BT - np.float32(shift),
                         advantage_BM=np.full_like(batch.advantage_BM, advantage))
  _, grad_BT, metrics = step(ALGORITHMS[name], (0.1, 0.1), logp_BT.astype(np.float32), batch)
  assert (np.asarray(grad_BT) != 0).tolist() == ((batch.sequence_BT >= 0) & moves).tolist()
  assert float(metrics['clipped'][0] / metrics['clipped'][1]) == (0 if moves else 1)


def test_a_batch_without_a_response_costs_nothing():
  logp_BT, batch = packed()
  batch = batch._replace(sequence_BT=np.full_like(batch.sequence_BT, -1))
  loss, grad_BT, metrics = step(gspo, WIDE, logp_BT.astype(np.float32), batch)
  assert float(loss) == 0 and not np.asarray(grad_BT).any()
  assert all(np.isfinite(s) for s, _ in metrics.values()) and float(metrics['loss'][1]) == 0


def test_router_and_indexer_are_beside_it():
  logp_BT, batch = packed(noise=0)
  aux = Aux(jnp.array([[2.0, 4.0]]), jnp.ones((1, 4)), jnp.full((1, 2, 10), 0.5), None, None)
  with_them, without = (gspo('train', *weights, WIDE, stats) for weights in ((0.1, 10.0), (0.0, 0.0)))
  out = Output(jnp.asarray(logp_BT, jnp.float32), aux=aux)
  totals = with_them.totals(batch)
  (more, metrics), (less, _) = with_them.loss(out, batch, totals), without.loss(out, batch, totals)
  assert float(more - less) == pytest.approx(0.1 * 3 + 10 * 0.5, rel=1e-6)
  assert {'balance', 'expert_peak', 'indexer_kl'} < metrics.keys()
