"""Frames that travel to other devices and back: what the tower says of each, and its gradient, is what it says at home.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax import sharding
from keye_jax.nn import exchange
from tests.nn import batches
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close

B, R, N, C, D, UNIT = 8, 4, 16, batches.VISION.patch_dim, 4, 4
ROOM = 0.75


def frames(rows: int, full: int) -> np.ndarray:
  """Numbers of the frames in vision rows, of 1 to 4 units each, in so many batch rows, of which so many are full."""
  rng, frame_BRN = np.random.default_rng(0), np.zeros((B, R, N), np.int32)
  for b in range(rows):
    for r in range(R):
      at, number = 0, 0
      while (size := UNIT * int(rng.integers(1, 5))) <= N - at and (b < full or number < 1):
        number += 1
        frame_BRN[b, r, at:at + size] = number
        at += size
  return frame_BRN


@functools.partial(jax.jit, static_argnums=0)
def run(config, weight_CD, patch_BRNC, coord_BRN4, frame_BRN, dy_BMD):
  """(units seen [B, M, D], the gradient of the tower's weight, Stayed or None): a tower whose every output depends on
  the whole frame."""
  flat = sharding.local(lambda a: a.reshape(a.shape[0], -1, UNIT * a.shape[-1]), config.layout,
                        ((*exchange.AT_HOME, None),), exchange.AT_HOME)

  def tower(weight_CD, patch_BRNC, coord_BRN4, frame_BRN):
    x_BRNC = patch_BRNC / 255 + coord_BRN4.sum(-1, keepdims=True) / 32 - 1
    same_BRNM = (frame_BRN[..., None] == frame_BRN[..., None, :]) & (frame_BRN > 0)[..., None]
    y_BRND = jnp.einsum('BRNC,CD->BRND', x_BRNC + jnp.einsum('BRNM,BRMC->BRNC', same_BRNM / N, x_BRNC), weight_CD)
    return flat(jnp.tanh(y_BRND / 4))

  def seen(weight_CD):
    bound = functools.partial(tower, weight_CD)
    if sharding.has_mesh():
      y_BMD, stayed = exchange.balanced(config, bound, patch_BRNC, coord_BRN4, frame_BRN)
    else:
      y_BMD, stayed = bound(patch_BRNC, coord_BRN4, frame_BRN), None
    return jnp.sum(y_BMD * dy_BMD), (y_BMD, stayed)
  grad_CD, (y_BMD, stayed) = jax.grad(seen, has_aux=True)(weight_CD)
  return y_BMD, grad_CD, stayed


def on(shape, frame_BRN) -> exchange.Stayed:
  """Compares with one device."""
  rng = np.random.default_rng(1)
  real_BM = frame_BRN.reshape(B, -1)[:, ::UNIT] > 0
  arrays = (rng.normal(size=(C, D)).astype(np.float32), rng.integers(0, 256, (B, R, N, C), np.uint8),
            rng.integers(0, 9, (B, R, N, 4)).astype(np.int32), frame_BRN,
            (rng.normal(size=(*real_BM.shape, UNIT * D)) * real_BM[..., None]).astype(np.float32))
  config = dataclasses.replace(batches.CONFIG, vision_balance=ROOM)
  expected = run(batches.CONFIG, *arrays)
  with mesh(*shape):
    home = exchange.AT_HOME
    axes = (None, None), (*home, None), (*home, None), home, home
    placed = [jax.device_put(a, sharding.spec('train', *names)) for a, names in zip(arrays, axes)]
    y_BMD, grad_CD, stayed = jax.tree.map(np.asarray, run(config, *placed))
  assert_close(y_BMD[real_BM], np.asarray(expected[0])[real_BM])
  assert_close(grad_CD, expected[1])
  assert stayed.all == real_BM.sum()
  return stayed


@pytest.mark.parametrize('shape', [(2, 1, 4), (1, 4, 2), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_frame_is_seen_elsewhere_as_at_home(shape):
  """Four rows of eight have none, two would fill all slots of their devices."""
  assert on(shape, frames(4, 2)).stayed == 0


def test_all_frames_stay_at_home_when_they_do_not_fit():
  stayed = on((2, 1, 4), frames(B, B))
  assert stayed.stayed == stayed.all > ROOM * B * R * N / UNIT
