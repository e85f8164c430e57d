"""Rotary positions: 1-D, three-axis M-RoPE, and the two-axis form of the vision tower. All rotate-half (neox).

B batch, T time, K head dim, F = K / 2 frequencies, H heads.
"""
import jax
import jax.numpy as jnp
import numpy as np


def axis_of_frequency(section: tuple[int, ...], interleaved: bool) -> np.ndarray:
  """Which of (time, height, width) turns each frequency, [F] of 0..2.

  Contiguous: the first section[0] frequencies follow time, the next section[1] height, the rest width.
  Interleaved (Qwen3-VL): t h w t h w ..., time alone after the shorter sections are used up.
  """
  if not interleaved:
    return np.repeat(np.arange(3), section)
  axis_F = np.zeros(sum(section), np.int64)
  for axis in (1, 2):
    axis_F[axis:3 * section[axis]:3] = axis
  return axis_F


def scale_section(section: tuple[int, ...], head_dim: int, new_dim: int) -> tuple[int, ...]:
  """The sections of another head width, e.g. (16, 24, 24) of 128 -> (8, 12, 12) of 64 for the indexer.

  Raises ValueError when they do not scale to whole numbers.
  """
  scaled = tuple(s * new_dim // head_dim for s in section)
  if section and sum(scaled) * 2 != new_dim:
    raise ValueError(f'mrope_section {section} of head_dim {head_dim} does not scale to head_dim {new_dim}')
  return scaled


def tables(position_BT3: jax.Array, head_dim: int, theta: float, section: tuple[int, ...] = (),
           interleaved: bool = False) -> tuple[jax.Array, jax.Array]:
  """(cos_BTF, sin_BTF) in float32. No section: plain RoPE on the time axis."""
  frequency_F = jnp.asarray(theta ** (-np.arange(0, head_dim, 2) / head_dim), jnp.float32)
  if section:
    axis_F = axis_of_frequency(section, interleaved)
    select_3F = jnp.asarray(axis_F == np.arange(3)[:, None], jnp.float32)
    # exact: each frequency meets one axis, and positions below 2**24 are whole floats
    position_BTF = jnp.einsum('BTa,aF->BTF', position_BT3.astype(jnp.float32), select_3F,
                              precision=jax.lax.Precision.HIGHEST)
  else:
    position_BTF = position_BT3[..., :1].astype(jnp.float32)
  angle_BTF = position_BTF * frequency_F
  return jnp.cos(angle_BTF), jnp.sin(angle_BTF)


def vision_tables(coord_4: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """coord [..., N, 4] of (row, column, rows, columns) -> (cos, sin) [..., N, K / 2]: row angles, then column angles."""
  half = head_dim // 2
  frequency = jnp.asarray(theta ** (-np.arange(0, half, 2) / half), jnp.float32)
  row, column = coord_4[..., 0:1].astype(jnp.float32), coord_4[..., 1:2].astype(jnp.float32)
  angle = jnp.concatenate([row * frequency, column * frequency], -1)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """x [..., H, K] by tables [..., F]; float32 inside, x's dtype out."""
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
