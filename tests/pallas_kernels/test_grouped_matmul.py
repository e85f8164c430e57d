"""Grouped products and routed experts against numpy loops over experts: values and gradients, for any split of rows."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import grouped_matmul, routed, routed_swiglu, tpu, xla
from tests.tolerances import assert_close

E, D, F = 4, 12, 8
IMPLEMENTATIONS = ['reference', 'xla', 'tpu', 'gpu']
pytestmark = pytest.mark.usefixtures('small_grouped_tiles')
LOADS = [(20, 0, 7, 14), (0, 0, 0, 41), (41, 0, 0, 0), (10, 10, 10, 3), (0, 0, 0, 0)]     # rows of each expert, of 41


@functools.partial(jax.jit, static_argnames='implementation')
def matmul_and_gradients(x, w, sizes, dy, implementation):
  y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation), x, w)
  return y, *vjp(dy)


def check_matmul(implementation, N, sizes):
  rng = np.random.default_rng(0)
  x, w, dy = (rng.normal(size=s) for s in ((N, D), (E, D, F), (N, F)))
  want_y, want_dx, want_dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
  ends = np.cumsum(sizes)
  for e, (a, b) in enumerate(zip(ends - sizes, ends)):
    want_y[a:b], want_dx[a:b], want_dw[e] = x[a:b] @ w[e], dy[a:b] @ w[e].T, x[a:b].T @ dy[a:b]
  actual = matmul_and_gradients(*map(jnp.float32, (x, w)), jnp.asarray(sizes, jnp.int32), jnp.float32(dy),
                                implementation)
  for name, a, b in zip(('y', 'dx', 'dw'), actual, (want_y, want_dx, want_dw)):
    assert_close(a, b, what=name)
    assert np.array_equal(np.asarray(a) == 0, b == 0), f'{name}: zeros belong to other experts'


class TestGroupedMatmul:

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  @pytest.mark.parametrize('sizes', LOADS)
  def test_values_and_gradients(self, implementation, sizes):
    check_matmul(implementation, 41, sizes)

  @settings(max_examples=40, deadline=None)
  @given(st.lists(st.integers(0, 60), min_size=E, max_size=E).filter(lambda s: sum(s) <= 100))
  def test_any_sizes(self, sizes):
    """One compiled program; sizes decide at run time how many tiles of which length it visits."""
    check_matmul('xla', 100, sizes)

  @settings(max_examples=200, deadline=None)
  @given(st.integers(1, 10_000), st.integers(1, 128))
  def test_buckets(self, N, E):
    lengths = xla.buckets(N, E)
    assert list(lengths) == sorted(set(lengths)) and lengths[-1] <= min(N, xla.MAX_TILE) and len(lengths) <= 8

  def test_shapes_that_do_not_fit_are_named(self):
    with pytest.raises(ValueError, match=r'grouped_matmul: x \[N, D\].*\(5, 8\), \(4, 12, 8\), \(4,\)'):
      grouped_matmul(jnp.zeros((5, F)), jnp.zeros((E, D, F)), jnp.zeros(E, jnp.int32))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def routed_inputs(N, seed=0):
  rng = np.random.default_rng(seed)
  x, dy = rng.normal(size=(2, N, D))
  return x, rng.random((N, 2)), rng.normal(size=(E, D, 2 * F)) * D ** -0.5, rng.normal(size=(E, F, D)) * F ** -0.5, dy


def routed_loop(x, expert, weight, gate_up, down, dy):
  """numpy in float64, pick by pick: (y, dx, dweight, dgate_up, ddown)."""
  y, dx, dweight, dgate_up, ddown = map(np.zeros_like, (x, x, weight, gate_up, down))
  for (n, k), e in np.ndenumerate(expert):
    if not 0 <= e < E:
      continue
    gate, up = np.split(x[n] @ gate_up[e], 2)
    silu = gate * sigmoid(gate)
    out = (silu * up) @ down[e]
    y[n] += weight[n, k] * out
    dweight[n, k] = dy[n] @ out
    dact = weight[n, k] * (down[e] @ dy[n])
    dh = np.concatenate([dact * up * (sigmoid(gate) + silu * (1 - sigmoid(gate))), dact * silu])
    dx[n] += gate_up[e] @ dh
    dgate_up[e] += np.outer(x[n], dh)
    ddown[e] += weight[n, k] * np.outer(silu * up, dy[n])
  return y, dx, dweight, dgate_up, ddown


@functools.partial(jax.jit, static_argnames=('implementation', 'devices'))
def routed_and_gradients(x, expert, weight, gate_up, down, dy, implementation, devices):
  y, vjp = jax.vjp(lambda x, *a: routed_swiglu(x, expert, *a, implementation, devices), x, weight, gate_up, down)
  return y, *vjp(dy)


def check_routed(implementation, expert, devices=1):
  x, weight, gate_up, down, dy = routed_inputs(len(expert))
  x32, weight32, gate_up32, down32, dy32 = map(jnp.float32, (x, weight, gate_up, down, dy))
  expert = jnp.asarray(expert, jnp.int32)
  want = routed_loop(x, np.asarray(expert), weight, gate_up, down, dy)
  actual = routed_and_gradients(x32, expert, weight32, gate_up32, down32, dy32, implementation, devices)
  for name, a, b in zip(('y', 'dx', 'dweight', 'dgate_up', 'ddown'), actual, want):
    assert_close(a, b, what=name)
  alone = jax.jit(routed_swiglu, static_argnames='implementation')(x32, expert, weight32, gate_up32, down32,
                                                                   implementation=implementation)
  assert_close(alone, want[0], what='without gradients')


class TestRoutedSwiglu:

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  def test_values_and_gradients(self, implementation):
    """Distinct experts a row, as a router picks them; some picks are of nobody."""
    rng = np.random.default_rng(1)
    expert = rng.permuted(np.tile(np.arange(-1, E + 1), (41, 1)), axis=1)[:, :2]
    check_routed(implementation, expert)

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  @pytest.mark.parametrize('expert', [[[0, 1]] * 41, [[3, 3]] * 41, [[E, -1]] * 41])
  def test_uneven_loads(self, implementation, expert):
    check_routed(implementation, expert)

  @pytest.mark.parametrize('implementation', ['tpu', 'gpu'])
  @pytest.mark.parametrize('expert', [[[0, 1]] * 41, [[E, 2]] * 41, [[E, -1]] * 41])
  def test_picks_that_several_devices_share_whoever_owns_them(self, implementation, expert):
    """Of 82 picks a part holds 34 or so: all three, half of them, no part at all."""
    for devices in (3, 82):
      check_routed(implementation, expert, devices)

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  def test_a_decode_step(self, implementation):
    check_routed(implementation, [[1, 0], [E, 2], [-1, 3]])

  @settings(max_examples=20, deadline=None)
  @given(st.lists(st.tuples(st.integers(-1, E), st.integers(-1, E)), min_size=41, max_size=41))
  def test_any_picks(self, expert):
    check_routed('xla', expert)

  @settings(max_examples=40, deadline=None)
  @given(st.lists(st.tuples(st.integers(-1, E), st.integers(-1, E)), min_size=1, max_size=50))
  def test_picks_are_counted_into_the_order_of_a_stable_sort(self, expert):
    expert = jnp.asarray(expert, jnp.int32)
    for got, want in zip(tpu.sort(expert, E), routed.sort(expert, E)):
      assert np.array_equal(got, want)

  @pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
  def test_bfloat16(self, implementation):
    inputs = [np.asarray(jnp.bfloat16(a), np.float64) for a in routed_inputs(41)]
    x, weight, gate_up, down, dy = inputs
    expert = np.random.default_rng(2).integers(0, E, (41, 2))
    y = jax.jit(routed_swiglu, static_argnames='implementation')(
        jnp.bfloat16(x), jnp.asarray(expert, jnp.int32), jnp.float32(weight), jnp.bfloat16(gate_up),
        jnp.bfloat16(down), implementation=implementation)
    assert y.dtype == jnp.bfloat16
    assert_close(y, routed_loop(x, expert, weight, gate_up, down, dy)[0], dtype='bfloat16')

  def test_shapes_that_do_not_fit_are_named(self):
    x, weight, gate_up, down, _ = map(jnp.float32, routed_inputs(8))
    expert = jnp.zeros((8, 2), jnp.int32)
    with pytest.raises(ValueError, match=r'needs down \[E, F, D\], got \(4, 12, 8\)'):
      routed_swiglu(x, expert, weight, gate_up, down.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r'routed_swiglu: x \[N, D\].*\(8, 12\), \(8, 2\), \(8, 1\)'):
      routed_swiglu(x, expert, weight[:, :1], gate_up, down)
