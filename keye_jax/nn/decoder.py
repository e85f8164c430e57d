"""The decoder stack: token lookup, blocks scanned over layers, caches as arguments.

B batch, T query time, S key time, D embed, V vocabulary, L layers.
"""
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import layers, rope
from keye_jax.nn.attention import KV, Attention, Context, Table, asking
from keye_jax.nn.experts import Mlp
from keye_jax.nn.recall import Recall
from pallas_kernels.dsa_decode import Pages, eight_bits, newest, write


class Cache(NamedTuple):
  """Keys of S slots a row. All rows write the same slot; a slot that is padding in its row has segment 0."""
  kv: KV                     # leaves [L, B, S, ...]
  segment_BS: jax.Array
  order_BS: jax.Array
  used: jax.Array            # scalar int32


class PagedCache(NamedTuple):
  """Keys of sequences of any length, in pages of one pool; each row of a batch is a sequence."""
  pages: Pages               # leaves [L, P, A, ...]
  table: Table


class Aux(NamedTuple):
  """What a pass leaves beside its hidden states, stacked over layers. None where the model has no such part."""
  balance_LB: jax.Array | None
  load_LE: jax.Array | None
  kl_LBT: jax.Array | None   # indexer KL; padding is 0
  dropped_L: jax.Array | None    # picks of experts that the transport dropped
  recall: Recall | None          # of the indexers, leaves [L, B, N]


class Block(nn.Module):
  """(x_BTD, context, cache of this layer or None) -> (hidden states of who asks, (Aux, KV of all new tokens))."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, ctx: Context, cache: KV | Pages | None):
    c, eps = self.config, self.config.text.norm_eps
    norm = lambda name: sharding.param(self, name, nn.initializers.ones, (c.text.embed,), (None,), c)
    valid_BT = asking(c, ctx, ctx.segment_BT) > 0
    y_BTD, learnt, kv = Attention(c, name='attn')(layers.rms_norm(x_BTD, norm('attn_norm'), eps), ctx, cache)
    x_BTD = asking(c, ctx, x_BTD) + y_BTD
    y_BTD, routing, dropped = Mlp(c, name='mlp')(layers.rms_norm(x_BTD, norm('ffn_norm'), eps), valid_BT)
    aux = Aux(routing.balance_B if routing else None, routing.load_E if routing else None,
              jnp.where(valid_BT, learnt.kl_BT, 0) if learnt else None, dropped, learnt.recall if learnt else None)
    return x_BTD + y_BTD, (aux, kv)


def lookup(config: ModelConfig, embed_VD: jax.Array, token_BT: jax.Array, text_BT: jax.Array) -> jax.Array:
  """Rows of the embedding for text; elsewhere rows that the caller overwrites.

  Thousands of equal image-pad ids would make the gradient's scatter the slowest op of a step, so the places that are
  not text look up different rows, whose gradient is then zero.
  """
  def fn(embed_VD, token_BT, text_BT):
    spread = jnp.arange(token_BT.size, dtype=jnp.int32).reshape(token_BT.shape) % embed_VD.shape[0]
    return embed_VD[jnp.where(text_BT, token_BT, spread)]

  tokens = ('batch', 'seq')
  return sharding.local(fn, config.layout, ((None, None), tokens, tokens), ('batch', 'seq', None))(
      embed_VD, token_BT, text_BT)


def run(config: ModelConfig, layer_params, x_BTD, position_BT3, segment_BT, order_BT,
        cache: Cache | PagedCache | None = None, keep_kv: bool = False, asking_BQ: jax.Array | None = None):
  """Runs all blocks: (hidden_BTD, Aux, KV of the new tokens [L, B, T, ...] or None).

  asking_BQ: places of the only tokens whose hidden states are wanted, [B, Q, D] then. The last block computes nothing
  else but everyone's keys and values, nothing is learnt and there is no Aux. For stacked layers without a cache.

  `layer_params` is one tree with a leading L axis, scanned, or a tuple of L trees, unrolled: a decode step of a small
  batch reads every weight once, and a scan would first copy each layer's slice.
  """
  text = config.text
  cos_BTF, sin_BTF = rope.tables(position_BT3, text.head_dim, text.rope_theta, text.mrope_section,
                                 text.mrope_interleaved)
  icos_BTF = isin_BTF = None
  if text.indexer.heads:
    section = rope.scale_section(text.mrope_section, text.head_dim, text.indexer.head_dim)
    icos_BTF, isin_BTF = rope.tables(position_BT3, text.indexer.head_dim, text.rope_theta, section,
                                     text.mrope_interleaved)
  key_segment_BS, key_order_BS, slot, table, layer_caches = segment_BT, order_BT, None, None, None
  if isinstance(cache, PagedCache):
    layer_caches, table = cache
  elif cache is not None:
    layer_caches, slot = cache.kv, cache.used
    key_segment_BS = sharding.append(cache.segment_BS, segment_BT, slot, 1)
    key_order_BS = sharding.append(cache.order_BS, order_BT, slot, 1)
  ctx = Context(cos_BTF, sin_BTF, icos_BTF, isin_BTF, segment_BT, order_BT, key_segment_BS, key_order_BS, slot, table,
                learning=cache is None and asking_BQ is None)

  def block(x_BTD, inputs, ctx=ctx):
    params, layer_cache = inputs
    x_BTD, (aux, kv) = Block(config).apply({'params': params}, x_BTD, ctx, layer_cache)
    return x_BTD, (aux, kv if keep_kv or cache is not None else None)

  if asking_BQ is not None:
    return read(config, block, ctx._replace(asking_BQ=asking_BQ), layer_params, x_BTD)
  if isinstance(layer_params, tuple):
    out = []
    for i, params in enumerate(layer_params):
      x_BTD, result = block(x_BTD, (params, jax.tree.map(lambda a: a[i], layer_caches)))
      out.append(result)
    aux, kv = jax.tree.map(lambda *a: jnp.stack(a), *out)
  else:
    x_BTD, (aux, kv) = jax.lax.scan(layers.remat(config.remat, block), x_BTD, (layer_params, layer_caches))
  return x_BTD, aux, kv


def read(config: ModelConfig, block: Callable, last_ctx: Context, layer_params, x_BTD):
  """`run` where only some tokens ask: `block` for all layers, the last one with `last_ctx`. One scan over all of them:
  with the last one apart, XLA would copy the parameters of the others, and put their keys and values together again."""
  def step(carry, inputs):
    is_last, params = inputs

    def last(x_BTD, _):
      x_BQD, (_, kv) = block(x_BTD, (params, None), last_ctx)
      return (x_BTD, x_BQD), kv

    def other(x_BTD, x_BQD):
      x_BTD, (_, kv) = block(x_BTD, (params, None))
      return (x_BTD, x_BQD), kv

    return jax.lax.cond(is_last, last, other, *carry)

  L = jax.tree.leaves(layer_params)[0].shape[0]
  x_BQD = jnp.zeros_like(asking(config, last_ctx, x_BTD))
  (_, x_BQD), kv = jax.lax.scan(step, (x_BTD, x_BQD), (jnp.arange(L) == L - 1, layer_params))
  return x_BQD, None, kv


def init_layers(config: ModelConfig, key: jax.Array):
  """Parameters of all blocks with a leading L axis. Linen learns the shapes from one pass over the smallest batch
  that fills the mesh; under jit that pass is dead code."""
  text = config.text
  B, T = sharding.extent(config.layout, 'batch'), sharding.extent(config.layout, 'seq')

  def zeros(dtype, *shape):
    return sharding.constrain(jnp.zeros((B, T) + shape, dtype), config.layout, 'batch', 'seq', *(None,) * len(shape))

  def one(key):
    tables = [zeros(jnp.float32, n // 2) for n in (text.head_dim,) * 2 + (text.indexer.head_dim,) * 2]
    ctx = Context(*tables, *[zeros(jnp.int32)] * 4, None)
    dense = dataclasses.replace(config, attention='dense')
    return Block(dense).init(key, zeros(config.dtype, text.embed), ctx, None)['params']

  return jax.lax.map(one, jax.random.split(key, text.layers))


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
  """A cache with room for `slots` tokens a row."""
  text = config.text
  shape = (text.layers, batch, slots)
  zeros = lambda *s: sharding.constrain(jnp.zeros(shape + s, config.dtype), config.layout, None, 'batch', None,
                                        *(None,) * len(s))
  kv = KV(zeros(text.kv_heads, text.head_dim), zeros(text.kv_heads, text.head_dim),
          zeros(text.indexer.head_dim) if text.indexer.heads else None)
  place = sharding.constrain(jnp.zeros((batch, slots), jnp.int32), config.layout, 'batch', None)
  return Cache(kv, place, place, jnp.zeros((), jnp.int32))


def extend(cache: Cache, kv: KV, segment_BT: jax.Array, order_BT: jax.Array) -> Cache:
  """The cache with the tokens of a pass appended."""
  put = sharding.append
  return Cache(jax.tree.map(lambda old, new: put(old, new, cache.used, 2), cache.kv, kv),
               put(cache.segment_BS, segment_BT, cache.used, 1), put(cache.order_BS, order_BT, cache.used, 1),
               cache.used + segment_BT.shape[1])


def paged(config: ModelConfig, kv: KV, source_PA: jax.Array, eight: bool) -> Pages:
  """Pages [L, P, A, ...] that hold tokens `source_PA` of a pass's rows laid end to end, nothing where it is negative.

  eight: index keys in 8 bits with a scale, else in the dtype of the model.
  """
  def lay_out(x_LBT):
    x_LN = x_LBT.reshape(len(x_LBT), -1, *x_LBT.shape[3:])
    found = x_LN[:, jnp.maximum(source_PA, 0)].astype(config.dtype)
    return jnp.where((source_PA >= 0).reshape(source_PA.shape + (1,) * (found.ndim - 3)), found, 0)

  k, v, ik = map(lay_out, kv)
  return Pages(k, v, *(eight_bits(ik) if eight else (ik, None)))


def extend_pages(cache: PagedCache, kv: KV) -> Pages:
  """The pages with the tokens of a pass written."""
  T = kv.k_BSGK.shape[2]
  slot_U = newest(*cache.table, T, jax.tree.map(lambda a: a[0], cache.pages)).reshape(-1)
  flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
  return jax.vmap(write, (0, None, 0, 0, 0))(cache.pages, slot_U, *map(flat, kv))
