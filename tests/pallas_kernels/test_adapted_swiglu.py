"""Experts with low-rank pairs beside their matrices, against numpy's experts with the sums."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import adapted_swiglu
from tests.pallas_kernels.test_grouped_matmul import D, E, F, routed_inputs, routed_loop
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures('small_grouped_tiles')
RANKS = 3, 2


def pairs(ranks=RANKS, seed=5):
  rng = np.random.default_rng(seed)
  G, A = ranks
  return [rng.normal(size=shape) * 0.5 for shape in ((E, D, G), (E, G, 2 * F), (E, F, A), (E, A, D))]


@functools.partial(jax.jit, static_argnames=('implementation', 'devices'))
def value_and_gradients(x, expert, weight, gate_up, down, dy, implementation, devices):
  y, vjp = jax.vjp(lambda x, *a: adapted_swiglu(x, expert, *a, implementation, devices), x, weight, gate_up, down)
  return y, vjp(dy)


def check(implementation, expert, ranks=RANKS, devices=1):
  x, weight, gate_up, down, dy = routed_inputs(len(expert))
  a1, b1, a2, b2 = pairs(ranks)
  y, dx, dweight, dsum1, dsum2 = routed_loop(x, np.asarray(expert), weight, gate_up + a1 @ b1, down + a2 @ b2, dy)
  t = lambda w: w.swapaxes(1, 2)
  want = dict(y=y, dx=dx, dweight=dweight, da1=dsum1 @ t(b1), db1=t(a1) @ dsum1, da2=dsum2 @ t(b2), db2=t(a2) @ dsum2)
  f32 = lambda *arrays: tuple(map(jnp.float32, arrays))
  got_y, (dx, dweight, (dw1, da1, db1), (dw2, da2, db2)) = value_and_gradients(
      *f32(x), jnp.asarray(expert, jnp.int32), *f32(weight), f32(gate_up, a1, b1), f32(down, a2, b2), *f32(dy),
      implementation, devices)
  for (name, b), a in zip(want.items(), (got_y, dx, dweight, da1, db1, da2, db2)):
    assert_close(a, b, what=name)
  assert not dw1.any() and not dw2.any()


@pytest.mark.parametrize('implementation', ['reference', 'xla', 'gpu'])
def test_values_and_gradients(implementation):
  rng = np.random.default_rng(1)
  check(implementation, rng.permuted(np.tile(np.arange(-1, E + 1), (41, 1)), axis=1)[:, :2])
  check(implementation, [[3, 3]] * 41, devices=3)


@pytest.mark.parametrize('implementation', ['xla', 'gpu'])
def test_one_matrix_may_have_no_pair(implementation):
  check(implementation, np.random.default_rng(2).integers(0, E, (41, 2)), (3, 0))


@pytest.mark.parametrize('implementation', ['reference', 'xla', 'gpu'])
def test_matrices_in_8_bits_are_those_times_their_scale(implementation):
  """Values and gradients, one matrix in 8 bits with a pair and one without, against those of the float matrices."""
  rng = np.random.default_rng(3)
  x, weight, _, _, dy = map(jnp.float32, routed_inputs(41))
  expert = jnp.asarray(rng.permuted(np.tile(np.arange(-1, E + 1), (41, 1)), axis=1)[:, :2], jnp.int32)
  q1, q2 = (jnp.asarray(rng.integers(-127, 128, s), jnp.int8) for s in ((E, D, 2 * F), (E, F, D)))
  s1, s2 = (jnp.float32(rng.uniform(1e-3, 6e-3, s)) for s in ((E, 2 * F), (E, D)))
  a1, b1, a2, b2 = map(jnp.float32, pairs((3, 0)))

  @functools.partial(jax.jit, static_argnums=4)
  def run(x, weight, one, two, eight):
    pair = lambda q, s, a, b: (q, a, b, s) if eight else (q * s[:, None], a, b)
    f = lambda x, weight, one, two: adapted_swiglu(x, expert, weight, pair(q1, s1, *one), pair(q2, s2, *two),
                                                   implementation)
    y, vjp = jax.vjp(f, x, weight, one, two)
    return y, vjp(dy)

  got, expected = (run(x, weight, (a1, b1), (a2, b2), eight) for eight in (True, False))
  jax.tree.map(assert_close, got, expected)


def test_bfloat16():
  x, weight, gate_up, down, _, *rest = [np.asarray(jnp.bfloat16(a), np.float64) for a in (*routed_inputs(41), *pairs())]
  a1, b1, a2, b2 = rest
  expert = np.random.default_rng(2).integers(0, E, (41, 2))
  low = lambda *arrays: tuple(map(jnp.bfloat16, arrays))
  y = jax.jit(adapted_swiglu)(*low(x), jnp.asarray(expert, jnp.int32), jnp.float32(weight), low(gate_up, a1, b1),
                              low(down, a2, b2))
  assert y.dtype == jnp.bfloat16
  assert_close(y, routed_loop(x, expert, weight, gate_up + a1 @ b1, down + a2 @ b2, np.zeros_like(x))[0],
               dtype='bfloat16')


def test_shapes_that_do_not_fit_are_named():
  x, weight, gate_up, down, _ = map(jnp.float32, routed_inputs(8))
  a1, b1, a2, b2 = map(jnp.float32, pairs())
  expert = jnp.zeros((8, 2), jnp.int32)
  with pytest.raises(ValueError, match=r'gate_up \(4, 12, 16\) needs a pair \[4, 12, A\] and \[4, A, 16\], got'):
    adapted_swiglu(x, expert, weight, (gate_up, a2, b1), (down, a2, b2))
  with pytest.raises(ValueError, match=r'gate_up is int8 \(4, 12, 16\) with no scale; int8 alone needs one, \[4, 16\]'):
    adapted_swiglu(x, expert, weight, (jnp.int8(gate_up), a1, b1), (down, a2, b2))
  with pytest.raises(ValueError, match=r'down is float32 \(4, 8, 12\) with a scale \(4, 12\)'):
    adapted_swiglu(x, expert, weight, (gate_up, a1, b1), (down, a2, b2, jnp.ones((E, D))))
  with pytest.raises(ValueError, match=r'x \(8, 12\), experts \(8, 2\), weights \(8, 1\)'):
    adapted_swiglu(x, expert, weight[:, :1], (gate_up, a1, b1), (down, a2, b2))
