"""The vision-language model: batch in, hidden states and auxiliary sums out. Logits are formed in `head.py` only.

B batch, T time, D embed, V vocabulary, M merged vision tokens of a row.
"""
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_pipelines.schema import Batch
from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import decoder, exchange, layers
from keye_jax.nn.attention import KV
from keye_jax.nn.vision import Projector, Vision


class Output(NamedTuple):
  hidden_BTD: jax.Array      # after the final norm
  head_DV: jax.Array         # gathered, compute dtype
  aux: decoder.Aux | None    # None where only some tokens asked
  kv: KV | None              # of this pass's tokens, when asked for or when there was a cache
  stayed: exchange.Stayed | None = None      # vision tokens, where frames are spread over devices


class Keye(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, batch: Batch, cache: decoder.Cache | decoder.PagedCache | None = None,
               keep_kv: bool = False, asking_BQ: jax.Array | None = None) -> Output:
    c, text = self.config, self.config.text
    embed_VD = sharding.param(self, 'embed', nn.initializers.normal(text.embed ** -0.5 if text.tied_head else 1.0),
                              (text.vocab, text.embed), (None, 'embed'), c)
    is_text_BT = batch.vision_BT < 0
    x_BTD = decoder.lookup(c, embed_VD, batch.token_BT, is_text_BT)
    stayed = None
    if c.vision.layers and batch.patch_BRNC.shape[1]:
      seen_BMD, stayed = self.see(batch.patch_BRNC, batch.coord_BRN4, batch.frame_BRN)
      seen_BMD = sharding.constrain(seen_BMD, c.layout, 'batch', None, None)
      x_BTD = jnp.where(is_text_BT[..., None], x_BTD, place(c, seen_BMD, batch.vision_BT).astype(x_BTD.dtype))
    if self.is_initializing():
      layer_params = self.param('layers', lambda key: decoder.init_layers(c, key))
    else:
      layer_params = self.get_variable('params', 'layers')
    x_BTD, aux, kv = decoder.run(c, layer_params, x_BTD, batch.position_BT3, batch.segment_BT, batch.order_BT, cache,
                                 keep_kv, asking_BQ)
    norm_D = sharding.param(self, 'norm', nn.initializers.ones, (text.embed,), (None,), c)
    head_DV = embed_VD.T if text.tied_head else sharding.param(
        self, 'head', nn.initializers.normal(text.embed ** -0.5), (text.embed, text.vocab), ('embed', None), c)
    return Output(layers.rms_norm(x_BTD, norm_D, text.norm_eps), head_DV, aux, kv, stayed)

  def see(self, patch_BRNC, coord_BRN4, frame_BRN):
    """(merged vision tokens [B, M, D], Stayed or None)."""
    c = self.config
    if not c.vision_balance or not sharding.has_mesh() or self.is_initializing() or c.layout == 'decode':
      features = Vision(c, name='vision')(pixels(c, patch_BRNC), coord_BRN4, frame_BRN)
      return Projector(c, name='projector')(features), None
    vision, projector = (self.get_variable('params', name) for name in ('vision', 'projector'))

    def tower(patch_BRNC, coord_BRN4, frame_BRN):
      features = Vision(c, parent=None).apply({'params': vision}, pixels(c, patch_BRNC), coord_BRN4, frame_BRN)
      return Projector(c, parent=None).apply({'params': projector}, features)
    return exchange.balanced(c, tower, patch_BRNC, coord_BRN4, frame_BRN)


def pixels(config: ModelConfig, patch_BRNC: jax.Array) -> jax.Array:
  """uint8 patches as the vision tower takes them: float32, normalised."""
  return (patch_BRNC.astype(jnp.float32) / 255 - config.vision.mean) / config.vision.std


def place(config: ModelConfig, seen_BMD: jax.Array, vision_BT: jax.Array) -> jax.Array:
  """Merged vision tokens at their places in the row, zeros elsewhere: [B, T, D].

  Text places read distinct indices out of range, so that all indices are unique and the gradient's scatter is plain.
  """
  def fn(seen_BMD, vision_BT):
    M, T = seen_BMD.shape[1], vision_BT.shape[1]
    index_BT = jnp.where(vision_BT >= 0, vision_BT, M + jnp.arange(T, dtype=vision_BT.dtype))
    read = lambda seen_MD, index_T: seen_MD.at[index_T].get(mode='fill', fill_value=0, unique_indices=True)
    return jax.vmap(read)(seen_BMD, index_BT)

  return sharding.local(fn, config.layout, (('batch', None, None), ('batch', 'seq')), ('batch', 'seq', None))(
      seen_BMD, vision_BT)


def smallest_batch(config: ModelConfig) -> Batch:
  """Zeros of the smallest shape that fills the mesh and reaches every parameter."""
  B, T = sharding.extent(config.layout, 'batch'), sharding.extent(config.layout, 'seq')
  v = config.vision
  R, N = (sharding.extent(config.layout, 'frames'), v.merge ** 2) if v.layers else (0, 0)

  def zeros(dtype, *shape, axes):
    axes = axes + (None,) * (len(shape) - len(axes))
    return sharding.constrain(jnp.zeros(shape, dtype), config.layout, *axes)

  token, seen = ('batch', 'seq'), ('batch', 'frames')
  int_BT = zeros(jnp.int32, B, T, axes=token)
  return Batch(int_BT, int_BT, zeros(jnp.float32, B, T, axes=token), zeros(jnp.int32, B, T, 3, axes=token), int_BT,
               int_BT, int_BT - 1, zeros(jnp.uint8, B, R, N, v.patch_dim, axes=seen),
               zeros(jnp.int32, B, R, N, 4, axes=seen), zeros(jnp.int32, B, R, N, axes=seen), int_BT)


def init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Random parameters, born sharded: nested dict of arrays (layer stacks lead with L)."""
  def fn(key):
    return Keye(config).init(key, smallest_batch(config))['params']
  return jax.jit(fn)(key)


def param_shapes(config: ModelConfig) -> dict[str, Any]:
  """The parameter tree as ShapeDtypeStructs (with shardings under a mesh); allocates nothing."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(lambda k: Keye(config).init(k, smallest_batch(config))['params'], key)


def apply(config: ModelConfig, params, batch: Batch, cache: decoder.Cache | decoder.PagedCache | None = None,
          keep_kv: bool = False, asking_BQ: jax.Array | None = None) -> Output:
  """Pure forward pass. With a cache, the batch's tokens attend to the cache and to each other; `Output.kv` then goes
  into `decoder.extend` or `extend_pages`. asking_BQ: places of the tokens whose hidden states are wanted, which are
  then [B, Q, D]; the last block leaves out all others, and nothing is learnt (`decoder.run`)."""
  return Keye(config).apply({'params': params}, batch, cache, keep_kv, asking_BQ)
