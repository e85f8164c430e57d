"""What the indexer selects, layer by layer: for reports and analysis, where T x S fits.

B batch, T query time, S key time (the same tokens), L layers, F rotary frequencies.
"""
import functools

import jax
import jax.numpy as jnp

from data_pipelines.schema import Batch
from keye_jax.config import ModelConfig
from keye_jax.nn import decoder, layers, rope
from keye_jax.nn.attention import Context, Indexer
from keye_jax.nn.keye import pixels, place
from keye_jax.nn.vision import Projector, Vision
from pallas_kernels.index_select import index_select, select_mask

SCORES = 'reference'    # select_mask scores with the reference; a threshold from other bits could lose the last key


@functools.partial(jax.jit, static_argnums=0)
def selections(config: ModelConfig, params, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """(bool [L, B, T, S]: the keys that each query attends to, hidden_BTD after the final norm). Without a mesh.

  The hidden states are those of `keye.apply` on the same input: a test holds the two together.
  """
  c, text = config, config.text
  segment, order = batch.segment_BT, batch.order_BT
  x_BTD, ctx = start(config, params, batch)
  index = ctx.index_cos_BTF, ctx.index_sin_BTF
  masks = []
  for i in range(text.layers):
    own = jax.tree.map(lambda a: a[i], params['layers'])
    normed = layers.rms_norm(x_BTD, own['attn_norm'], text.norm_eps)
    iq, ik, gate = Indexer(c).apply({'params': own['attn']['indexer']}, normed, *index)
    where = segment, segment, order, order
    selection = index_select(iq, ik, gate, *where, topk=text.indexer.topk, implementation=SCORES)
    masks.append(select_mask(selection, iq, ik, gate, *where))
    x_BTD, _ = decoder.Block(c).apply({'params': own}, x_BTD, ctx, None)
  return jnp.stack(masks), layers.rms_norm(x_BTD, params['norm'], text.norm_eps)


def start(config: ModelConfig, params, batch: Batch) -> tuple[jax.Array, Context]:
  """(hidden states before the first block, what all blocks share). Without a mesh, without a cache."""
  text = config.text
  is_text_BT = batch.vision_BT < 0
  x_BTD = decoder.lookup(config, params['embed'].astype(config.dtype), batch.token_BT, is_text_BT)
  if config.vision.layers and batch.patch_BRNC.shape[1]:
    features = Vision(config).apply({'params': params['vision']}, pixels(config, batch.patch_BRNC), batch.coord_BRN4,
                                    batch.frame_BRN)
    seen_BMD = Projector(config).apply({'params': params['projector']}, features)
    x_BTD = jnp.where(is_text_BT[..., None], x_BTD, place(config, seen_BMD, batch.vision_BT))
  tables = functools.partial(rope.tables, batch.position_BT3)
  main = tables(text.head_dim, text.rope_theta, text.mrope_section, text.mrope_interleaved)
  index = None, None
  if text.indexer.heads:
    section = rope.scale_section(text.mrope_section, text.head_dim, text.indexer.head_dim)
    index = tables(text.indexer.head_dim, text.rope_theta, section, text.mrope_interleaved)
  segment, order = batch.segment_BT, batch.order_BT
  return x_BTD, Context(*main, *index, segment, order, segment, order, None)
