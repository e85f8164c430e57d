"""What a model loses when each query attends to chosen keys only, whoever chooses them.

The decoder is walked with its own modules and functions, and attention is given a mask by a function that sees the
attention probabilities and the index scores of the layer: the oracle, a window, the indexer. For analysis: memory is
that of one chunk of queries against all keys.

B batch, T query time (of a chunk), S key time, D embed, H query heads, G KV heads, N stacked queries
(pallas_kernels/tiles.py), K head dim, L layers, I indexer heads, J indexer head dim.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Batch
from keye_jax.config import ModelConfig
from keye_jax.nn import inspect, layers, rope
from keye_jax.nn.attention import Context, Indexer
from keye_jax.nn.experts import Mlp
from pallas_kernels import dispatch, tiles
from pallas_kernels.dense_attention.xla import attend_one
from pallas_kernels.index_select import search
from pallas_kernels.index_select.xla import products, score
from pallas_kernels.indexer_warmup.xla import head_mean
from pallas_kernels.mask import visible

SINKS = 4          # first tokens that a window always keeps
QUERIES = 512      # of a chunk; more where the platform has the memory and each loop has its price
LOGITS = {'gpu': 1 << 28}      # of a larger chunk, all heads


class View(NamedTuple):
  """What a chooser sees of one row and chunk of queries in one layer."""
  p_TS: jax.Array              # attention probabilities over all visible keys, averaged over heads
  score_TS: jax.Array | None   # index scores, where the model has an indexer
  visible_TS: jax.Array
  q_order_T: jax.Array
  k_order_S: jax.Array


class Probe(NamedTuple):
  """Of one pass. The shares are those of every layer and query."""
  hidden_BTD: jax.Array        # after the final norm
  mass_LBT: jax.Array          # of the attention probability that lies on the chosen keys
  overlap_LBT: jax.Array       # of the oracle's keys, as many as were chosen at most, that were chosen


def everything(view: View, k) -> jax.Array:
  return view.visible_TS


def oracle(view: View, k) -> jax.Array:
  """The k keys with the largest attention probability, averaged over heads: what the indexer is trained to find."""
  return best(view.p_TS, view, k)


def indexer(view: View, k) -> jax.Array:
  return best(view.score_TS, view, k)


def window(view: View, k) -> jax.Array:
  """The last k - SINKS keys and the first SINKS of the row, which holds one sample."""
  back_TS = view.q_order_T[:, None] - view.k_order_S
  return view.visible_TS & ((back_TS < k - SINKS) | (view.k_order_S < SINKS))


def best(x_TS: jax.Array, view: View, k) -> jax.Array:
  """bool [T, S]: the k visible keys with the largest x, among equals the lowest order: the rule of index_select."""
  x_TS = jnp.where(view.visible_TS, x_TS, -jnp.inf)
  return search.kept(x_TS, view.k_order_S, *search.kth(x_TS[None], view.k_order_S[None], k))


CHOOSERS = (everything, oracle, window, indexer)


def run(config: ModelConfig, choose: Callable[[View, jax.Array], jax.Array], params, batch: Batch, k) -> Probe:
  """One forward pass in which choose(view, k), one of CHOOSERS, is the mask of every layer and chunk; k is a scalar.
  Without a mesh.

  With `everything` it is `keye.apply` with dense attention, with `indexer` the same with sparse attention to k keys.
  """
  return _run(config, params, batch, (np.int32(CHOOSERS.index(choose)), np.int32(k)))


@functools.partial(jax.jit, static_argnums=0)
def _run(config: ModelConfig, params, batch: Batch, how: tuple[jax.Array, jax.Array]) -> Probe:
  """One program for all choosers and k: how is (number of the chooser, k)."""
  x_BTD, ctx = inspect.start(config, params, batch)
  eps = config.text.norm_eps

  def block(x_BTD, own):
    normed_BTD = layers.rms_norm(x_BTD, own['attn_norm'], eps)
    y_BTD, *shares = attention(config, how, own['attn'], normed_BTD, ctx)
    x_BTD = x_BTD + y_BTD
    y_BTD, *_ = Mlp(config).apply({'params': own['mlp']}, layers.rms_norm(x_BTD, own['ffn_norm'], eps),
                                 ctx.segment_BT > 0)
    return x_BTD + y_BTD, shares

  x_BTD, (mass_LBT, overlap_LBT) = jax.lax.scan(block, x_BTD, params['layers'])
  return Probe(layers.rms_norm(x_BTD, params['norm'], eps), mass_LBT, overlap_LBT)


def attention(config: ModelConfig, how, own, x_BTD, ctx: Context):
  """(what the layer adds to the stream [B, T, D], mass_BT, overlap_BT)."""
  text, T = config.text, x_BTD.shape[1]
  q_BTHK, k_BTGK, v_BTGK = heads(config, own, x_BTD, ctx)
  index = ()
  if text.indexer.heads:
    iq_BTIJ, ik_BTJ, gate_BTI = Indexer(config).apply({'params': own['indexer']}, x_BTD, ctx.index_cos_BTF,
                                                      ctx.index_sin_BTF)
    index = iq_BTIJ.swapaxes(1, 2), gate_BTI, ik_BTJ
  rows = (tiles.stack_heads(q_BTHK, text.kv_heads), k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2), ctx.segment_BT,
          ctx.order_BT, index)
  o_BGNK, mass_BT, overlap_BT = tiles.over_rows(functools.partial(one_row, how), rows, loop=True)
  o_BTHK = tiles.unstack_heads(o_BGNK.astype(x_BTD.dtype), T)
  return layers.project(o_BTHK, own['o'].astype(x_BTD.dtype), 2), mass_BT, overlap_BT


def heads(config: ModelConfig, own, x_BTD, ctx: Context):
  """Rotated q_BTHK, k_BTGK and v_BTGK of a layer from its parameters, as keye_jax/nn/attention.py makes them."""
  q, k, v = (layers.project(x_BTD, own[name].astype(config.dtype)) for name in ('q', 'k', 'v'))
  if config.text.qk_norm:
    q, k = (layers.rms_norm(x, own[f'{name}_norm'], config.text.norm_eps) for x, name in ((q, 'q'), (k, 'k')))
  return rope.rotate(q, ctx.cos_BTF, ctx.sin_BTF), rope.rotate(k, ctx.cos_BTF, ctx.sin_BTF), v


def chunk(H: int, S: int) -> int:
  """Queries of a chunk: QUERIES, doubled as often as the platform allows."""
  size = QUERIES
  while 2 * size * H * S <= LOGITS.get(dispatch.platform(), 0):
    size *= 2
  return min(S, size)


def one_row(how, q_GNK, k_GSK, v_GSK, segment_S, order_S, index):
  """(o_GNK, mass_T, overlap_T) of a row, chunk after chunk of its queries."""
  S, (G, N, K) = len(order_S), q_GNK.shape
  size, scale = chunk(G * N // S, S), K ** -0.5
  cut = lambda x, axis=0, value=0: tiles.cut(tiles.pad(x, axis, size, value), axis, size)
  q_GNK = tiles.pad(q_GNK.reshape(G, N // S, S, K), 2, size)
  padded = q_GNK.shape[2]
  q_CGNK = tiles.cut_heads(q_GNK.reshape(G, -1, K), padded, size)

  def one(chunk):
    q_GNK, segment_T, order_T, index_queries = chunk
    visible_TS = visible(segment_T[:, None], segment_S, order_T[:, None], order_S, causal=True)
    p_TS = head_mean(attend_one(q_GNK, k_GSK, v_GSK, tiles.bias(visible_TS), scale)[2], size)
    score_TS = score(products(index_queries[0], index[2]), index_queries[1]) if index else None
    view = View(p_TS, score_TS, visible_TS, order_T, order_S)
    which, k = how
    best_TS = oracle(view, k)
    others = [lambda fn=fn: fn(view, k) for fn in CHOOSERS[2:]] if index else [lambda: window(view, k)]
    mask_TS = jax.lax.switch(which, [lambda: visible_TS, lambda: best_TS, *others])
    o_GNK, _, _ = attend_one(q_GNK, k_GSK, v_GSK, tiles.bias(mask_TS), scale)
    share = lambda part_T, whole_T: part_T / jnp.maximum(whole_T, 1e-9)
    return (o_GNK, share((p_TS * mask_TS).sum(-1), p_TS.sum(-1)),
            share((best_TS & mask_TS).sum(-1), best_TS.sum(-1)))

  queries = (cut(index[0], 1), cut(index[1])) if index else ()
  o_CGNK, mass_CT, overlap_CT = jax.lax.map(one, (q_CGNK, cut(segment_S, 0, tiles.QUERY_PAD), cut(order_S), queries))
  o_GNK = tiles.join_heads(o_CGNK, size).reshape(G, N // S, padded, K)[:, :, :S].reshape(G, N, K)
  return o_GNK, mass_CT.reshape(-1)[:S], overlap_CT.reshape(-1)[:S]
