"""Sparse attention of long rows: one pass over chunks of queries, forward and backward.

Inside a chunk: scores of a group of queries against all keys in one reused buffer, the exact threshold, the selection
as one word of bits per key and group, then softmax attention over the key tiles that hold a selected key (masked dense
attention), or over gathered keys (way.py). Nothing larger than a chunk's scores outlives it. The backward pass scores
the same groups again with the same products, so it sees the very set that the forward pass chose, and adds key
gradients into one float32 carry.

T query time, S key time, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim, I indexer heads, J
indexer head dim, C chunks, M groups of a chunk, P key tiles (wide ones where index scores are meant).
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dense_attention.xla import cut_queries, join_queries, query_tile
from pallas_kernels.dsa_attention import union
from pallas_kernels.dsa_attention.row import Options, Row
from pallas_kernels.index_select import search
from pallas_kernels.index_select import xla as index
from pallas_kernels.index_select.selection import Selection, keep_all
from pallas_kernels.index_select.xla import products, score
from pallas_kernels.indexer_warmup.xla import head_mean, kl_add, kl_end, kl_gradient_one, kl_start
from pallas_kernels.mask import visible

GATHERED = 0.55        # share of its keys below which a chunk gathers them: a gathered key costs 1.7 times as much


class Chunk(NamedTuple):
  """What a chunk needs of its queries; with a leading C all chunks of a row."""
  q_GNK: jax.Array
  group: index.Queries        # leaves lead with M
  selection: Selection        # leaves [M, T]; replayed, or keep_all
  tile_P: jax.Array           # key tiles that the chunk meets, in front
  count: jax.Array


class Plan(NamedTuple):
  """How a row is cut, and the arrays that all its chunks share."""
  every: bool                 # no more keys than topk: all that are visible are selected
  is_bounded: jax.Array       # scalar, of `tiles.bounded`
  size: int                   # queries of a chunk
  chunks: Chunk
  keys: index.Keys            # wide tiles
  k_PGSK: jax.Array
  v_PGSK: jax.Array
  ik_PSJ: jax.Array
  segment_PS: jax.Array
  order_PS: jax.Array


def sizes(row: Row) -> tuple[int, int, int]:
  """(queries of a group, groups of a chunk, keys of a wide tile)."""
  T, (G, N, _) = len(row.q_order_T), row.q_GNK.shape
  group = min(T, index.QUERIES)
  return group, max(query_tile(T, G * N // T) // group, 1), index.WIDE


def plan(options: Options, row: Row, selection: Selection | None, group: int, groups: int, wide: int) -> Plan:
  """Cuts a row into chunks of `groups` groups of `group` queries, and its index keys into tiles of `wide`."""
  T, size = len(row.q_order_T), group * groups
  keys = index.cut_keys(wide, row.ik_SJ, row.k_segment_S, row.k_order_S)
  padded = keys.order_PS.size
  cut = lambda x, axis, value=0: tiles.cut(tiles.pad(x, axis, padded, value), axis, tiles.KEYS)
  segment_PS, order_PS = cut(row.k_segment_S, 0, tiles.KEY_PAD), cut(row.k_order_S, 0)

  fill = lambda x, axis, value=0: tiles.pad(x, axis, size, value)
  groups = index.cut_queries(group, fill(row.iq_ITJ, 1), fill(row.gate_TI, 0),
                             fill(row.q_segment_T, 0, tiles.QUERY_PAD), fill(row.q_order_T, 0), keys)
  given = keep_all((T,)) if selection is None else selection
  to_chunks = lambda x: x.reshape(-1, size // group, *x.shape[1:])
  given = jax.tree.map(lambda x: to_chunks(fill(x, 0).reshape(-1, group)), given)
  groups = jax.tree.map(to_chunks, groups)
  flat = lambda x: x.reshape(len(x), -1)
  meet_CP = tiles.meeting(flat(groups.segment_T), segment_PS, flat(groups.order_T), order_PS, causal=True)
  chunks = Chunk(cut_queries(row.q_GNK, T, size), groups, given, *tiles.front(meet_CP))
  every = selection is None and options.topk >= len(row.k_order_S)
  return Plan(every, tiles.bounded(row.q_GNK, row.k_GSK, options.scale), size, chunks, keys, cut(row.k_GSK, 1),
              cut(row.v_GSK, 1), cut(row.ik_SJ, 0), segment_PS, order_PS)


def select(options: Options, row: Plan, buffer_PTS, chunk: Chunk, replay: bool):
  """(buffer, selection of the chunk's groups [M, T], word of bits of every key and group [M, S] or None for all)."""
  if row.every:
    return buffer_PTS, chunk.selection, None
  P = len(row.keys.order_PS)

  def one(buffer_PTS, inputs):
    group, given = inputs

    def fn(score_PTS, order_PS):
      chosen = tuple(given) if replay else search.kth(score_PTS, order_PS, options.topk)
      word_PS = search.words(score_PTS, order_PS, *chosen)
      return chosen, jnp.pad(word_PS, ((0, P - len(word_PS)), (0, 0)))

    buffer_PTS, (chosen, word_PS) = index.in_scores(buffer_PTS, group, row.keys, fn)
    rank_P = jnp.argsort(group.tile_P)                  # where each key tile lies among those in front
    word_PS = jnp.where((rank_P < group.count)[:, None], word_PS[rank_P], 0)
    return buffer_PTS, (chosen, word_PS.reshape(-1))

  buffer_PTS, (chosen, word_MS) = jax.lax.scan(one, buffer_PTS, (chunk.group, chunk.selection))
  return buffer_PTS, Selection(*chosen), word_MS


def selected_tiles(word_MS, size: int) -> tuple[jax.Array, jax.Array, Callable]:
  """(key tiles that hold a selected key, in front; their number; mask of a tile, bool [T, S])."""
  word_PMS = tiles.cut(word_MS, 1, tiles.KEYS)
  group = size // word_MS.shape[0]
  tile_P, count = tiles.front((word_PMS != 0).any((1, 2)))
  bit_T = jnp.arange(group, dtype=jnp.int32)

  def mask(p):
    return ((word_PMS[p][:, None] >> bit_T[:, None]) & 1).astype(bool).reshape(size, tiles.KEYS)

  return tile_P, count, mask


def visible_tiles(row: Plan, chunk: Chunk) -> tuple[jax.Array, jax.Array, Callable]:
  """The same when every visible key is selected."""
  segment_T, order_T = chunk.group.segment_T.reshape(-1), chunk.group.order_T.reshape(-1)

  def mask(p):
    return visible(segment_T[:, None], row.segment_PS[p], order_T[:, None], row.order_PS[p], causal=True)

  return chunk.tile_P, chunk.count, mask


def gathered_keys(options: Options, row: Plan) -> jax.Array | None:
  """Keys then values of all KV heads, [S, 2 G K], where chunks may gather them."""
  if options.way != 'gathered' or row.every:
    return None
  flat_keys = lambda x_PGSK: x_PGSK.swapaxes(1, 2).reshape(row.order_PS.size, -1)
  return jnp.concatenate([flat_keys(row.k_PGSK), flat_keys(row.v_PGSK)], 1)


def attend(options: Options, row: Plan, kv_SX, chunk: Chunk, word_MS):
  """(o_GNK, lse_GN, the tiles that `selected_tiles` found) of a chunk whose selection is word_MS, None for all."""
  where = tile_P, count, mask = visible_tiles(row, chunk) if row.every else selected_tiles(word_MS, row.size)
  masked_dense = lambda: tiles.attend(chunk.q_GNK, row.k_PGSK, row.v_PGSK, tile_P, 0, count, mask, options.scale,
                                      row.is_bounded)
  if kv_SX is None:
    return *masked_dense(), where
  return *gathered_or(masked_dense, options, row, chunk.q_GNK, kv_SX, word_MS, count), where


def gathered_or(masked_dense: Callable, options: Options, row: Plan, q_GNK, kv_SX, word_MS, count):
  """(o_GNK, lse_GN) of a chunk over gathered keys when its tiles selected few, else by `masked_dense`."""
  M, S = word_MS.shape
  group = row.size // M
  tile = union.TILE if group % union.TILE == 0 else group
  shift = jnp.arange(0, group, tile, dtype=jnp.int32)
  word_QS = ((word_MS[:, None] >> shift[:, None]) & ((1 << tile) - 1)).reshape(-1, S)
  members = jax.vmap(union.picks)(word_QS != 0)
  few = members.end_W[:, -1].sum() < GATHERED * (count * tiles.KEYS * len(word_QS)).astype(jnp.float32)

  def gathered():
    q_QGNK = tiles.cut_heads(q_GNK, row.size, tile)
    read = lambda index_U: kv_SX.at[index_U].get(mode='promise_in_bounds').reshape(len(index_U), -1, q_GNK.shape[2])
    one = lambda x: union.attend(x[0], read, x[1], x[2], tile, options.scale)
    o_QGNK, lse_QGN = jax.lax.map(one, (q_QGNK, word_QS, members))
    return tiles.join_heads(o_QGNK, tile), tiles.join_heads(lse_QGN, tile)

  return jax.lax.cond(few, gathered, masked_dense)


def index_queries(chunk: Chunk) -> tuple[jax.Array, jax.Array]:
  """(iq_ITJ, gate_TI) of the whole chunk."""
  iq_ITJ = jnp.moveaxis(chunk.group.iq_ITJ, 0, 1)
  I, M, T, J = iq_ITJ.shape
  return iq_ITJ.reshape(I, M * T, J), chunk.group.gate_TI.reshape(M * T, I)


def start_buffer(row: Plan) -> jax.Array:
  """Room for the scores of a group; nothing when none are needed."""
  return jnp.zeros(()) if row.every else index.empty_buffer(row.chunks.group.order_T.shape[-1], row.keys)


def forward(options: Options, arrays: Row, selection: Selection | None):
  """(o_GNK float32, lse_GN, kl_T or None, log-sum-exp of the selected scores [T] or None, Selection) of a row."""
  row, replay = plan(options, arrays, selection, *sizes(arrays)), selection is not None
  T, kv_SX = len(arrays.q_order_T), gathered_keys(options, row)

  def one(buffer_PTS, chunk):
    buffer_PTS, chosen, word_MS = select(options, row, buffer_PTS, chunk, replay)
    o_GNK, lse_GN, where = attend(options, row, kv_SX, chunk, word_MS)
    kl = kl_of(options, row, chunk, lse_GN, *where) if options.want_kl else (None, None)
    return buffer_PTS, (o_GNK, lse_GN, *kl, chosen)

  _, (o_CGNK, lse_CGN, kl_CT, index_lse_CT, selection) = jax.lax.scan(one, start_buffer(row), row.chunks)
  flat = lambda x: x.reshape(-1)[:T]
  kl_T, index_lse_T, selection = jax.tree.map(flat, (kl_CT, index_lse_CT, selection))
  return join_queries(o_CGNK, T, row.size), join_queries(lse_CGN, T, row.size), kl_T, index_lse_T, selection


def kl_of(options: Options, row: Plan, chunk: Chunk, lse_GN, tile_P, count, mask):
  """(kl_T, log-sum-exp of the selected scores [T]): a second pass over the chunk's tiles, once lse is known."""
  iq_ITJ, gate_TI = index_queries(chunk)

  def step(n, state):
    p = tile_P[n]
    mask_TS = mask(p)
    p_GNS = tiles.probabilities(chunk.q_GNK, row.k_PGSK[p], lse_GN, tiles.bias(mask_TS), options.scale)
    return kl_add(state, score(products(iq_ITJ, row.ik_PSJ[p]), gate_TI), head_mean(p_GNS, row.size), mask_TS)

  return kl_end(jax.lax.fori_loop(0, count, step, kl_start(row.size)))


def backward(options: Options, arrays: Row, selection: Selection, index_lse_T, lse_GN, delta_GN, do_GNK, dkl_T):
  """Gradients (dq_GNK, dk_GSK, dv_GSK, diq_ITJ, dik_SJ, dgate_TI) of a row, float32."""
  row = plan(options, arrays, selection, *sizes(arrays))
  T, S = len(arrays.q_order_T), len(arrays.k_order_S)
  stacked = [cut_queries(x, T, row.size) for x in (lse_GN, delta_GN, do_GNK)]
  per_query = jax.tree.map(lambda x: tiles.cut(tiles.pad(x, 0, row.size), 0, row.size), (index_lse_T, dkl_T))

  def one(carry, inputs):
    buffer_PTS, dk_PGKS, dv_PGKS, dik_PSJ = carry
    chunk, (lse_GN, delta_GN, do_GNK), (index_lse_T, dkl_T) = inputs
    buffer_PTS, _, word_MS = select(options, row, buffer_PTS, chunk, replay=True)
    tile_P, count, mask = selected_tiles(word_MS, row.size)
    iq_ITJ, gate_TI = index_queries(chunk)

    def step(n, carry):
      (dq_GNK, diq_ITJ, dgate_TI), (dk_PGKS, dv_PGKS, dik_PSJ) = carry
      p = tile_P[n]
      bias_TS = tiles.bias(mask(p))
      p_GNS, dq, dk, dv = tiles.gradients(chunk.q_GNK, row.k_PGSK[p], row.v_PGSK[p], lse_GN, delta_GN, do_GNK, bias_TS,
                                          options.scale)
      dq_GNK, dk_PGKS, dv_PGKS = dq_GNK + dq, dk_PGKS.at[p].add(dk), dv_PGKS.at[p].add(dv)
      if options.want_kl:
        diq, dik, dgate = kl_gradient_one(products(iq_ITJ, row.ik_PSJ[p]), head_mean(p_GNS, row.size), bias_TS, iq_ITJ,
                                          row.ik_PSJ[p], gate_TI, index_lse_T, dkl_T)
        diq_ITJ, dgate_TI, dik_PSJ = diq_ITJ + diq, dgate_TI + dgate, dik_PSJ.at[p].add(dik)
      return (dq_GNK, diq_ITJ, dgate_TI), (dk_PGKS, dv_PGKS, dik_PSJ)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), (chunk.q_GNK, iq_ITJ, gate_TI))
    dqueries, dkeys = jax.lax.fori_loop(0, count, step, (zeros, (dk_PGKS, dv_PGKS, dik_PSJ)))
    return (buffer_PTS, *dkeys), dqueries

  init = start_buffer(row), *(jnp.zeros(x.shape) for x in (*tiles.transposed(row.k_PGSK, row.v_PGSK), row.ik_PSJ))
  (_, *dkv, dik), (dq, diq, dgate) = jax.lax.scan(one, init, (row.chunks, stacked, per_query))
  dk, dv = tiles.transposed(*dkv)
  return (join_queries(dq, T, row.size), tiles.join(dk, 1)[:, :S], tiles.join(dv, 1)[:, :S],
          tiles.join(diq, 1)[:, :T], tiles.join(dik, 0)[:S], tiles.join(dgate, 0)[:T])
