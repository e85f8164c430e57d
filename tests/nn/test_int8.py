"""A base in 8 bits: how far from its weights, and that the model with adapters is that of the weights it stands for."""
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_jax import feed
from keye_jax.config import LoraConfig, RunConfig, TrainConfig
from keye_jax.hf import writer
from keye_jax.nn import int8, keye, layers, lora
from keye_jax.sharding import Adapted
from keye_jax.steps import state as state_lib
from pallas_kernels.grouped_matmul import adapted_swiglu
from tests.nn import batches
from tests.nn.test_keye import with_mode
from tests.nn.test_lora import hidden, loss
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close

# A pair beside one of the two matrices of experts; everything of the layers is in 8 bits all the same.
SOME = LoraConfig(targets=('layers/attn/*', 'layers/mlp/down', 'vision/*'), rank=3, alpha=6.0, base='int8')
CONFIG = with_mode('dense')
RUN = RunConfig(model=CONFIG, lora=SOME)


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(np.asarray, keye.init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope='module')
def eight(params):
  return int8.quantised(lora.in_int8(RUN), jax.tree.map(jnp.asarray, params))


def plain(model, eight):
  """The float weights that a base in 8 bits stands for."""
  return lora.merged(SOME, model, jax.tree.map(jnp.copy, eight))


def pairs(params):
  """Adapters with both halves random."""
  noise = lambda x: x + 0.2 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)
  return jax.tree.map(noise, lora.init(SOME, CONFIG, params, jax.random.key(1)))


def adapted(params, own):
  return lora.scaled(SOME, state_lib.merge(params, own))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(-40, 40), st.booleans())
def test_a_weight_is_missed_by_half_a_step_at_most(seed, exponent, same_size):
  """Whatever its size, by the step of each channel; a channel of zeros stays one. [layers 2, experts 3, in 4, out 5]"""
  rng = np.random.default_rng(seed)
  w = (rng.standard_t(2, (2, 3, 4, 5)) * 2.0 ** exponent).astype(np.float32)
  w[0, 1, :, 2] = 0
  w[1, 2, :, 3] *= 1 if same_size else 1e4
  q, scale = map(np.asarray, int8.quantise(w, 2, 1))
  assert q.dtype == np.int8 and q.shape == w.shape and scale.shape == (2, 3, 5) and scale.dtype == np.float32
  assert (np.abs(q.astype(np.int32)).max(2)[scale > 0] == int8.LARGEST).all() and not q[0, 1, :, 2].any()
  np.testing.assert_allclose(scale, np.abs(w).max(2) / int8.LARGEST, rtol=1e-6)
  meant = np.asarray(int8.dequantised(q, scale, 2))
  assert (np.abs(meant - w) <= scale[:, :, None] * (0.5 + 1e-4)).all()
  again = int8.quantise(meant, 2, 1)
  np.testing.assert_array_equal(again.q, q)


def test_what_is_in_8_bits(params, eight):
  found = {path: x.dtype for path, x in writer.flatten(eight).items()}
  wanted = set(lora.weights(CONFIG))
  assert {path for path, dtype in found.items() if dtype == np.int8} == wanted and len(wanted) == 12
  assert set(found) - set(writer.flatten(params)) == {f'{path}_int8_scale' for path in wanted}
  train = TrainConfig(freeze=('!layers/mlp', '!vision/layers/fc1'))
  run = RunConfig(model=CONFIG, lora=dataclasses.replace(SOME, targets=('layers/attn/q',)), train=train)
  assert wanted - set(lora.in_int8(run)) == {'layers/mlp/gate_up', 'layers/mlp/down', 'vision/layers/fc1'}
  assert not lora.in_int8(dataclasses.replace(run, lora=dataclasses.replace(run.lora, base='float')))


def test_read_a_layer_at_a_time_it_is_the_same_bits(params, eight):
  """As from a folder, where a weight is never whole in float."""
  flat, most = writer.flatten(params), []

  def place(path, shape, dtype, fetch):
    return jax.device_put(fetch(tuple(slice(0, n) for n in shape)))

  put = int8.placing(lora.in_int8(RUN), lambda model: place)(CONFIG)
  for path, w in flat.items():
    def fetch(index, w=w, path=path):
      most.append((path, w[index].size))
      return w[index]
    found = put(path, w.shape, w.dtype, fetch)
    whole = writer.flatten(eight)
    if isinstance(found, int8.Eight):
      np.testing.assert_array_equal(found.q, whole[path])
      np.testing.assert_array_equal(found.scale, whole[f'{path}_int8_scale'])
    else:
      np.testing.assert_array_equal(found, whole[path])
  assert ('layers/mlp/gate_up', flat['layers/mlp/gate_up'].size // 2) in most
  assert ('layers/mlp/gate_up', flat['layers/mlp/gate_up'].size) not in most


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_the_weights_it_stands_for(params, eight):
  """With blocks computed again, as large models do; and the loss is near that of the float base."""
  config, batch, own = dataclasses.replace(CONFIG, remat='block'), batches.mixed(B=2), pairs(params)
  step = jax.jit(jax.value_and_grad(lambda own, base: loss(config, adapted(base, own), batch)))
  got, expected = step(own, eight), step(own, plain(CONFIG, eight))
  assert_close(got[0], expected[0])
  jax.tree_util.tree_map_with_path(lambda path, a, b: assert_close(a, b, what=str(path)), got[1], expected[1])
  floats = step(own, jax.tree.map(jnp.asarray, params))[0]
  assert 0 < abs(got[0] - floats) and abs(got[0] - floats) < 1e-2 * floats
  assert_close(got[0], floats, 'bfloat16')


def test_merged_it_is_what_the_model_computes(params, eight):
  own = pairs(params)
  merged = lora.merged(SOME, CONFIG, state_lib.merge(jax.tree.map(jnp.copy, eight), own))
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  got = hidden(CONFIG, adapted(eight, own))
  assert_close(got, hidden(CONFIG, merged))
  low = lora.merged(SOME, dataclasses.replace(CONFIG, param_dtype='bfloat16'),
                    state_lib.merge(jax.tree.map(jnp.copy, eight), own))
  for path, x in writer.flatten(low).items():
    if path in lora.weights(CONFIG):            # rounded once, of the sum
      np.testing.assert_array_equal(x, writer.flatten(merged)[path].astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize('shape, transport', [((2, 1, 1), 'local'), ((1, 1, 2), 'ring')])
def test_on_two_devices(params, eight, shape, transport):
  """Rows on two, or experts: made there, 8 bits and scales are the same; loss and gradients are those of one device."""
  batch, own = batches.mixed(B=2), pairs(params)
  step = lambda config: jax.jit(jax.value_and_grad(
      lambda own, base, batch: loss(config, adapted(base, own), batch)))
  expected = step(CONFIG)(own, eight, batch)
  host_own, host_batch = jax.tree.map(np.asarray, (own, batch))
  shared = dataclasses.replace(CONFIG, experts_transport=transport)
  run = dataclasses.replace(RUN, model=shared)
  with mesh(*shape):
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), params, keye.param_shapes(shared))
    born = jax.jit(functools.partial(lora.init, SOME, shared))(placed, jax.random.key(1))
    placed_own = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), host_own, born)
    base = int8.quantised(lora.in_int8(run), placed)
    experts = base['layers']['mlp']['gate_up_int8_scale'].sharding.spec
    assert experts == jax.P(None, 'expert', None), experts
    rows = feed.place('train', host_batch, *feed.share('train', 2))
    got = jax.tree.map(np.asarray, step(shared)(placed_own, base, rows))
    base = jax.tree.map(np.asarray, base)
  jax.tree.map(np.testing.assert_array_equal, base, jax.tree.map(np.asarray, eight))
  jax.tree_util.tree_map_with_path(lambda path, a, b: assert_close(a, b, what=str(path)), got, expected)


def test_no_float_copy_of_a_stack_exists():
  """Ahead of time, gradients of the pairs of layers in a scan, computed again as large models do: product, experts.
  What it needs beside its arguments and results is less than the matrices of one layer in float."""
  L, E, D, F, N = 8, 16, 128, 64, 8
  shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)

  def weight(*s, stack=1):
    scale = (L, *s[:stack - 1], s[-1])
    return Adapted(shape('int8', L, *s), shape('float32', L, *s[:-1], 1), shape('float32', L, *s[:stack - 1], 1, s[-1]),
                   shape('float32', *scale))

  def loss(pairs, weights, x_ND):
    def layer(x_ND, each):
      q, gate_up, down = (w._replace(a=a, b=b) for w, (a, b) in zip(*each))
      x_ND += jnp.tanh(layers.project(x_ND, q))
      expert_NK = jnp.argsort(x_ND[:, :E])[:, :2]
      return x_ND + adapted_swiglu(x_ND, expert_NK, jnp.ones((N, 2)), gate_up, down), None
    return jnp.sum(jax.lax.scan(layers.remat('block', layer), x_ND, (weights, pairs))[0])

  whole = weight(D, D), weight(E, D, 2 * F, stack=2), weight(E, F, D, stack=2)
  pairs = tuple((w.a, w.b) for w in whole)
  compiled = jax.jit(jax.grad(loss)).lower(pairs, whole, shape('float32', N, D)).compile()
  found, layer = compiled.memory_analysis().temp_size_in_bytes, 4 * sum(w.w.size for w in whole) // L
  assert found < layer / 2, (found, layer)
  floats = [tuple(map(int, s.split(','))) for s in re.findall(r'f32\[([\d,]+)\]', compiled.as_text())]
  assert max(map(math.prod, floats)) < E * F * D
