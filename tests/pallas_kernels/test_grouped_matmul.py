"""Grouped products against numpy loops over experts: values and gradients, for any split of the rows."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, xla
from tests.tolerances import assert_close

E, D, F = 4, 12, 8
IMPLEMENTATIONS = ['reference', 'xla']


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def inputs(N, seed=0):
  rng = np.random.default_rng(seed)
  x, dy = rng.normal(size=(2, N, D))
  return x, rng.normal(size=(E, D, 2 * F)) * D ** -0.5, rng.normal(size=(E, F, D)) * F ** -0.5, dy


def expected(x, gate_up, down, sizes, dy):
  """numpy in float64, expert by expert: (y, dx, dgate_up, ddown)."""
  y, dx, dgate_up, ddown = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate_up), np.zeros_like(down)
  start = 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    h = x[rows] @ gate_up[e]
    gate, up = h[:, :F], h[:, F:]
    silu = gate * sigmoid(gate)
    y[rows] = (silu * up) @ down[e]
    dact = dy[rows] @ down[e].T
    dh = np.concatenate([dact * up * (sigmoid(gate) + silu * (1 - sigmoid(gate))), dact * silu], 1)
    dx[rows], dgate_up[e], ddown[e] = dh @ gate_up[e].T, x[rows].T @ dh, (silu * up).T @ dy[rows]
    start += size
  return y, dx, dgate_up, ddown


@functools.partial(jax.jit, static_argnames='implementation')
def with_gradients(x, gate_up, down, sizes, dy, implementation):
  y, vjp = jax.vjp(lambda *a: grouped_swiglu(*a, sizes, implementation), x, gate_up, down)
  return y, *vjp(dy)


def swiglu_and_gradients(implementation, x, gate_up, down, sizes, dy):
  return with_gradients(*map(jnp.float32, (x, gate_up, down)), jnp.asarray(sizes, jnp.int32), jnp.float32(dy),
                        implementation)


class TestGroupedMatmul:

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  @pytest.mark.parametrize('sizes', [(20, 0, 7, 14), (0, 0, 0, 41), (41, 0, 0, 0), (10, 10, 10, 3), (0, 0, 0, 0)])
  def test_values_and_gradients(self, implementation, sizes):
    x, gate_up, down, dy = inputs(41)
    actual = swiglu_and_gradients(implementation, x, gate_up, down, sizes, dy)
    for name, a, b in zip(('y', 'dx', 'dgate_up', 'ddown'), actual, expected(x, gate_up, down, sizes, dy)):
      assert_close(a, b, what=name)
      assert np.array_equal(np.asarray(a) == 0, b == 0), f'{name}: zeros belong to other experts'

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  @pytest.mark.parametrize('N, sizes', [(41, (20, 0, 7, 9)), (5, (1, 0, 3, 0))])
  def test_one_product(self, implementation, N, sizes):
    x, w, _, _ = inputs(N)
    dy = np.random.default_rng(1).normal(size=(N, 2 * F))
    y, dx, dw = jax.jit(lambda x, w, dy: (lambda y, vjp: (y, *vjp(dy)))(
        *jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), implementation), x, w)))(
            *map(jnp.float32, (x, w, dy)))
    want_y, want_dx, want_dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    ends = np.cumsum(sizes)
    for e, (a, b) in enumerate(zip(ends - sizes, ends)):
      want_y[a:b], want_dx[a:b], want_dw[e] = x[a:b] @ w[e], dy[a:b] @ w[e].T, x[a:b].T @ dy[a:b]
    assert_close(y, want_y, what='y')
    assert_close(dx, want_dx, what='dx')
    assert_close(dw, want_dw, what='dw')

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  @pytest.mark.parametrize('sizes', [(1, 0, 0, 3), (0, 2, 0, 0)])
  def test_rows_of_a_decode_step(self, implementation, sizes):
    x, gate_up, down, dy = inputs(4)
    actual = swiglu_and_gradients(implementation, x, gate_up, down, sizes, dy)[0]
    y = jax.jit(lambda *a: grouped_swiglu(*a, jnp.asarray(sizes, jnp.int32), implementation))(
        *map(jnp.float32, (x, gate_up, down)))
    want = expected(x, gate_up, down, sizes, dy)[0]
    assert_close(y, want)
    assert_close(actual, want)

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  def test_bfloat16(self, implementation):
    x, gate_up, down, _ = (np.asarray(jnp.bfloat16(a), np.float64) for a in inputs(41))
    y = jax.jit(lambda *a: grouped_swiglu(*a, jnp.asarray((30, 1, 0, 10), jnp.int32), implementation))(
        *map(jnp.bfloat16, (x, gate_up, down)))
    assert y.dtype == jnp.bfloat16
    assert_close(y, expected(x, gate_up, down, (30, 1, 0, 10), x)[0], dtype='bfloat16')


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=E, max_size=E).filter(lambda s: sum(s) <= 100))
def test_any_sizes(sizes):
  """One compiled program; sizes decide at run time how many tiles of which length it visits."""
  x, gate_up, down, dy = inputs(100)
  for a, b in zip(swiglu_and_gradients('xla', x, gate_up, down, sizes, dy), expected(x, gate_up, down, sizes, dy)):
    assert_close(a, b)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 128))
def test_buckets(N, E):
  lengths = xla.buckets(N, E)
  assert list(lengths) == sorted(set(lengths)) and lengths[-1] <= min(N, xla.MAX_TILE) and len(lengths) <= 6


def test_shapes_that_do_not_fit_are_named():
  x, gate_up, down, _ = map(jnp.float32, inputs(8))
  sizes = jnp.zeros(E, jnp.int32)
  with pytest.raises(ValueError, match=r'grouped_matmul: x \[N, D\].*\(8, 12\), \(4, 8, 12\)'):
    grouped_matmul(x, down, sizes)
  with pytest.raises(ValueError, match=r'needs down \[E, F, D\], got \(4, 12, 8\)'):
    grouped_swiglu(x, gate_up, down.swapaxes(1, 2), sizes)
