"""Native-resolution vision tower (SigLIP shape) and the projector into the language model.

Images and frames of any size are packed into vision rows; a patch attends to the patches of its own frame. Positions
twice: a learned grid interpolated to each frame's own (rows, columns), and two-axis RoPE in every layer.

B batch, R vision rows, N patches of a row, C values of a patch, W width, H heads, K head dim, F ffn width, Q cells of
the learned grid, M merged tokens of a batch row (R * N / merge**2), D embed of the language model.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import layers, rope
from pallas_kernels.dense_attention import dense_attention


def grid_weights(coord_4: jax.Array, grid: int) -> jax.Array:
  """Bilinear weights (align_corners=False) of each patch over a grid x grid table: [..., N, 4] -> [..., N, Q].

  As a product of two one-axis weights, so that reading the table is a matmul and its gradient needs no scatter.
  """
  def axis(index, size):
    place = jnp.clip((index.astype(jnp.float32) + 0.5) * grid / jnp.maximum(size, 1) - 0.5, 0, grid - 1)
    return jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(grid, dtype=jnp.float32)), 0)

  row, column = axis(coord_4[..., 0], coord_4[..., 2]), axis(coord_4[..., 1], coord_4[..., 3])
  return (row[..., :, None] * column[..., None, :]).reshape(*coord_4.shape[:-1], grid * grid)


def frame_attention(q_BRNHK, k_BRNHK, v_BRNHK, frame_BRN) -> jax.Array:
  """Full attention inside each frame; on each device's own rows."""
  B, R, N = frame_BRN.shape
  rows = lambda a: a.reshape(B * R, *a.shape[2:])
  segment = rows(frame_BRN) << 8
  order = jnp.zeros_like(segment)
  o, _ = dense_attention(rows(q_BRNHK), rows(k_BRNHK), rows(v_BRNHK), segment, segment, order, order, causal=False)
  return o.reshape(q_BRNHK.shape)


class VisionBlock(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BRNW, cos_BRNF, sin_BRNF, frame_BRN):
    c, v = self.config, self.config.vision
    W, H, K, F = v.embed, v.heads, v.embed // v.heads, v.ffn
    init = nn.initializers.normal(W ** -0.5)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros

    def param(name, init, *shape, axes=None):
      return sharding.param(self, name, init, shape, axes or ('embed',) + (None,) * (len(shape) - 1), c)

    def norm(name, x):
      return layers.layer_norm(x, param(f'{name}_scale', ones, W, axes=(None,)),
                               param(f'{name}_bias', zeros, W, axes=(None,)), v.norm_eps)

    def heads(name, x_BRNW):
      return (layers.project(x_BRNW, param(name, init, W, H, K))
              + param(f'{name}_bias', zeros, H, K, axes=(None, None)))

    y_BRNW = norm('norm1', x_BRNW)
    q, k, val = (heads(name, y_BRNW) for name in 'qkv')
    q, k = rope.rotate(q, cos_BRNF, sin_BRNF), rope.rotate(k, cos_BRNF, sin_BRNF)
    frames = ('batch', 'frames', None)
    rows = (*frames, None, None)
    o_BRNHK = sharding.local(frame_attention, c.layout, (rows, rows, rows, frames), rows)(q, k, val, frame_BRN)
    o_HKW = param('o', layers.residual_init(W, v.layers), H, K, W, axes=(None, None, 'embed'))
    x_BRNW += (layers.project(o_BRNHK, o_HKW, 2) + param('o_bias', zeros, W, axes=(None,)))
    y_BRNW = norm('norm2', x_BRNW)
    h = layers.project(y_BRNW, param('fc1', init, W, F)) + param('fc1_bias', zeros, F, axes=(None,))
    h = jax.nn.gelu(h, approximate=True)
    return x_BRNW + (layers.project(h, param('fc2', layers.residual_init(F, v.layers), F, W, axes=(None, 'embed')))
                     + param('fc2_bias', zeros, W, axes=(None,)))


class Vision(nn.Module):
  """(patch_BRNC normalised pixels, coord_BRN4, frame_BRN) -> features [B, R, N, W]."""
  config: ModelConfig

  @nn.compact
  def __call__(self, patch_BRNC, coord_BRN4, frame_BRN):
    c, v = self.config, self.config.vision
    W, C, Q = v.embed, v.patch_dim, v.grid ** 2
    patch_CW = sharding.param(self, 'patch', nn.initializers.normal(C ** -0.5), (C, W), (None, 'embed'), c)
    bias_W = sharding.param(self, 'patch_bias', nn.initializers.zeros, (W,), (None,), c)
    position_QW = sharding.param(self, 'position', nn.initializers.normal(W ** -0.5), (Q, W), (None, 'embed'), c)
    if v.packing_positions:
      self.param('packing_position', lambda key: sharding.constrain(
          jnp.zeros((v.packing_positions, W), c.param_dtype), c.layout, None, 'embed'))
    x_BRNW = jnp.einsum('BRNC,CW->BRNW', patch_BRNC.astype(c.dtype), patch_CW) + bias_W
    x_BRNW += jnp.einsum('BRNQ,QW->BRNW', grid_weights(coord_BRN4, v.grid).astype(c.dtype), position_QW)
    cos_BRNF, sin_BRNF = rope.vision_tables(coord_BRN4, W // v.heads, v.rope_theta)

    block = VisionBlock(c, parent=None)
    shared = (cos_BRNF, sin_BRNF, frame_BRN)

    def init_layers(key):
      return jax.lax.map(lambda k: block.init(k, x_BRNW, *shared)['params'], jax.random.split(key, v.layers))

    def step(x_BRNW, params):
      return block.apply({'params': params}, x_BRNW, *shared), None

    if self.is_initializing():
      params = self.param('layers', init_layers)
    else:
      params = self.get_variable('params', 'layers')
    x_BRNW, _ = jax.lax.scan(layers.remat(c.remat, step), x_BRNW, params)
    return layers.layer_norm(x_BRNW, sharding.param(self, 'post_norm_scale', nn.initializers.ones, (W,), (None,), c),
                             sharding.param(self, 'post_norm_bias', nn.initializers.zeros, (W,), (None,), c),
                             v.norm_eps)


class Projector(nn.Module):
  """features [B, R, N, W] with the patches of a token adjacent -> language tokens [B, M, D]."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BRNW):
    c, v = self.config, self.config.vision
    merged, D = v.merge ** 2 * v.embed, c.text.embed
    x = sharding.local(lambda a: a.reshape(a.shape[0], -1, merged), c.layout,
                       (('batch', 'frames', None, None),), ('batch', 'frames', None))(x_BRNW)

    def param(name, init, *shape, axes=(None,)):
      return sharding.param(self, name, init, shape, axes, c)

    x = layers.layer_norm(x, param('norm_scale', nn.initializers.ones, merged),
                          param('norm_bias', nn.initializers.zeros, merged), v.projector_eps)
    init = nn.initializers.normal(merged ** -0.5)
    x = jnp.einsum('BMA,AC->BMC', x, param('fc1', init, merged, merged, axes=('embed', None)))
    x = jax.nn.gelu(x + param('fc1_bias', nn.initializers.zeros, merged), approximate=False)
    return (jnp.einsum('BMA,AD->BMD', x, param('fc2', init, merged, D, axes=('embed', None)))
            + param('fc2_bias', nn.initializers.zeros, D))
