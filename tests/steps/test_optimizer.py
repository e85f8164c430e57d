import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipelines.errors import InputError
from keye_jax.config import OptimizerConfig
from keye_jax.steps import optimizer
from tests.steps import toy
from tests.tolerances import assert_close

PLAIN = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, schedule='constant', clip_norm=1e9, indexer_clip_norm=1e9,
                        indexer_learning_rate=0.01)


@functools.cache
def compiled(cfg):
  tx = optimizer.make_optimizer(cfg)
  return jax.jit(lambda grads, params, rates: tx.update(grads, tx.init(params), params, rates=rates,
                                                        norms=optimizer.group_norms(grads))[0])


def one_update(cfg, params, grads):
  return compiled(cfg)(grads, params, optimizer.rates(cfg, 10)(5))


@pytest.mark.parametrize('shape, middle', [('cosine', 0.1 + 0.9 * 0.5), ('linear', 0.55), ('constant', 1.0)])
def test_schedule_warms_up_and_ends_at_the_final_fraction(shape, middle):
  cfg = OptimizerConfig(schedule=shape, warmup_steps=4, final_fraction=0.1, learning_rate=2.0,
                        indexer_learning_rate=1.0)
  at = optimizer.rates(cfg, steps=15)
  end = 2.0 if shape == 'constant' else 0.2
  assert [at(i)['model'] for i in (0, 1, 3, 4)] == pytest.approx([0.5, 1.0, 2.0, 2.0])
  assert [at(i)['model'] for i in (9, 14, 20)] == pytest.approx([2.0 * middle, end, end])
  assert all(at(i)['indexer'] == at(i)['model'] / 2 for i in range(20))


def test_rates_refuse_a_warmup_as_long_as_the_run():
  with pytest.raises(InputError, match='warmup_steps = 9 must be below train.steps = 9'):
    optimizer.rates(OptimizerConfig(warmup_steps=9), 9)


def test_adamw_is_the_textbook_step():
  params, grads = toy.init(0), toy.init(1)
  cfg = dataclasses.replace(PLAIN, weight_decay=0.5)
  changes = one_update(cfg, params, grads)
  g, p = np.asarray(grads['layers']['attn']['q'], np.float64), np.asarray(params['layers']['attn']['q'], np.float64)
  assert_close(changes['layers']['attn']['q'], -0.1 * (g / (np.abs(g) + cfg.eps) + 0.5 * p))    # bias-corrected m, v
  g, p = (np.asarray(t['layers']['attn']['indexer']['q'], np.float64) for t in (grads, params))
  assert_close(changes['layers']['attn']['indexer']['q'], -0.01 * (g / (np.abs(g) + cfg.eps) + 0.5 * p))


def test_decay_touches_matrices_only():
  tree = optimizer.decayed(toy.init())
  kept = {'/'.join(k.key for k in path) for path, yes in jax.tree_util.tree_flatten_with_path(tree)[0] if not yes}
  assert kept == {'norm', 'layers/attn_norm', 'layers/attn/indexer/gate', 'layers/attn/indexer/k_norm_bias',
                  'vision/patch_bias', 'vision/packing_position'}


def test_each_group_is_clipped_by_its_own_norm():
  params, grads = toy.init(0), toy.init(1)
  cfg = dataclasses.replace(PLAIN, eps=1e3, clip_norm=1.0, indexer_clip_norm=2.0)      # a huge eps makes it SGD
  step = lambda grads: one_update(cfg, params, grads)
  size = lambda tree: float(optax.tree.norm(tree)) * cfg.eps
  before = step(grads)
  indexer = before['layers']['attn'].pop('indexer')
  assert size(indexer) == pytest.approx(2.0 * cfg.indexer_learning_rate, rel=1e-2)
  assert size(before) == pytest.approx(1.0 * cfg.learning_rate, rel=1e-2)
  grads['layers']['attn']['indexer'] = jax.tree.map(lambda g: g * 1e6, grads['layers']['attn']['indexer'])
  after = step(grads)
  after['layers']['attn'].pop('indexer')
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    np.testing.assert_array_equal(a, b)


def test_a_model_without_an_indexer_takes_the_same_step():
  params, grads = toy.init(0), toy.init(1)
  both = one_update(PLAIN, params, grads)
  for tree in (params, grads, both):
    tree['layers']['attn'].pop('indexer')
  for a, b in zip(jax.tree.leaves(one_update(PLAIN, params, grads)), jax.tree.leaves(both), strict=True):
    assert_close(a, b)


def test_muon_orthogonalises_each_matrix_of_a_stack_and_leaves_the_rest_to_adamw():
  params, grads = toy.init(0), toy.init(1)
  cfg = dataclasses.replace(PLAIN, name='muon')
  changes, plain = one_update(cfg, params, grads), one_update(PLAIN, params, grads)
  for name, rows in (('q', toy.D), ('o', toy.H * toy.K)):
    stack = np.asarray(changes['layers']['attn'][name]).reshape(toy.L, rows, -1)
    for matrix in stack:
      values = np.linalg.svd(matrix, compute_uv=False)
      size = 0.1 * optimizer.MUON_RMS * math.sqrt(max(matrix.shape))
      assert values.max() < 1.3 * size and np.median(values) > 0.6 * size      # Newton-Schulz lands near 1, not at it
  for expert in np.asarray(changes['layers']['mlp']['down'])[1]:
    assert np.linalg.svd(expert, compute_uv=False).max() < 1.3 * 0.1 * optimizer.MUON_RMS * math.sqrt(toy.D)
  for path in (('embed',), ('layers', 'mlp', 'router'), ('layers', 'attn', 'indexer', 'q'), ('vision', 'patch')):
    a, b = changes, plain
    for name in path:
      a, b = a[name], b[name]
    np.testing.assert_array_equal(a, b)
  assert jnp.all(jnp.isfinite(changes['layers']['mlp']['gate_up']))
