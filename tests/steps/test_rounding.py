"""bfloat16 parameters: rounding that is right on average, and training that small rates do not stop."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from keye_jax import sharding
from keye_jax.steps import rounding
from keye_jax.steps import state as state_lib
from tests.steps import toy
from tests.steps.test_mesh import mesh
from tests.steps.test_update import OPT, compiled

KEY = jax.random.key(0)


def test_the_mean_is_the_value_and_only_the_two_neighbours_appear():
  x = np.float32([1.0 + 1 / 512, -3.0 - 1 / 100, 1e-30, 7.123e4])
  many = np.asarray(rounding.stochastic_bfloat16(jnp.tile(x, (40_000, 1)), KEY), np.float64)
  for value, column in zip(x, many.T):
    low, high = np.unique(column)
    assert low <= value <= high
    gap = high - low
    assert abs(column.mean() - value) < 5 * gap / 2 / 40_000 ** 0.5
    assert gap <= abs(value) / 127


def test_what_bfloat16_holds_stays():
  x = jnp.asarray([0.0, -0.0, 1.5, -2.0**-126, jnp.inf, -jnp.inf, 3.3895314e38, jnp.nan], jnp.float32)
  for seed in range(20):
    y = rounding.stochastic_bfloat16(x, jax.random.key(seed))
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x))
    np.testing.assert_array_equal(np.signbit(np.asarray(y, np.float32)), np.signbit(np.asarray(x)))


def test_small_changes_add_up():
  """A thousand changes of 2**-14 to a weight of 1: rounding to the nearest keeps none of them."""
  params, changes = {'a': jnp.ones(256, jnp.bfloat16)}, {'a': jnp.full(256, 2.0**-14)}
  step = lambda i, p: rounding.apply_updates(p, changes, jax.random.fold_in(KEY, i))
  moved = jax.lax.fori_loop(0, 1000, step, params)['a']
  assert float(moved.astype(jnp.float32).mean()) == pytest.approx(1 + 1000 * 2.0**-14, abs=2e-3)
  assert (optax.apply_updates(params, changes)['a'] == 1).all()


def test_float32_is_added_as_before():
  params, changes = {'a': jnp.float32([1, 2]), 'b': jnp.ones(3, jnp.bfloat16)}, {'a': jnp.float32([1e-7, -1]),
                                                                                 'b': jnp.zeros(3)}
  out = rounding.apply_updates(params, changes, KEY)
  np.testing.assert_array_equal(out['a'], optax.apply_updates(params['a'], changes['a']))
  assert out['b'].dtype == jnp.bfloat16 and (out['b'] == 1).all()


def test_a_mesh_rounds_alike():
  x = jnp.linspace(-3, 3, 64 * 8, dtype=jnp.float32).reshape(64, 8)
  alone = np.asarray(rounding.stochastic_bfloat16(x, KEY), np.float32)
  host = np.asarray(x)
  with mesh(2, 2, 2):
    placed = jax.device_put(host, sharding.spec('train', 'batch', 'seq'))
    out = jax.jit(rounding.stochastic_bfloat16)(placed, jax.random.key(0))
    assert out.sharding.spec == placed.sharding.spec
    np.testing.assert_array_equal(np.asarray(out, np.float32), alone)


def losses(dtype: str, rate: float, steps: int) -> tuple[list[float], state_lib.State]:
  step, tx = compiled(OPT, 1, toy.apply)
  params = jax.tree.map(lambda a: a.astype(dtype), toy.init())
  state, out = state_lib.create(params, tx, (), dtype, jax.random.key(1)), []
  for _ in range(steps):
    state, metrics = step(state, toy.batch(), {'model': rate, 'indexer': rate})
    out.append(float(metrics['loss'][0] / metrics['loss'][1]))
  return out, state


@pytest.mark.slow
def test_a_small_rate_trains_bfloat16_as_it_does_float32():
  """At 2e-4 a step moves most weights by less than half of what bfloat16 tells apart."""
  half, state = losses('bfloat16', 2e-4, 150)
  whole, _ = losses('float32', 2e-4, 150)
  assert whole[-1] < 0.95 * whole[0]
  assert half[0] - half[-1] == pytest.approx(whole[0] - whole[-1], rel=0.15)
  assert {a.dtype for a in jax.tree.leaves(state.train)} == {jnp.dtype('bfloat16')}
  assert {a.dtype for a in jax.tree.leaves(state.opt) if a.ndim} == {jnp.dtype('float32')}
