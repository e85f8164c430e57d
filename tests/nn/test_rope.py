"""Rotary tables against slow independent formulas."""
import numpy as np
import pytest

from keye_jax.nn import rope
from tests.tolerances import assert_close


def test_contiguous_and_interleaved_axes():
  np.testing.assert_array_equal(rope.axis_of_frequency((2, 3, 3), False), [0, 0, 1, 1, 1, 2, 2, 2])
  # Qwen3-VL's order: t h w t h w, height and width to the length of their section, time after them
  np.testing.assert_array_equal(rope.axis_of_frequency((4, 2, 2), True), [0, 1, 2, 0, 1, 2, 0, 0])


def test_rotation_is_complex_multiplication():
  rng = np.random.default_rng(0)
  K, section, theta = 16, (2, 3, 3), 1e4
  position, x = rng.integers(0, 50, (1, 5, 3)), rng.normal(size=(1, 5, 2, K)).astype(np.float32)
  got = rope.rotate(x, *rope.tables(position, K, theta, section))
  axis = [0] * 2 + [1] * 3 + [2] * 3
  for t in range(5):
    for f in range(K // 2):
      angle = position[0, t, axis[f]] * theta ** (-2 * f / K)
      z = (x[0, t, :, f] + 1j * x[0, t, :, f + K // 2]) * np.exp(1j * angle)
      assert_close(np.stack([np.asarray(got[0, t, :, f]), np.asarray(got[0, t, :, f + K // 2])]), [z.real, z.imag])


def test_equal_axes_are_plain_rope():
  position = np.repeat(np.arange(7)[None, :, None], 3, -1)
  plain, three = rope.tables(position, 16, 1e6), rope.tables(position, 16, 1e6, (2, 3, 3))
  for a, b in zip(plain, three):
    assert_close(a, b)


def test_indexer_sections():
  assert rope.scale_section((16, 24, 24), 128, 64) == (8, 12, 12)
  with pytest.raises(ValueError, match='does not scale'):
    rope.scale_section((2, 3, 3), 16, 8)
