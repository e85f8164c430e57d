"""Two towers that learn which caption belongs to which picture: where the vision tower's own training happens.

SigLIP (arXiv 2303.15343) at native resolution. A row of the batch packs pictures of any size with their captions, as
for the language model. What a picture's sample has the assistant say is its caption. The text tower is the decoder by
its config, dense and causal; it sees the caption alone, and runs over the whole row, whose other places are padding to
it. Both embeddings are means over the places of a sample, of length 1. Mean, not SigLIP's attention pooling: Keye keeps
the tower and reads the feature of every patch, so what is compared should lie in them and not in a head that is thrown
away.

B batch rows, T time, S samples of a row, R vision rows, N patches of a vision row, W vision width, M merged vision
tokens of a row, D text width, V vocabulary.
"""
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_pipelines.schema import BRANCH_BITS, Batch
from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import decoder, keye, layers
from keye_jax.nn.vision import Vision

SCALE, BIAS = math.log(10.0), -10.0       # arXiv 2303.15343 section 3.2: nearly all pairs do not belong together


class Output(NamedTuple):
  image_BSW: jax.Array       # float32, of length 1; 0 where there is no pair
  text_BSW: jax.Array        # likewise
  pair_BS: jax.Array         # float32: 1 for a sample with a picture and a caption
  log_scale: jax.Array       # float32 scalar; exp of it multiplies similarities
  bias: jax.Array            # float32 scalar; added to them


class Text(nn.Module):
  """(caption tokens, of which place which is one, batch) -> features [B, T, W]."""
  config: ModelConfig

  @nn.compact
  def __call__(self, token_BT, caption_BT, batch: Batch):
    c, text = self.config, self.config.text
    embed_VD = sharding.param(self, 'embed', nn.initializers.normal(1.0), (text.vocab, text.embed), (None, 'embed'), c)
    x_BTD = decoder.lookup(c, embed_VD, token_BT, caption_BT)
    if self.is_initializing():
      layer_params = self.param('layers', lambda key: decoder.init_layers(c, key))
    else:
      layer_params = self.get_variable('params', 'layers')
    segment_BT = jnp.where(caption_BT, batch.segment_BT, 0)
    x_BTD, _, _ = decoder.run(c, layer_params, x_BTD, batch.position_BT3, segment_BT, batch.order_BT)
    norm_D = sharding.param(self, 'norm', nn.initializers.ones, (text.embed,), (None,), c)
    out_DW = sharding.param(self, 'out', nn.initializers.normal(text.embed ** -0.5), (text.embed, c.vision.embed),
                            ('embed', None), c)
    return layers.project(layers.rms_norm(x_BTD, norm_D, text.norm_eps), out_DW)


class Contrast(nn.Module):
  """Batch -> Output, for at most `samples` samples in a row."""
  config: ModelConfig
  samples: int

  @nn.compact
  def __call__(self, batch: Batch) -> Output:
    c, v = self.config, self.config.vision
    sample_BT = batch.segment_BT >> BRANCH_BITS
    features_BRNW = Vision(c, name='vision')(keye.pixels(c, batch.patch_BRNC), batch.coord_BRN4, batch.frame_BRN)
    merge = lambda x: x.reshape(x.shape[0], -1, v.merge ** 2, v.embed).mean(2)
    rows = 'batch', 'frames', None
    seen_BMW = sharding.constrain(sharding.local(merge, c.layout, ((*rows, None),), rows)(features_BRNW), c.layout,
                                  'batch', None, None)
    seen_BT = batch.vision_BT >= 0
    image_BSW, patches_BS = pool(c, self.samples, keye.place(c, seen_BMW, batch.vision_BT),
                                 jnp.where(seen_BT, sample_BT, 0))
    # The target of a place is the next token, so where targets have weight they are the caption: nothing is shifted.
    caption_BT = batch.weight_BT > 0
    text_BTW = Text(c, name='text')(batch.target_BT, caption_BT, batch)
    text_BSW, tokens_BS = pool(c, self.samples, text_BTW, jnp.where(caption_BT, sample_BT, 0))
    pair_BS = ((patches_BS > 0) & (tokens_BS > 0)).astype(jnp.float32)
    number = lambda name, value: self.param(name, lambda key: sharding.constrain(
        jnp.full((1,), value, jnp.float32), c.layout, None))[0]
    return Output(unit(image_BSW) * pair_BS[..., None], unit(text_BSW) * pair_BS[..., None], pair_BS,
                  number('log_scale', SCALE), number('bias', BIAS))


def pool(config: ModelConfig, samples: int, x_BTW: jax.Array, sample_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean of x over the places of sample 1, 2, ... of a row, 0 where it has none, and how many there are: float32
  ([B, S, W], [B, S])."""
  member_BTS = (sample_BT[..., None] == 1 + jnp.arange(samples, dtype=sample_BT.dtype)).astype(jnp.float32)
  total_BSW = jnp.einsum('BTS,BTW->BSW', member_BTS, x_BTW.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST,
                         out_sharding=sharding.out(config.layout, 'batch', None, None))
  count_BS = member_BTS.sum(1)
  return total_BSW / jnp.maximum(count_BS, 1)[..., None], count_BS


def unit(x: jax.Array) -> jax.Array:
  """x of length 1 along its last axis; 0 stays 0, with a finite gradient."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Random parameters, born sharded: `vision` as the language model's, `text`, and the two numbers of the loss."""
  return jax.jit(lambda key: Contrast(config, 1).init(key, keye.smallest_batch(config))['params'])(key)


def param_shapes(config: ModelConfig) -> dict[str, Any]:
  """The parameter tree as ShapeDtypeStructs (with shardings under a mesh); allocates nothing."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(lambda k: Contrast(config, 1).init(k, keye.smallest_batch(config))['params'], key)


def apply(config: ModelConfig, samples: int, params, batch: Batch) -> Output:
  """Pure forward pass."""
  return Contrast(config, samples).apply({'params': params}, batch)
