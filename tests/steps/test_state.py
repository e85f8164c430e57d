import jax
import jax.numpy as jnp
import pytest

from keye_jax.config import OptimizerConfig
from keye_jax.steps import state as state_lib
from keye_jax.steps.optimizer import make_optimizer
from tests.steps import toy


def paths(tree):
  return {'/'.join(k.key for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_split_and_merge_are_inverses():
  params = toy.init()
  train, frozen = state_lib.split(params, ('vision', 'layers/attn'))
  assert paths(frozen) == {p for p in paths(params) if p.startswith(('vision/', 'layers/attn/'))}
  assert paths(train) | paths(frozen) == paths(params) and not paths(train) & paths(frozen)
  assert 'layers/attn_norm' in paths(train)          # a prefix is of whole names
  merged = state_lib.merge(train, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, merged, params))


def test_everything_but_the_indexer():
  train, frozen = state_lib.split(toy.init(), ('', '!layers/attn/indexer'))
  assert paths(train) == {f'layers/attn/indexer/{n}' for n in ('q', 'k', 'gate', 'k_norm_bias')}
  assert len(paths(frozen)) == len(paths(toy.init())) - 4


def test_a_prefix_that_matches_nothing_is_named():
  with pytest.raises(ValueError, match="train.freeze: 'visoin' matches no parameter; there are .*vision"):
    state_lib.split(toy.init(), ('visoin',))
  with pytest.raises(ValueError, match='leaves nothing to train'):
    state_lib.split(toy.init(), ('',))


def test_frozen_is_stored_in_the_compute_dtype_and_has_no_optimizer_state():
  tx = make_optimizer(OptimizerConfig())
  state = state_lib.create(toy.init(), tx, ('layers', 'vision'), 'bfloat16', jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(state.frozen)} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(state.train)} == {jnp.dtype('float32')}
  sizes = {x.size for x in jax.tree.leaves(state.opt)} - {1}
  assert sizes == {x.size for x in jax.tree.leaves(state.train)}
