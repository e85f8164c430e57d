"""Grouped-query attention of the decoder, dense or through DeepSeek Sparse Attention, with or without a cache.

The lightning indexer (arXiv 2606.10651 §2; `sa_indexer` of the checkpoint) scores every earlier token for every
query, I[t,s] = sum_i gate[t,i] * relu(q[t,i] . k[s]), and all attention heads share its top-k. Its input is detached:
it learns from its KL loss alone, and the language model does not learn through it.

B batch, T query time, S key time, D embed, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim,
F rotary frequencies.
"""
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import layers, rope
from keye_jax.nn.recall import Recall, recall
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.dsa_decode import Pages, dsa_decode, newest, write
from pallas_kernels.indexer_warmup import indexer_warmup

INDEXER_EPS = 1e-6


class Table(NamedTuple):
  """Where the tokens of each sequence lie in a pool of pages (pallas_kernels/dsa_decode)."""
  page_BN: jax.Array              # int32
  length_B: jax.Array             # int32, with the tokens of this pass; 0: nothing of this row is a token


class Context(NamedTuple):
  """What every layer of one forward pass shares."""
  cos_BTF: jax.Array
  sin_BTF: jax.Array
  index_cos_BTF: jax.Array | None
  index_sin_BTF: jax.Array | None
  segment_BT: jax.Array
  order_BT: jax.Array
  key_segment_BS: jax.Array
  key_order_BS: jax.Array
  slot: jax.Array | None          # scalar: first free slot of the cache; None: the keys are the queries' own tokens
  table: Table | None = None      # the cache is in pages
  asking_BQ: jax.Array | None = None     # places of the only tokens whose results are wanted; None: of all
  learning: bool = True           # the indexer's loss and recall are wanted, in modes that have them


class KV(NamedTuple):
  """Keys, values and index keys: of new tokens (time T), or a cache (time S)."""
  k_BSGK: jax.Array
  v_BSGK: jax.Array
  ik_BSJ: jax.Array | None


def asking(config: ModelConfig, ctx: Context, x: jax.Array) -> jax.Array:
  """Entries of [B, T, ...] of the tokens whose results are wanted."""
  return x if ctx.asking_BQ is None else sharding.take(x, ctx.asking_BQ, config.layout)


class Learnt(NamedTuple):
  """What the indexer's learning leaves of a layer."""
  kl_BT: jax.Array
  recall: Recall


class Indexer(nn.Module):
  """x_BTD -> query heads, one key head, gates. RMSNorm on queries, LayerNorm on keys, RoPE over the full width."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, cos_BTF, sin_BTF):
    c, text, index = self.config, self.config.text, self.config.text.indexer
    D, I, J = text.embed, index.heads, index.head_dim
    init = nn.initializers.lecun_normal(in_axis=0, out_axis=-1)
    q_DIJ = sharding.param(self, 'q', nn.initializers.normal(D ** -0.5), (D, I, J), ('embed', None, None), c)
    gate_DI = sharding.param(self, 'gate', init, (D, I), ('embed', None), c)
    k_DJ = sharding.param(self, 'k', init, (D, J), ('embed', None), c)
    q_norm_J = sharding.param(self, 'q_norm', nn.initializers.ones, (J,), (None,), c)
    k_scale_J = sharding.param(self, 'k_norm_scale', nn.initializers.ones, (J,), (None,), c)
    k_bias_J = sharding.param(self, 'k_norm_bias', nn.initializers.zeros, (J,), (None,), c)

    x_BTD = jax.lax.stop_gradient(x_BTD)
    iq_BTIJ = layers.rms_norm(layers.project(x_BTD, q_DIJ), q_norm_J, INDEXER_EPS)
    ik_BTJ = layers.layer_norm(layers.project(x_BTD, k_DJ), k_scale_J, k_bias_J, INDEXER_EPS)
    gate_BTI = jnp.einsum('BTD,DI->BTI', x_BTD, gate_DI, precision=jax.lax.Precision.HIGHEST,
                          preferred_element_type=jnp.float32) * J ** -0.5
    iq_BTIJ = rope.rotate(iq_BTIJ, cos_BTF, sin_BTF)
    ik_BTJ = rope.rotate(ik_BTJ[:, :, None], cos_BTF, sin_BTF)[:, :, 0]
    return iq_BTIJ, ik_BTJ, gate_BTI


class Attention(nn.Module):
  """(x_BTD, context, cache of this layer, in pages or not, or None) -> (y_BTD of the tokens that ask, Learnt or None,
  KV of all new tokens)."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, ctx: Context, cache: KV | Pages | None):
    c, text = self.config, self.config.text
    D, H, G, K = text.embed, text.heads, text.kv_heads, text.head_dim
    ask = functools.partial(asking, c, ctx)
    init = nn.initializers.normal(D ** -0.5)
    q_DHK = sharding.param(self, 'q', init, (D, H, K), ('embed', None, None), c)
    k_DGK = sharding.param(self, 'k', init, (D, G, K), ('embed', None, None), c)
    v_DGK = sharding.param(self, 'v', init, (D, G, K), ('embed', None, None), c)
    o_HKD = sharding.param(self, 'o', layers.residual_init(H * K, text.layers), (H, K, D), (None, None, 'embed'), c)

    q_BTHK = layers.project(ask(x_BTD), q_DHK)
    k_BTGK = layers.project(x_BTD, k_DGK)
    v_BTGK = layers.project(x_BTD, v_DGK)
    if text.qk_norm:
      q_BTHK = layers.rms_norm(q_BTHK, sharding.param(self, 'q_norm', nn.initializers.ones, (K,), (None,), c),
                               text.norm_eps)
      k_BTGK = layers.rms_norm(k_BTGK, sharding.param(self, 'k_norm', nn.initializers.ones, (K,), (None,), c),
                               text.norm_eps)
    q_BTHK = rope.rotate(q_BTHK, ask(ctx.cos_BTF), ask(ctx.sin_BTF))
    k_BTGK = rope.rotate(k_BTGK, ctx.cos_BTF, ctx.sin_BTF)

    index = None
    if text.indexer.heads:
      iq_BTIJ, ik_BTJ, gate_BTI = Indexer(c, name='indexer')(x_BTD, ctx.index_cos_BTF, ctx.index_sin_BTF)
      index = ask(iq_BTIJ), ik_BTJ, ask(gate_BTI)
    new = KV(k_BTGK, v_BTGK, index[1] if index else None)
    if ctx.table is not None:
      o_BTHK, learnt = attend_pages(c, q_BTHK, cache, new, index, ctx.table), None
    else:
      keys = new if cache is None else jax.tree.map(
          lambda old, token: sharding.append(old, token, ctx.slot, 1), cache, new)
      o_BTHK, learnt = attend(c, q_BTHK, keys, index, ctx)
    y_BTD = layers.project(o_BTHK, o_HKD, 2)
    return y_BTD, learnt, new


def attend(config: ModelConfig, q_BTHK, keys: KV, index, ctx: Context):
  """Runs the attention mode of the config on each device's own queries against all keys of its rows.

  Under a sharded sequence the keys are gathered (index keys are narrow) and queries stay where they are; `order`
  carries causality, so any layout of the sequence gives the same result. Returns (o_BTHK, Learnt or None).
  """
  query, key, ask = ('batch', 'seq'), ('batch', None), functools.partial(asking, config, ctx)
  arrays = dict(q=(q_BTHK, query), k=(keys.k_BSGK, key), v=(keys.v_BSGK, key),
                q_segment=(ask(ctx.segment_BT), query), k_segment=(ctx.key_segment_BS, key),
                q_order=(ask(ctx.order_BT), query), k_order=(ctx.key_order_BS, key))
  if config.attention != 'dense':
    if index is None:
      raise ValueError(f'attention={config.attention!r} needs an indexer: set model.text.indexer.heads')
    arrays |= dict(iq=(index[0], query), ik=(keys.ik_BSJ, key), gate=(index[2], query))

  def pad_axes(x, axes):
    return axes + (None,) * (x.ndim - len(axes))

  values = {n: sharding.constrain(x, config.layout, *pad_axes(x, a)) for n, (x, a) in arrays.items()}
  in_axes = {n: pad_axes(x, a) for n, (x, a) in arrays.items()}
  o_axes = ('batch', 'seq', None, None)

  def dense(a):
    return dense_attention(a['q'], a['k'], a['v'], a['q_segment'], a['k_segment'], a['q_order'], a['k_order'])

  def warmup(a):
    o_BTHK, lse_BTH = dense(a)
    kl_BT = indexer_warmup(a['q'], a['k'], lse_BTH, a['iq'], a['ik'], a['gate'], a['q_segment'], a['k_segment'],
                           a['q_order'], a['k_order'])
    return o_BTHK, Learnt(kl_BT, recalled(a))

  def sparse(a):
    result = dsa_attention(a['q'], a['k'], a['v'], a['iq'], a['ik'], a['gate'], a['q_segment'], a['k_segment'],
                           a['q_order'], a['k_order'], topk=config.text.indexer.topk, want_kl=ctx.learning)
    return (result.o_BTHK, Learnt(result.kl_BT, recalled(a))) if ctx.learning else result.o_BTHK

  def recalled(a):
    return recall(a['q'], a['k'], a['iq'], a['ik'], a['gate'], a['q_segment'], a['k_segment'], a['q_order'],
                  a['k_order'], topk=config.text.indexer.topk)

  match config.attention:
    case 'warmup' | 'sparse' if ctx.learning:
      with_loss = warmup if config.attention == 'warmup' else sparse
      learnt = Learnt(query, Recall(query, query))
      return sharding.local(with_loss, config.layout, (in_axes,), (o_axes, learnt))(values)
    case 'sparse':
      return sharding.local(sparse, config.layout, (in_axes,), o_axes)(values), None
    case 'dense' | 'warmup':
      return sharding.local(lambda a: dense(a)[0], config.layout, (in_axes,), o_axes)(values), None


def attend_pages(config: ModelConfig, q_BTHK, pages: Pages, new: KV, index, table: Table) -> jax.Array:
  """o_BTHK of the newest tokens of each sequence, whose keys are put into the pages first. On one device."""
  if config.attention != 'sparse':
    raise ValueError(f'caches in pages need attention=\'sparse\', this model has {config.attention!r}')
  slot_BT = newest(table.page_BN, table.length_B, q_BTHK.shape[1], pages)
  pages = write(pages, slot_BT.reshape(-1), *(x.reshape(-1, *x.shape[2:]) for x in new))
  return dsa_decode(q_BTHK, pages, index[0], index[2], *table, topk=config.text.indexer.topk).o_BTHK
