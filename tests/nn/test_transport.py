"""Experts on four devices against experts on one, by every transport; what the ones with room for so much drop."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_jax import sharding
from keye_jax.config import ModelConfig, TextConfig
from keye_jax.nn import experts, transport
from keye_jax.nn.router import Routing
from pallas_kernels import dispatch
from tests.pallas_kernels import kinds
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close

X, B, T, D, F, E, K = 4, 8, 6, 8, 4, 8, 2
N, M = B * T // X, B * T // X * K                # tokens and picks of a device
CONFIG = ModelConfig(TextConfig(embed=D, ffn=F, experts=E, experts_per_token=K))
ENOUGH = float(X)                                # room for all picks of all devices


def inputs(seed: int, expert_BTK):
  normal = functools.partial(np.random.default_rng(seed).normal)
  weight_BTK = np.abs(normal(size=(B, T, K))) + 0.1
  x_BTD, dy_BTD = normal(size=(2, B, T, D))
  arrays = x_BTD, weight_BTK, normal(size=(E, D, 2 * F)), normal(size=(E, F, D)), dy_BTD
  x_BTD, weight_BTK, gate_up, down, dy_BTD = (a.astype(np.float32) for a in arrays)
  return (x_BTD, weight_BTK, gate_up, down), np.asarray(expert_BTK, np.int32), dy_BTD


def random_picks(seed: int) -> np.ndarray:
  """K experts of each token; every sixth token is padding."""
  rng = np.random.default_rng(seed)
  picks_NK = np.stack([rng.permutation(E)[:K] for _ in range(B * T)])
  picks_NK[::6] = E
  return picks_NK.reshape(B, T, K)


@functools.partial(jax.jit, static_argnums=0)
def run(config, arrays, expert_BTK, dy_BTD):
  """(y_BTD, gradients, dropped)."""
  def fn(x_BTD, weight_BTK, gate_up, down):
    routing = Routing(expert_BTK, weight_BTK, None, None)
    return experts.moe(config, x_BTD, routing, gate_up, down)
  y_BTD, pull, dropped = jax.vjp(fn, *arrays, has_aux=True)
  return y_BTD, pull(dy_BTD), dropped


def on_four(transport: str, capacity: float, arrays, expert_BTK, dy_BTD):
  config = dataclasses.replace(CONFIG, experts_transport=transport, experts_capacity=capacity)
  with mesh(1, 1, X):
    tokens, apart = ('batch', 'seq', None), ('experts', None, None)
    put = lambda a, axes: jax.device_put(a, sharding.spec('train', *axes))
    placed = tuple(put(a, axes) for a, axes in zip(arrays, (tokens, tokens, apart, apart)))
    return jax.tree.map(np.asarray, run(config, placed, put(expert_BTK, tokens), put(dy_BTD, tokens)))


def on_one(arrays, expert_BTK, dy_BTD):
  return jax.tree.map(np.asarray, run(CONFIG, arrays, expert_BTK, dy_BTD))


def assert_same(actual, expected):
  for name, a, b in zip(('y', 'dx', 'dweight', 'dgate_up', 'ddown'), (actual[0], *actual[1]),
                        (expected[0], *expected[1])):
    if not b.any():
      np.testing.assert_array_equal(a, b, err_msg=name)
    else:
      assert_close(a, b, what=name)


TRANSPORTS = ('ring', 'padded', 'ragged')


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
@pytest.mark.parametrize('name', ['ring', pytest.param('padded', marks=pytest.mark.slow)])
def test_with_the_kernels_of_a_platform(monkeypatch, name, platform):
  """By `ring` a device takes the part of the picks that it owns, or parts: here one owns nearly all."""
  expert_BTK = random_picks(0)
  expert_BTK[:, 2:] = [0, 1]
  case = inputs(0, expert_BTK)
  expected = on_one(*case)
  kinds.grouped_in_small_tiles(monkeypatch)
  monkeypatch.setattr(dispatch, 'platform', lambda: platform)
  run.clear_cache()
  assert_same(on_four(name, ENOUGH, *case), expected)
  run.clear_cache()


@pytest.mark.parametrize('name', TRANSPORTS)
def test_with_room_for_all_it_is_one_device(name):
  case = inputs(0, random_picks(0))
  actual, expected = on_four(name, ENOUGH, *case), on_one(*case)
  assert_same(actual, expected)
  assert actual[2] is None if name == 'ring' else actual[2] == 0


@pytest.mark.parametrize('name', TRANSPORTS)
@pytest.mark.parametrize('picks', ['one device', 'nobody', 'one token'])
def test_lopsided_picks(name, picks):
  expert_BTK = np.full((B, T, K), E)
  if picks == 'one device':
    expert_BTK[:] = np.arange(2) + 2
  elif picks == 'one token':
    expert_BTK[5, 3] = 7, 1
  case = inputs(1, expert_BTK)
  assert_same(on_four(name, ENOUGH, *case), on_one(*case))


def kept(name: str, capacity: float, expert_BTK) -> np.ndarray:
  """The picks that have room, pick by pick."""
  room = np.zeros((X, X), int) if name == 'padded' else np.zeros(X, int)
  most = transport.up_to(M, capacity * M / X) if name == 'padded' else transport.up_to(X * M, capacity * M)
  expert_XM = expert_BTK.reshape(X, M)
  keep_XM = np.zeros_like(expert_XM, bool)
  for source in range(X):
    for m, expert in enumerate(expert_XM[source]):
      if expert < E:
        at = (source, expert // (E // X)) if name == 'padded' else expert // (E // X)
        keep_XM[source, m] = room[at] < most
        room[at] += keep_XM[source, m]
  return keep_XM.reshape(expert_BTK.shape)


@pytest.mark.parametrize('name', ['padded', 'ragged'])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), skew=st.integers(0, 3))
def test_what_has_no_room_is_dropped_and_counted(name, seed, skew):
  """Without the dropped picks one device computes the same."""
  expert_BTK = random_picks(seed)
  crowd = np.random.default_rng(seed).random((B, T, 1)) < skew / 3
  expert_BTK = np.where(crowd & (expert_BTK < E), np.arange(2) + 4, expert_BTK)
  case = inputs(seed, expert_BTK)
  keep_BTK = kept(name, 1.0, expert_BTK)
  actual = on_four(name, 1.0, *case)
  expected = on_one(case[0], np.where(keep_BTK, expert_BTK, E).astype(np.int32), case[2])
  assert_same(actual, expected)
  assert actual[2] == (~keep_BTK & (expert_BTK < E)).sum()
  if skew == 3:
    assert actual[2] > 0


def test_ragged_exchange_of_cpus():
  """Slices of every length between every pair, by hand."""
  size_XX = np.array([[0, 2, 1, 3], [4, 0, 0, 1], [1, 1, 1, 1], [0, 0, 5, 0]])      # from device, to device
  start_XX, at_XX = np.cumsum(size_XX, 1) - size_XX, np.cumsum(size_XX, 0) - size_XX
  rows_XR = np.arange(4 * 6 * 2, dtype=np.float32).reshape(4, 6, 2)
  expected = np.full((4, 8, 2), -1, np.float32)
  for source in range(4):
    for to in range(4):
      n, start, at = size_XX[source, to], start_XX[source, to], at_XX[source, to]
      expected[to, at:at + n] = rows_XR[source, start:start + n]
  with mesh(1, 1, X):
    sharded = jax.P('expert')
    def fn(rows, start, size, at, came):
      out = jnp.full((8, 2), -1.0)
      return transport.ragged_on_cpu(rows[0], out, start[0], size[0], at[0], came[0], axis_name='expert')[None]
    args = [jax.device_put(a, sharded) for a in (rows_XR, start_XX, size_XX, at_XX, size_XX.T)]
    actual = jax.jit(jax.shard_map(fn, in_specs=(sharded,) * 5, out_specs=sharded, check_vma=False))(*args)
  np.testing.assert_array_equal(actual, expected)
