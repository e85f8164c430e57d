"""The step on a mesh of eight devices is the step on one."""
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipelines.errors import InputError
from data_pipelines.schema import PolicyBatch
from keye_jax import feed, loop, sharding
from keye_jax.config import MeshConfig, OptimizerConfig
from keye_jax.nn import keye
from keye_jax.objectives.policy import gspo
from keye_jax.objectives.sft import sft
from keye_jax.steps import optimizer
from keye_jax.steps import state as state_lib
from keye_jax.steps.update import make_update
from tests import tiny_run
from tests.nn import batches
from tests.nn.policy import responses
from tests.steps import toy
from tests.tolerances import assert_close


@contextlib.contextmanager
def mesh(*shape):
  before = jax.sharding.get_abstract_mesh()
  sharding.use_mesh(MeshConfig(*shape))
  try:
    yield
  finally:
    jax.set_mesh(None) if before.empty else jax.set_mesh(before)


def one_step(config, params, batch, accumulate):
  """Parameters and metrics after one step of plain gradient descent, supervised or on responses.

  A long step: after one of the gradient's own size, the rounding of a norm's scale near 1 is 1e-5 of what moved it.
  """
  tx = optax.sgd(64.0)
  if isinstance(batch, PolicyBatch):
    objective, apply = gspo('train', 0.0, 1.0), lambda params, rows: keye.apply(config, params, rows.batch)
  else:
    objective, apply = sft('train', 0.0, 1.0), functools.partial(keye.apply, config)
  update = make_update(apply, objective, tx, accumulate)
  state = state_lib.create(params, tx, ('vision',), 'float32', jax.random.key(0))
  state, metrics = update(state, batch, {'model': 1.0, 'indexer': 1.0})
  return jax.tree.map(np.asarray, (state.train, state.frozen, metrics))


@pytest.mark.slow
@pytest.mark.parametrize('rows', [lambda batch: batch, responses])
def test_a_mesh_of_eight_accumulating_makes_the_step_of_one_device(rows):
  config = dataclasses.replace(batches.CONFIG, attention='sparse')
  batch = rows(jax.tree.map(np.asarray, batches.mixed(B=8)))
  start = jax.tree.map(np.asarray, keye.init(config, jax.random.key(0)))
  train, frozen, metrics = one_step(config, jax.tree.map(jnp.asarray, start), batch, 1)
  ring = dataclasses.replace(config, experts_transport='ring')
  with mesh(2, 2, 2):
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), start, keye.param_shapes(ring))
    train8, frozen8, metrics8 = one_step(ring, placed, feed.place('train', batch, *feed.share('train', 8)), 2)
  first = state_lib.split(start, ('vision',))[0]
  for (path, a), b, at in zip(jax.tree_util.tree_leaves_with_path(train8), jax.tree.leaves(train),
                              jax.tree.leaves(first)):
    if np.array_equal(b, at):
      np.testing.assert_array_equal(a, b, err_msg=str(path))
    else:
      assert_close(a - at, b - at, what=str(path))
  jax.tree.map(np.testing.assert_array_equal, frozen8, frozen)
  assert metrics8.keys() == metrics.keys()
  # Statistics of each micro-batch, and of queries that each device picks among its own.
  for name in metrics.keys() - {'expert_peak', 'ratio_min', 'ratio_max', 'indexer_recall'}:
    (a, wa), (b, wb) = metrics8[name], metrics[name]
    assert_close(a / wa, b / wb, what=name)


def test_muon_on_a_mesh_keeps_values_and_shardings():
  P = jax.P
  embed_in = P(None, ('data', 'context'))
  specs = {'q': embed_in, 'k': embed_in, 'v': embed_in, 'o': P(None, None, None, ('data', 'context')),
           'gate_up': P(None, 'expert', ('data', 'context')), 'down': P(None, 'expert')}

  def place(tree):
    def one(path, x):
      names = [k.key for k in path]
      return jax.device_put(np.asarray(x), P() if 'indexer' in names else specs.get(names[-1], P()))
    return jax.tree_util.tree_map_with_path(one, tree)

  tx = optimizer.make_optimizer(OptimizerConfig(name='muon'))
  rates = {'model': 0.1, 'indexer': 0.1}
  step = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params, rates=rates,
                                                  norms=optimizer.group_norms(grads)))
  params, grads = toy.init(0), toy.init(1)
  expected = jax.tree.map(np.asarray, step(grads, params)[0])
  with mesh(2, 2, 2):
    params = place(params)
    changes, opt = step(place(grads), params)
    momenta = {m.shape: m for m in jax.tree.leaves(opt)}
    for name in ('q', 'o'):
      weight = params['layers']['attn'][name]
      for other in (changes['layers']['attn'][name], momenta[weight.shape]):
        assert other.sharding.is_equivalent_to(weight.sharding, weight.ndim), name
    changes = jax.tree.map(np.asarray, changes)
  jax.tree.map(assert_close, changes, expected)


def test_offloading_on_a_mesh_of_cpus_is_refused_in_words(tmp_path):
  config = tiny_run.config(tiny_run.dataset(tmp_path / 'data'))
  model = dataclasses.replace(config.model, remat='offload')
  with mesh(2, 1, 1), pytest.raises(InputError, match="remat = 'offload' does not run on a mesh of CPUs.*'attention'"):
    loop.train(dataclasses.replace(config, model=model, mesh=MeshConfig(data=2)), tmp_path / 'out')
