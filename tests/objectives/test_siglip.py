"""The sigmoid loss against a double loop over pairs, on one device and spread over several."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax import sharding
from keye_jax.objectives.siglip import sigmoid_pairs
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close


def pairs(N=8, E=6, padding=()):
  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  image_NE, text_NE = (unit(rng.normal(size=(N, E))).astype(np.float32) for _ in range(2))
  pair_N = np.ones(N, np.float32)
  pair_N[list(padding)] = 0
  return image_NE, text_NE, np.float32(1.7), np.float32(-2.5), pair_N


def loop(image_NE, text_NE, log_scale, bias, pair_N):
  """(loss, its derivatives by pictures, texts, log_scale and bias), one pair after the other, in float64."""
  image_NE, text_NE, t, b = image_NE.astype(float), text_NE.astype(float), math.exp(log_scale), float(bias)
  real = np.flatnonzero(pair_N)
  loss, image, text, scale, shift = 0.0, np.zeros_like(image_NE), np.zeros_like(text_NE), 0.0, 0.0
  for i in real:
    for j in real:
      similar, y = float(np.dot(image_NE[i], text_NE[j])), 1 if i == j else -1
      z = t * similar + b
      loss += math.log(1 + math.exp(-y * z)) / len(real)
      dz = -y / (1 + math.exp(y * z)) / len(real)
      image[i] += dz * t * text_NE[j]
      text[j] += dz * t * image_NE[i]
      scale += dz * t * similar
      shift += dz
  return loss, (image, text, scale, shift)


def value_and_grad(image_NE, text_NE, log_scale, bias, pair_N):
  rows = lambda x: sharding.constrain(jnp.asarray(x), 'train', 'batch', *(None,) * (x.ndim - 1))
  loss = lambda *x: sigmoid_pairs('train', *x, rows(pair_N))
  args = rows(image_NE), rows(text_NE), jnp.asarray(log_scale), jnp.asarray(bias)
  (value, metrics), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*args)
  return jax.tree.map(np.asarray, (value, metrics, grads))


def test_two_pairs_by_hand():
  """Own similarity 1, other 0, t = 1, b = 0: each picture adds log(1 + 1/e) and log 2."""
  x = jnp.eye(2)
  loss, metrics = sigmoid_pairs('train', x, x, jnp.float32(0), jnp.float32(0), jnp.ones(2))
  assert float(loss) == pytest.approx(math.log(1 + math.exp(-1)) + math.log(2), rel=1e-6)
  assert [float(v) for v in metrics['accuracy']] == [2, 2] and float(metrics['temperature'][0]) == 1


@pytest.mark.parametrize('shape', [None, (2, 1, 1), (4, 1, 1), (2, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize('padding', [(), (0, 5)])
def test_loss_and_gradient_are_those_of_a_double_loop(shape, padding):
  given = pairs(padding=padding)
  if shape:
    with mesh(*shape):
      value, metrics, grads = value_and_grad(*given)
  else:
    value, metrics, grads = value_and_grad(*given)
  expected, by = loop(*given)
  assert_close(value, expected, what='loss')
  for got, want, name in zip(grads, by, ('image', 'text', 'log_scale', 'bias')):
    assert_close(got, want, what=name)
  total, count = metrics['loss']
  assert count == 8 - len(padding) and total / count == pytest.approx(float(value), rel=1e-6)


def test_accuracy_counts_own_captions_among_real_ones():
  image_NE = text_NE = np.eye(3, dtype=np.float32)
  text_NE = text_NE[[0, 2, 1]]                                 # the second and third captions are swapped
  right = lambda pair: sigmoid_pairs('train', *map(jnp.asarray, (image_NE, text_NE, 0.0, 0.0, np.float32(pair))))[1]
  assert [float(v) for v in right([1, 1, 1])['accuracy']] == [1, 3]
  assert [float(v) for v in right([1, 1, 0])['accuracy']] == [1, 2]


def test_nothing_to_compare_costs_nothing():
  loss, _ = sigmoid_pairs('train', jnp.eye(2), jnp.eye(2), jnp.float32(1), jnp.float32(0), jnp.zeros(2))
  assert float(loss) == 0
