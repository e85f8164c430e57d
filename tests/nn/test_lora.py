"""Adapters beside the weights of the whole model: nothing at first, later the same as weights with their sum."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.errors import InputError
from keye_jax import feed
from keye_jax.config import LoraConfig, RunConfig, TrainConfig
from keye_jax.nn import head, keye, lora
from keye_jax.steps import state as state_lib
from tests.nn import batches
from tests.nn.test_keye import with_mode
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close

ALL = LoraConfig(targets=('*',), rank=3, alpha=6.0)


@pytest.fixture(scope='module')
def params():
  return keye.init(batches.CONFIG, jax.random.key(0))


def pairs(config, params, zero=False):
  """Adapters for `params`; both halves random, or as they begin."""
  found = lora.init(ALL, config, params, jax.random.key(1))
  noise = lambda x: 0.2 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)
  return found if zero else jax.tree.map(lambda x: x + noise(x), found)


def adapted(config, params, own):
  return lora.scaled(ALL, state_lib.merge(params, own))


def hidden(config, params):
  return batches.forward(config, params, batches.mixed(B=8)).hidden_BTD


def loss(config, params, batch):
  out = keye.apply(config, params, batch)
  stats = head.token_stats(config.layout, out.hidden_BTD, out.head_DV, batch.target_BT, chunk=16)
  return -(stats.logp_BT * batch.weight_BT).sum() / batch.weight_BT.sum() + jnp.sum(
      0.0 if out.aux.kl_LBT is None else out.aux.kl_LBT)


@pytest.mark.parametrize('mode', ['dense', pytest.param('sparse', marks=pytest.mark.slow)])
def test_new_adapters_change_nothing_and_random_ones_are_the_merged_weights(params, mode):
  """New ones add zeros, exactly: whatever A is, the result has the same bits. Against the program without adapters,
  which XLA fuses in another way, that is equality up to rounding."""
  config = with_mode(mode)
  plain, new = hidden(config, params), pairs(config, params, zero=True)
  begun, other = (hidden(config, adapted(config, params, own)) for own in (new, jax.tree.map(lambda x: -3 * x, new)))
  np.testing.assert_array_equal(begun, other)
  assert_close(begun, plain)
  own = pairs(config, params)
  copies = jax.tree.map(jnp.copy, params)       # what is merged is given up
  merged = lora.merged(ALL, config, state_lib.merge(copies, own))
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  got = hidden(config, adapted(config, params, own))
  assert float(jnp.abs(got - plain).max()) > 0.1
  assert_close(got, hidden(config, merged))


@pytest.mark.slow
def test_gradients_are_those_through_the_merged_weights(params):
  """Of every pair, by the chain rule of W + alpha / rank A B, with blocks computed again and without."""
  config, batch = with_mode('dense'), batches.mixed(B=8)
  own = pairs(config, params)
  applied = lambda config: jax.jit(jax.grad(lambda own: loss(config, adapted(config, params, own), batch)))(own)
  through_sum = jax.jit(jax.grad(lambda own: loss(config, lora.merged(ALL, config, state_lib.merge(params, own)),
                                                  batch)))(own)
  jax.tree.map(assert_close, applied(config), through_sum)
  jax.tree.map(assert_close, applied(dataclasses.replace(config, remat='block')), through_sum)


@pytest.mark.slow
@pytest.mark.parametrize('mode, transport', [('sparse', 'ring'), ('dense', 'padded')])
def test_on_a_mesh_of_eight(params, mode, transport):
  """Pairs lie as their weights do, and loss and gradients are those of one device; so is what merging gives."""
  config, batch = with_mode(mode), batches.mixed(B=8)
  own = pairs(config, params)
  step = lambda config: jax.jit(jax.value_and_grad(
      lambda own, params, batch: loss(config, adapted(config, params, own), batch)))
  expected = step(config)(own, params, batch)
  merged = lora.merged(ALL, config, state_lib.merge(jax.tree.map(jnp.copy, params), own))
  host = jax.tree.map(np.asarray, (params, own, batch))
  shared = dataclasses.replace(config, experts_transport=transport, experts_capacity=4.0)      # room for all
  with mesh(2, 2, 2):
    put = lambda tree, shapes: jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), tree, shapes)
    shapes = keye.param_shapes(shared)
    placed = put(host[0], shapes)
    born = jax.jit(functools.partial(lora.init, ALL, shared))(placed, jax.random.key(1))
    pair = born['layers']['mlp']['gate_up_lora']
    both = ('data', 'context')
    assert (pair['a'].sharding.spec, pair['b'].sharding.spec) == (jax.P(None, 'expert', both, None),
                                                                  jax.P(None, 'expert', None, None))
    assert born['layers']['attn']['o_lora']['b'].sharding.spec == jax.P(None, None, both)
    placed_own = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), host[1], born)
    rows = feed.place('train', host[2], *feed.share('train', 8))
    got = jax.tree.map(np.asarray, step(shared)(placed_own, placed, rows))
    sums = jax.tree.map(np.asarray, lora.merged(ALL, shared, state_lib.merge(placed, placed_own)))
  jax.tree_util.tree_map_with_path(lambda path, a, b: assert_close(a, b, what=str(path)), got, expected)
  jax.tree.map(assert_close, sums, jax.tree.map(np.asarray, merged))


def test_targets_are_patterns_and_one_that_matches_nothing_is_named():
  find = lambda *patterns, **model: set(lora.targets(LoraConfig(targets=patterns),
                                                     dataclasses.replace(batches.CONFIG, **model)))
  assert find('layers/attn/[qv]') == {'layers/attn/q', 'layers/attn/v'}
  assert find('layers/mlp/*', 'vision/*') == {'layers/mlp/gate_up', 'layers/mlp/down'} | {
      f'vision/layers/{name}' for name in ('q', 'k', 'v', 'o', 'fc1', 'fc2')}
  with pytest.raises(InputError, match="lora.targets: 'layers/attn/w' matches no weight that can have an adapter; "
                                       'there are layers/attn/q, '):
    find('layers/attn/q', 'layers/attn/w')
  with pytest.raises(InputError, match="'vision/.' matches no weight"):
    find('vision/*', vision=dataclasses.replace(batches.VISION, layers=0))


def test_beside_adapters_everything_is_frozen_but_what_is_thawed(params):
  both = state_lib.merge(params, pairs(batches.CONFIG, params))
  run = RunConfig(lora=ALL)
  train, frozen = state_lib.split(both, lora.freeze(run))
  assert jax.tree.structure(frozen) == jax.tree.structure(params)
  assert jax.tree.structure(train) == jax.tree.structure(pairs(batches.CONFIG, params))
  thawed = lambda *freeze: state_lib.split(both, lora.freeze(RunConfig(lora=ALL, train=TrainConfig(freeze=freeze))))
  assert set(thawed('!layers/attn/indexer')[0]['layers']['attn']) - set(train['layers']['attn']) == {'indexer'}
  with pytest.raises(InputError, match='train.freeze: layers/attn/k has an adapter beside it and cannot be trained'):
    thawed('!layers/attn')
