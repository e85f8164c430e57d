import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from keye_jax.config import OptimizerConfig
from keye_jax.steps import state as state_lib
from keye_jax.steps.optimizer import make_optimizer
from keye_jax.steps.update import make_update
from tests.steps import toy
from tests.tolerances import assert_close

OPT = OptimizerConfig(clip_norm=0.5, indexer_clip_norm=0.5)
RATES = {'model': 0.01, 'indexer': 0.02}


@functools.cache
def compiled(cfg, accumulate, apply, **weights):
  tx = make_optimizer(cfg) if cfg else optax.sgd(1.0)
  return make_update(apply, toy.objective(**weights), tx, accumulate), tx


def run(batches, freeze=(), accumulate=1, cfg=OPT, apply=toy.apply, **weights):
  update, tx = compiled(cfg, accumulate, apply, **weights)
  state = state_lib.create(toy.init(), tx, freeze, 'float32', jax.random.key(0))
  history = []
  for batch in batches:
    state, metrics = update(state, batch, RATES)
    history.append({k: (float(s), float(w)) for k, (s, w) in metrics.items()})
  return state, history


def assert_same(a, b, exact=False):
  for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b)):
    if exact:
      np.testing.assert_array_equal(x, y, err_msg=str(path))
    else:
      assert_close(x, y, what=str(path))


def test_it_learns():
  _, history = run([toy.batch()] * 20)
  losses = [h['loss'][0] / h['loss'][1] for h in history]
  assert losses[-1] < 0.7 * losses[0]
  assert history[0]['loss'][1] == toy.batch().weight_BT.sum()


def test_accumulation_is_the_same_gradient():
  start = toy.init()
  (whole, [one]), (parts, [many]) = (run([toy.batch()], accumulate=n, cfg=None) for n in (1, 8))
  step = lambda state: jax.tree.map(lambda a, b: a - b, state.train, start)
  assert_same(step(parts), step(whole))
  assert one.keys() == many.keys()
  for name in set(one) - {'expert_peak'}:             # a statistic of each micro-batch
    assert many[name][0] / many[name][1] == pytest.approx(one[name][0] / one[name][1], rel=1e-5), name


def test_accumulation_that_does_not_divide_the_batch_is_refused():
  with pytest.raises(ValueError, match='train.batch = 8 rows cannot be cut into train.accumulate = 3'):
    run([toy.batch()], accumulate=3)


def test_frozen_parts_do_not_move_and_survive_donation():
  start = toy.init()
  state, _ = run([toy.batch(seed=i) for i in range(3)], freeze=('vision', 'embed'))
  assert_same(state.frozen, {'embed': start['embed'], 'vision': start['vision']}, exact=True)
  everything, _ = run([toy.batch()])
  assert not np.array_equal(everything.train['embed'], start['embed'])


def test_the_indexer_loss_does_not_change_the_models_step():
  batches = [toy.batch(seed=i) for i in range(3)]
  huge, _ = run(batches, indexer_weight=1e4)
  without, _ = run(batches, indexer_weight=0.0)
  for state in (huge, without):
    state.train['layers']['attn'].pop('indexer')
  assert_same(huge.train, without.train, exact=True)


def test_the_indexer_learns_from_its_kl_alone():
  start = toy.init()['layers']['attn']['indexer']
  moved, _ = run([toy.batch()])
  still, _ = run([toy.batch()], indexer_weight=0.0)
  decay = 1 - RATES['indexer'] * OPT.weight_decay
  assert_close(still.train['layers']['attn']['indexer']['q'], start['q'] * decay)
  np.testing.assert_array_equal(still.train['layers']['attn']['indexer']['gate'], start['gate'])
  assert not np.array_equal(moved.train['layers']['attn']['indexer']['gate'], start['gate'])


@pytest.mark.parametrize('accumulate', [1, 8])
def test_a_step_that_is_not_finite_is_skipped_and_counted(accumulate):
  good, bad = toy.batch(seed=0), toy.batch(seed=1)
  bad.patch_BP[3] = np.nan
  clean, _ = run([good, good], accumulate=accumulate)
  state, history = run([good, bad, good], accumulate=accumulate)
  assert [h['skipped'][0] for h in history] == [0.0, 1.0, 0.0]
  assert history[1]['loss'] == (0.0, 0.0) and history[1]['grad_norm'] == (0.0, 0.0)
  assert_same((state.train, state.opt), (clean.train, clean.opt), exact=True)
  assert int(state.step) == 3


def test_a_loss_above_the_limit_is_skipped_and_counted():
  good, other = toy.batch(seed=0), toy.batch(seed=1)
  tx = make_optimizer(OPT)
  update = make_update(toy.apply, toy.objective(), tx)
  fresh = lambda: state_lib.create(toy.init(), tx, (), 'float32', jax.random.key(0))
  once, metrics = update(fresh(), good, RATES)
  assert metrics['skipped'] == (0, 1) and metrics['spikes'] == (0, 1)
  loss = float(metrics['loss'][0] / metrics['loss'][1])
  state, metrics = update(fresh(), other, RATES, 0.5 * loss)
  assert metrics['skipped'] == metrics['spikes'] == (1, 1) and metrics['loss'] == (0, 0)
  state, metrics = update(state, good, RATES, 1.01 * loss)
  assert metrics['skipped'] == metrics['spikes'] == (0, 1)
  assert_same((state.train, state.opt), (once.train, once.opt), exact=True)


def test_an_infinite_gradient_under_a_finite_loss_is_skipped_too():
  def apply(params, batch):
    out = toy.apply(params, batch)
    hole = jnp.sqrt(jnp.abs(params['norm'] - params['norm']))       # 0, with an infinite slope
    return out._replace(hidden_BTD=out.hidden_BTD + hole)
  start = toy.init()
  state, history = run([toy.batch()], apply=apply)
  assert history[0]['skipped'] == (1.0, 1.0)
  assert_same(state.train, start, exact=True)


def test_state_is_donated_and_frozen_is_not():
  update, tx = compiled(OPT, 1, toy.apply)
  state = state_lib.create(toy.init(), tx, ('vision', 'embed'), 'float32', jax.random.key(0))
  update(state, toy.batch(), RATES)
  assert all(x.is_deleted() for x in jax.tree.leaves((state.train, state.opt)) if x.size > 1)
  assert not any(x.is_deleted() for x in jax.tree.leaves(state.frozen))


def test_muon_learns_too():
  _, history = run([toy.batch()] * 20, cfg=dataclasses.replace(OPT, name='muon'))
  losses = [h['loss'][0] / h['loss'][1] for h in history]
  assert losses[-1] < 0.8 * losses[0]
