"""Sparse attention on a GPU: a scan over chunks of queries, in each of which groups of 16 neighbours meet the keys they
selected.

The kernels of index_select score a chunk, find the thresholds and give the selection as words of bits. The keys of a
group, the union of what its queries selected, are then listed, and attention gathers them, a step at a time, for the
16 queries and all heads of a KV head together: neighbours share most of their keys (arXiv 2606.10651 §2), so that the
products are large and a key is read once for 128 rows.

T queries of a chunk (in a group: 16), S keys, G KV heads, N stacked queries R * T of a group (pallas_kernels/tiles.py),
R query heads of a KV head, K head dim, M groups of a chunk, U room for the keys of a group, P key tiles.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import gpu_call, tiles
from pallas_kernels.dense_attention.xla import cut_queries, join_queries
from pallas_kernels.dsa_attention.gpu_backward import gradients
from pallas_kernels.dsa_attention.gpu_indexer import indexer_loss
from pallas_kernels.dsa_attention.gradient import Passes, attend
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.dsa_attention.row import Options, Row
from pallas_kernels.gpu_call import LOG2E, dot, int32
from pallas_kernels.index_select import gpu as index
from pallas_kernels.index_select import search
from pallas_kernels.index_select.selection import Selection, keep_all
from pallas_kernels.mask import NEG_INF

GATHER = 64            # keys of a step
WARPS, STAGES = 8, 5    # with fewer stages the gather of a step, which waits for its indices, is not begun ahead of it
NOBODY = 1e30          # log-sum-exp of a head that was added: all its probabilities are 0
LEAST = NEG_INF / 2       # running maximum of a query that has seen nothing: above a masked logit, which then weighs 0


class Lists(NamedTuple):
  """The keys that each group selected."""
  index_MU: jax.Array        # place in the row; beyond count_M: 0
  word_MU: jax.Array         # bit t: query t of the group selected it; beyond count_M: 0
  count_M: jax.Array


def lists(met: index.Tiles, word_MN: jax.Array, number_MB: jax.Array) -> Lists:
  """From the words of index_select. There is room for all keys of the row."""
  M, N = word_MN.shape
  end_MB = jnp.cumsum(number_MB, 1)
  empty = jnp.zeros((M, N), jnp.int32)
  index_MU, word_MU = gpu_call.call(
      _list, (M, number_MB.shape[1]),
      [word_MN, end_MB - number_MB, number_MB, met.tile_P, met.count_M, empty, empty], [int32(M, N)] * 2, warps=4,
      stages=1, aliases={5: 0, 6: 1})
  return Lists(index_MU, word_MU, end_MB[:, -1])


def _list(word_ref, start_ref, number_ref, tile_ref, count_ref, empty_index_ref, empty_word_ref, index_out, word_out):
  m, n = pl.program_id(0), pl.program_id(1)

  @pl.when(number_ref[m, n] > 0)
  def _():
    place_B = n * index.BLOCK + jnp.arange(index.BLOCK, dtype=jnp.int32)
    word_B = triton.load(word_ref.at[m, place_B], mask=place_B < count_ref[m] * index.TILE, other=0)
    flag_B = word_B != 0
    rank_B = start_ref[m, n] + jnp.cumsum(flag_B.astype(jnp.int32)) - 1
    tile_B = triton.load(tile_ref.at[place_B // index.TILE], mask=flag_B, other=0)
    gpu_call.store(index_out, (m, rank_B), tile_B * index.TILE + place_B % index.TILE, flag_B)
    gpu_call.store(word_out, (m, rank_B), word_B, flag_B)


def attention(scale: float, group: int, picked: Lists, q_MGNK, k_SGK, v_SGK) -> tuple[jax.Array, jax.Array]:
  """(o_MGNK in the dtype of q, lse_MGN) of groups of `group` queries."""
  M, G, N, K = q_MGNK.shape
  return tuple(gpu_call.call(
      functools.partial(_attention, scale=scale, group=group), (M, G), [*picked, q_MGNK, k_SGK, v_SGK],
      [jax.ShapeDtypeStruct((M, G, N, K), q_MGNK.dtype), jax.ShapeDtypeStruct((M, G, N), jnp.float32)],
      warps=WARPS, stages=STAGES))


def _attention(index_ref, word_ref, count_ref, q_ref, k_ref, v_ref, o_out, lse_out, *, scale, group):
  m, g = pl.program_id(0), pl.program_id(1)
  q_NK = q_ref[m, g]
  N, K = q_NK.shape
  bit_N1 = (jnp.arange(N, dtype=jnp.int32) % group)[:, None]

  def step(i, state):
    m_N, l_N, acc_NK = state
    here = pl.ds(i * GATHER, GATHER)
    index_U, word_U = index_ref[m, here], word_ref[m, here]
    on_NU = (jnp.right_shift(word_U[None], bit_N1) & 1) > 0
    x_NU = jnp.where(on_NU, dot(q_NK, k_ref[index_U, g].T), NEG_INF)
    new_N = jnp.maximum(m_N, x_NU.max(1))
    w_NU = jnp.exp2(x_NU * (scale * LOG2E) - (new_N * (scale * LOG2E))[:, None])
    fade_N = jnp.exp2((m_N - new_N) * (scale * LOG2E))
    v_UK = v_ref[index_U, g]
    return new_N, l_N * fade_N + w_NU.sum(1), acc_NK * fade_N[:, None] + dot(w_NU.astype(v_UK.dtype), v_UK)

  init = jnp.full(N, LEAST, jnp.float32), jnp.zeros(N, jnp.float32), jnp.zeros((N, K), jnp.float32)
  m_N, l_N, acc_NK = jax.lax.fori_loop(0, pl.cdiv(count_ref[m], GATHER), step, init)
  seen_N = l_N > 0
  l_N = jnp.where(seen_N, l_N, 1)
  o_out[m, g] = (acc_NK / l_N[:, None]).astype(o_out.dtype)
  lse_out[m, g] = jnp.where(seen_N, m_N * scale + jnp.log(l_N), NEG_INF)


class Plan(NamedTuple):
  """How a row is cut, and the arrays that all its chunks share."""
  every: bool                # no more keys than topk: all that are visible are selected
  keys: index.Keys
  k_SGK: jax.Array
  v_SGK: jax.Array
  ik_SJ: jax.Array


class Chunk(NamedTuple):
  """What differs from chunk to chunk; with a leading C all of a row."""
  q_MGNK: jax.Array
  index: index.Chunk
  selection: Selection       # [T], replayed, or keep_all


def padded(row: Row) -> Row:
  """A row with a power of two of heads for each KV head, and of features; what is added is 0."""
  T, K = len(row.q_order_T), row.q_GNK.shape[2]
  pad = lambda x: tiles.pad(x, 2, max(gpu_call.ceil_pow2(K), gpu_call.SMALLEST))
  return row._replace(q_GNK=pad_heads(pad(row.q_GNK), T), k_GSK=pad(row.k_GSK), v_GSK=pad(row.v_GSK))


def pad_heads(x_GNK: jax.Array, T: int, value=0) -> jax.Array:
  return tiles.pad(x_GNK, 1, gpu_call.ceil_pow2(x_GNK.shape[1] // T) * T, value)


def plan(options: Options, row: Row, selection: Selection | None) -> tuple[Plan, Chunk]:
  T = len(row.q_order_T)
  chunks, keys = index.cut(row.iq_ITJ, row.ik_SJ, row.gate_TI, row.q_segment_T, row.k_segment_S, row.q_order_T,
                           row.k_order_S)
  size = chunks.order_T.shape[1]
  given = keep_all((T,)) if selection is None else selection
  given = jax.tree.map(lambda x: tiles.cut(tiles.pad(x, 0, size), 0, size), given)
  flat = lambda x_GSK: tiles.pad(x_GSK.swapaxes(0, 1), 0, index.TILE)
  every = selection is None and options.topk >= len(row.k_order_S)
  whole = Plan(every, keys, flat(row.k_GSK), flat(row.v_GSK), keys.ik_PSJ.reshape(-1, keys.ik_PSJ.shape[2]))
  return whole, Chunk(cut_groups(row.q_GNK, T, size), chunks, given)


def cut_groups(x_GNK: jax.Array, T: int, size: int) -> jax.Array:
  """[G, R * T, ...] -> [C, M, G, N, ...]."""
  return jax.vmap(lambda x_GNK: tiles.cut_heads(x_GNK, size, index.GROUP))(cut_queries(x_GNK, T, size))


def join_groups(x_CMGNK: jax.Array, T: int) -> jax.Array:
  """The inverse of `cut_groups`."""
  size = x_CMGNK.shape[1] * index.GROUP
  return join_queries(jax.vmap(lambda x_MGNK: tiles.join_heads(x_MGNK, index.GROUP))(x_CMGNK), T, size)


def select(options: Options, row: Plan, chunk: Chunk, replay: bool) -> tuple[Selection, Lists]:
  """Selection [T] of a chunk, and the keys of its groups."""
  met = index.meet(chunk.index, row.keys)
  if replay or row.every:
    key_T, last_T = search.key(chunk.selection.threshold_BT), chunk.selection.last_BT
    key_TN, _ = index.scores(chunk.index, row.keys, key_T)
  else:
    key_TN, number_TP, low_T = index.score_and_bound(chunk.index, row.keys, options.topk)
    key_T, last_T = index.kth(key_TN, number_TP, low_T, met, options.topk)
  return Selection(search.value(key_T), last_T), lists(met, *index.words(key_TN, key_T, last_T, met))


def index_queries(chunk: index.Chunk) -> tuple[jax.Array, jax.Array]:
  """(iq_MITJ, gate_MTI) of the groups of a chunk."""
  iq_MITJ = tiles.cut(chunk.iq_ITJ, 1, index.GROUP)
  return iq_MITJ, tiles.cut(chunk.gate_IT.T, 0, index.GROUP)


def forward_row(options: Options, arrays: Row, selection: Selection | None):
  """(o_GNK, lse_GN, kl_T or None, log-sum-exp of the selected scores [T] or None, Selection) of a row."""
  T, (G, N, K) = len(arrays.q_order_T), arrays.q_GNK.shape
  row, chunks = plan(options, padded(arrays), selection)

  def one(_, chunk):
    chosen, picked = select(options, row, chunk, selection is not None)
    o_MGNK, lse_MGN = attention(options.scale, index.GROUP, picked, chunk.q_MGNK, row.k_SGK, row.v_SGK)
    kl = None, None
    if options.want_kl:
      real_N = jnp.arange(lse_MGN.shape[2]) < N // T * index.GROUP
      kl = indexer_loss(options.scale, G * N // T, picked, chunk.q_MGNK, jnp.where(real_N, lse_MGN, NOBODY),
                        *index_queries(chunk.index), row.k_SGK, row.ik_SJ)
    return None, (o_MGNK, lse_MGN, *kl, chosen)

  _, (o_CMGNK, lse_CMGN, *rest) = jax.lax.scan(one, None, chunks)
  kl_T, index_lse_T, chosen = jax.tree.map(lambda x: x.reshape(-1)[:T], rest)
  return join_groups(o_CMGNK, T)[:, :N, :K], join_groups(lse_CMGN, T)[:, :N], kl_T, index_lse_T, chosen


def backward_row(options: Options, arrays: Row, selection: Selection, index_lse_T, lse_GN, delta_GN, do_GNK, dkl_T):
  """Gradients (dq_GNK, dk_GSK, dv_GSK, diq_ITJ, dik_SJ, dgate_TI) of a row, float32."""
  (I, T, J), (G, N, K), S = arrays.iq_ITJ.shape, arrays.q_GNK.shape, len(arrays.k_order_S)
  row, chunks = plan(options, padded(arrays), selection)
  size, width = chunks.index.order_T.shape[1], chunks.q_MGNK.shape[4]
  groups = lambda x, value=0: cut_groups(pad_heads(x, T, value), T, size)
  stacked = groups(tiles.pad(do_GNK, 2, width)), groups(lse_GN, NOBODY), groups(delta_GN)
  rows = (index_lse_T, dkl_T) if options.want_kl else (jnp.zeros(T),) * 2
  rows = [tiles.pad(x, 0, size).reshape(-1, size // index.GROUP, index.GROUP) for x in rows]

  def one(carry, inputs):
    chunk, stacked, rows = inputs
    _, picked = select(options, row, chunk, True)
    return gradients(options.scale, G * N // T, options.want_kl, picked, chunk.q_MGNK, *stacked,
                     *index_queries(chunk.index), *rows, row.k_SGK, row.v_SGK, row.ik_SJ, carry)

  init = tuple(jnp.zeros(x.shape) for x in (row.k_SGK, row.v_SGK, row.ik_SJ))
  (dk_SGK, dv_SGK, dik_SJ), (dq, diq, dgate) = jax.lax.scan(one, init, (chunks, stacked, rows))
  diq_ITJ = jnp.moveaxis(diq, 2, 0).reshape(diq.shape[2], -1, diq.shape[4])
  keys = lambda x_SGK: x_SGK.swapaxes(0, 1)[:, :S, :K]
  return (join_groups(dq, T)[:, :N, :K], keys(dk_SGK), keys(dv_SGK), diq_ITJ[:I, :T, :J], dik_SJ[:S, :J],
          dgate.reshape(-1, dgate.shape[3])[:T, :I])


def forward(options: Options, rows: Row, selection):
  return tiles.over_rows(functools.partial(forward_row, options), (rows, selection), loop=True)


def backward(options: Options, rows: Row, *saved):
  return tiles.over_rows(functools.partial(backward_row, options), (rows, *saved), loop=True)


def dsa_attention(*arrays, **options) -> DSAOutput:
  return attend(Passes(forward, backward), *arrays, **options)
