"""The policy step: it moves probability as advantages say, and neither micro-batches nor a mesh change it."""
import functools

import jax
import numpy as np
import optax
import pytest

from data_pipelines.schema import PolicyBatch
from keye_jax import feed, sharding
from keye_jax.nn import head
from keye_jax.objectives.policy import gspo
from keye_jax.steps import state as state_lib
from keye_jax.steps.update import make_update
from tests.nn import batches
from tests.nn.policy import responses
from tests.steps import toy
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close

CLIP = (0.2, 0.3)


@functools.cache
def toy_rows() -> PolicyBatch:
  """Two responses a row, the first better than the second; what the toy model said itself."""
  batch = toy.batch()
  sequence_BT = np.where(batch.segment_BT > 0, np.array([-1, 0, 1, 0, 1, 1]), -1).astype(np.int32)

  @jax.jit
  def said(params):
    out = toy.apply(params, batch)
    return head.token_stats('train', out.hidden_BTD, out.head_DV, batch.target_BT).logp_BT
  old_BT = np.asarray(said(toy.init()))
  return PolicyBatch(batch, old_BT, sequence_BT, np.tile(np.float32([1, -1]), (8, 1)))


@functools.cache
def compiled(accumulate):
  tx = optax.sgd(1.0)
  apply = lambda params, rows: toy.apply(params, rows.batch)
  return make_update(apply, gspo('train', 0.0, 0.0, CLIP), tx, accumulate), tx


def run(batch, steps, accumulate=1, rate=1.0):
  update, tx = compiled(accumulate)
  state = state_lib.create(toy.init(), tx, ('vision', 'layers/attn/indexer'), 'float32', jax.random.key(0))
  history = []
  for _ in range(steps):
    state, metrics = update(state, batch, {'model': rate})
    history.append({k: float(s / w) for k, (s, w) in metrics.items()})
  return state, history


def test_what_was_better_becomes_likelier_until_the_clip():
  """A ratio of better responses of more than 1.3 gives no gradient any more, nor one of worse ones below 0.8."""
  batch = toy_rows()
  state, history = run(batch, 30)
  assert history[0]['ratio'] == pytest.approx(1, abs=1e-5) and history[0]['clipped'] == 0
  assert history[0]['loss'] == pytest.approx(0, abs=1e-5) and history[-1]['loss'] < -0.2
  assert history[-1]['clipped'] > 0.5 and history[-1]['kl'] > history[1]['kl'] > 0
  assert all(h['skipped'] == 0 and h['loss'] > -0.25 - 1e-5 for h in history)        # (1.3 - 0.8) / 2 at best
  jax.tree.map(np.testing.assert_array_equal, state.frozen['vision'], toy.init()['vision'])


def test_micro_batches_make_the_same_step():
  batch = toy_rows()
  batch = batch._replace(old_logp_BT=batch.old_logp_BT + np.float32(0.6) * np.random.default_rng(0).normal(
      size=batch.old_logp_BT.shape).astype(np.float32))
  start = state_lib.split(toy.init(), ('vision', 'layers/attn/indexer'))[0]
  (whole, [one]), (parts, [many]) = (run(batch, 1, n) for n in (1, 8))
  moved = lambda state: jax.tree.map(lambda a, b: a - b, state.train, start)
  jax.tree.map(assert_close, moved(parts), moved(whole))
  assert one['clipped'] > 0
  for name in one.keys() - {'expert_peak', 'ratio_min', 'ratio_max'}:        # statistics of each micro-batch
    assert many[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name


def test_a_mesh_of_eight_gives_the_same_loss_and_gradient():
  """Rows over four devices, the tokens of a row in zig-zag over two."""
  batch = responses(jax.tree.map(np.asarray, batches.mixed(B=8)))
  rng = np.random.default_rng(1)
  hidden_BTD, head_DV = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 32, 16), (16, 64)))
  objective = gspo('train', 0.0, 0.0, CLIP)

  @jax.jit
  def gradient(hidden_BTD, head_DV, rows):
    out = toy.Output(hidden_BTD, head_DV, toy.Aux(None, None, None))
    return jax.value_and_grad(lambda out: objective.loss(out, rows, objective.totals(rows)), has_aux=True)(out)

  (loss, metrics), grads = gradient(hidden_BTD, head_DV, batch)
  with mesh(2, 2, 2):
    order_T = feed.zigzag(32, 2)
    place = lambda x, *axes: jax.device_put(x, sharding.spec('train', *axes))
    hidden8_BTD = place(hidden_BTD[:, order_T], 'batch', 'seq', None)
    rows8 = feed.place('train', batch, *feed.share('train', 8))
    (loss8, metrics8), grads8 = gradient(hidden8_BTD, place(head_DV, None, None), rows8)
    loss8, metrics8, grads8 = jax.tree.map(np.asarray, (loss8, metrics8, grads8))
  assert_close(loss8, loss, what='loss')
  assert_close(grads8.hidden_BTD, np.asarray(grads.hidden_BTD)[:, order_T], what='hidden')
  assert_close(grads8.head_DV, grads.head_DV, what='head')
  assert metrics8.keys() == metrics.keys() and float(metrics['loss'][1]) == 32
  for name, (s, w) in metrics.items():
    assert_close(metrics8[name][0] / metrics8[name][1], s / w, what=name)
