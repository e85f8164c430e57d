"""The warm-up loss of the indexer on a GPU: kernels over the tiles in which a query sees a key, in each of which
attention's probabilities, averaged over heads, and the scores of the indexer are formed and meet.

The backward pass goes over chunks of queries. A first kernel leaves the gradient of a chunk's scores in memory, with
which a second one sums the gradients of each query and head, and a third those of each key, in a fixed order.

T query time, S key time (in a kernel: of a tile), H query heads, G KV heads, R query heads of a KV head, K head dim,
I indexer heads, J indexer head dim, Q and P tiles of queries and keys, C chunks.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu_call, tiles
from pallas_kernels.dense_attention.gpu import Places, features, heads, lists, numbers
from pallas_kernels.gpu_call import LOG2E, dot, float32
from pallas_kernels.indexer_warmup.gradient import Row, by_row, warm
from pallas_kernels.indexer_warmup.xla import kl_end
from pallas_kernels.mask import NEG_INF, visible

TILE = 64               # queries and keys
SCRATCH = 2**28         # bytes of the gradients of a chunk's scores
WARPS = 4
STAGES = {2: 3, 4: 1}   # by bytes of a number


class Queries(NamedTuple):
  """What kernels read of queries: segments and orders, and in whole tiles the rest."""
  q_segment_T: jax.Array
  q_order_T: jax.Array
  q_HTK: jax.Array
  lse_HT: jax.Array
  iq_ITJ: jax.Array
  gate_IT: jax.Array


class Keys(NamedTuple):
  k_segment_S: jax.Array
  k_order_S: jax.Array
  k_GSK: jax.Array
  ik_SJ: jax.Array


def cut(row: Row, size: int) -> tuple[Queries, Keys]:
  """Queries filled up to a multiple of `size`, keys to whole tiles."""
  T, fill = len(row.q_order_T), lambda x, axis, value=0: tiles.pad(x, axis, size, value)
  keys = lambda x, axis, value=0: tiles.pad(x, axis, TILE, value)
  queries = Queries(fill(row.q_segment_T, 0, tiles.QUERY_PAD), fill(row.q_order_T, 0),
                    heads(row.q_GNK, T, size), numbers(row.lse_GN, T, size),
                    fill(features(row.iq_ITJ), 1), fill(row.gate_TI.T.astype(jnp.float32), 1))
  return queries, Keys(keys(row.k_segment_S, 0, tiles.KEY_PAD), keys(row.k_order_S, 0),
                       keys(features(row.k_GSK), 1), keys(features(row.ik_SJ), 0))


def met(queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
  """bool [Q, P]: do tiles meet, is everything visible."""
  return Places(queries.q_segment_T, keys.k_segment_S, queries.q_order_T, keys.k_order_S).met(TILE, TILE, causal=True)


def call(kernel, grid, arrays, outputs, width: int, **options):
  return gpu_call.call(kernel, grid, arrays, outputs, warps=WARPS, stages=STAGES[width], **options)


def mask_of(refs, queries, keys) -> jax.Array:
  (q_segment_ref, q_order_ref), (k_segment_ref, k_order_ref) = refs[:2], refs[6:8]
  return visible(q_segment_ref[queries][:, None], k_segment_ref[keys], q_order_ref[queries][:, None], k_order_ref[keys],
                 causal=True)


def target(refs, queries, keys, mask_TS, scale) -> jax.Array:
  """Attention probabilities averaged over heads, [T, S]."""
  q_ref, lse_ref, k_ref = refs[2], refs[3], refs[8]
  H, R = q_ref.shape[0], q_ref.shape[0] // k_ref.shape[0]

  def one(h, p_TS):
    x_TS = dot(q_ref[h, queries], k_ref[h // R, keys].T) * (scale * LOG2E)
    return p_TS + jnp.exp2(x_TS - lse_ref[h, queries][:, None] * LOG2E)

  return jnp.where(mask_TS, jax.lax.fori_loop(0, H, one, jnp.zeros(mask_TS.shape, jnp.float32)) / H, 0)


def scores(refs, queries, keys) -> jax.Array:
  """[T, S]."""
  iq_ref, gate_ref, ik_SJ = refs[4], refs[5], refs[9][keys]

  def one(i, score_TS):
    return score_TS + jnp.maximum(dot(iq_ref[i, queries], ik_SJ.T), 0) * gate_ref[i, queries][:, None]

  return jax.lax.fori_loop(0, iq_ref.shape[0], one, jnp.zeros((TILE, TILE), jnp.float32))


def forward_row(scale, row: Row):
  """(kl_T, log-sum-exp of the scores [T]) of a row."""
  T = len(row.q_order_T)
  queries, keys = cut(row, TILE)
  tile_QP, _, count_Q = lists(*met(queries, keys))
  size = len(queries.q_order_T)
  state = call(functools.partial(_loss, scale=scale), (len(count_Q),), [*queries, *keys, tile_QP, count_Q],
               [float32(size)] * 4, queries.q_HTK.dtype.itemsize)
  return tuple(x_T[:T] for x_T in kl_end([x_T[:, None] for x_T in state]))


def _loss(*refs, scale):
  *arrays, tile_ref, count_ref, m_out, l_out, part_out, mass_out = refs
  i = len(count_ref) - 1 - pl.program_id(0)            # those that meet most keys of a causal row begin
  queries = pl.ds(i * TILE, TILE)

  def one(n, state):
    m_T, l_T, part_T, mass_T = state
    keys = pl.ds(tile_ref[i, n] * TILE, TILE)
    mask_TS = mask_of(arrays, queries, keys)
    p_TS, score_TS = target(arrays, queries, keys, mask_TS, scale), scores(arrays, queries, keys)
    new_T = jnp.maximum(m_T, jnp.where(mask_TS, score_TS, NEG_INF).max(1))
    l_T = l_T * jnp.exp(m_T - new_T) + jnp.where(mask_TS, jnp.exp(score_TS - new_T[:, None]), 0).sum(1)
    part_TS = p_TS * (jnp.log(jnp.where(p_TS > 0, p_TS, 1)) - score_TS)
    return new_T, l_T, part_T + part_TS.sum(1), mass_T + p_TS.sum(1)

  zeros_T = jnp.zeros(TILE, jnp.float32)
  state = jax.lax.fori_loop(0, count_ref[i], one, (jnp.full(TILE, NEG_INF, jnp.float32), zeros_T, zeros_T, zeros_T))
  for out, x_T in zip((m_out, l_out, part_out, mass_out), state):
    out[queries] = x_T


def backward_row(scale, row: Row, index_lse_T, dkl_T):
  """Gradients (diq_ITJ, dik_SJ, dgate_TI) of a row, float32."""
  (_, T, J), S = row.iq_ITJ.shape, len(row.k_order_S)
  size = min(max(SCRATCH // (4 * S) // TILE, 1) * TILE, -(-T // TILE) * TILE)
  queries, keys = cut(row, size)
  to_chunks = lambda x_T: tiles.pad(x_T, 0, size).reshape(-1, size)
  axes = Queries(0, 0, 1, 1, 1, 1)
  chunks = (Queries(*(tiles.cut(x, axis, size) for x, axis in zip(queries, axes))), to_chunks(index_lse_T),
            to_chunks(dkl_T))
  dik_SJ, (diq_CITJ, dgate_CIT) = jax.lax.scan(
      functools.partial(gradients, scale, keys), jnp.zeros(keys.ik_SJ.shape), chunks)
  return tiles.join(diq_CITJ, 1)[:, :T, :J], dik_SJ[:S, :J], tiles.join(dgate_CIT, 1)[:, :T].T


def gradients(scale, keys: Keys, dik_SJ, chunk):
  """(dik_SJ with this chunk's part added, (diq_ITJ, dgate_IT))."""
  queries, index_lse_T, dkl_T = chunk
  (I, T, J), S, width = queries.iq_ITJ.shape, len(keys.ik_SJ), queries.q_HTK.dtype.itemsize
  meet = met(queries, keys)
  tile_QP, _, count_Q = lists(*meet)
  tile_PQ, _, count_P = lists(*(x.T for x in meet))
  dscore_TS, = call(functools.partial(_of_scores, scale=scale), tile_QP.shape,
                    [*queries, *keys, tile_QP, count_Q, index_lse_T, dkl_T], [float32(T, S)], width)
  index = [queries.iq_ITJ, queries.gate_IT, keys.ik_SJ, dscore_TS]
  dqueries = call(_of_queries, (I, len(count_Q)), [*index, tile_QP, count_Q], [float32(I, T, J), float32(I, T)], width)
  dik_SJ, = call(_of_keys, (len(count_P),), [*index, tile_PQ, count_P, dik_SJ], [float32(S, J)], width,
                 aliases={len(index) + 2: 0})
  return dik_SJ, tuple(dqueries)


def _of_scores(*refs, scale):
  """The gradient of a score is (softmax(score) - p) * dkl."""
  *arrays, tile_ref, count_ref, index_lse_ref, dkl_ref, out = refs
  i, n = pl.program_id(0), pl.program_id(1)

  @pl.when(n < count_ref[i])
  def _():
    queries, keys = pl.ds(i * TILE, TILE), pl.ds(tile_ref[i, n] * TILE, TILE)
    mask_TS = mask_of(arrays, queries, keys)
    p_TS, score_TS = target(arrays, queries, keys, mask_TS, scale), scores(arrays, queries, keys)
    softmax_TS = jnp.where(mask_TS, jnp.exp(score_TS - index_lse_ref[queries][:, None]), 0)
    out[queries, keys] = (softmax_TS - p_TS) * dkl_ref[queries][:, None]


def _of_queries(iq_ref, gate_ref, ik_ref, dscore_ref, tile_ref, count_ref, diq_out, dgate_out):
  h, i = pl.program_id(0), pl.program_id(1)
  queries = pl.ds(i * TILE, TILE)
  iq_TJ, gate_T1 = iq_ref[h, queries], gate_ref[h, queries][:, None]

  def one(n, state):
    diq_TJ, dgate_T = state
    keys = pl.ds(tile_ref[i, n] * TILE, TILE)
    ik_SJ, dscore_TS = ik_ref[keys], dscore_ref[queries, keys]
    z_TS = dot(iq_TJ, ik_SJ.T)
    dz_TS = jnp.where(z_TS > 0, dscore_TS * gate_T1, 0)
    return diq_TJ + dot(dz_TS.astype(ik_SJ.dtype), ik_SJ), dgate_T + (jnp.maximum(z_TS, 0) * dscore_TS).sum(1)

  init = jnp.zeros(iq_TJ.shape, jnp.float32), jnp.zeros(TILE, jnp.float32)
  diq_out[h, queries], dgate_out[h, queries] = jax.lax.fori_loop(0, count_ref[i], one, init)


def _of_keys(iq_ref, gate_ref, ik_ref, dscore_ref, tile_ref, count_ref, before_ref, dik_out):
  p = pl.program_id(0)
  keys = pl.ds(p * TILE, TILE)
  ik_SJ = ik_ref[keys]

  def one(n, dik_SJ):
    queries = pl.ds(tile_ref[p, n] * TILE, TILE)
    dscore_ST = dscore_ref[queries, keys].T

    def head(h, dik_SJ):
      iq_TJ = iq_ref[h, queries]
      dz_ST = jnp.where(dot(ik_SJ, iq_TJ.T) > 0, dscore_ST * gate_ref[h, queries], 0)
      return dik_SJ + dot(dz_ST.astype(iq_TJ.dtype), iq_TJ)

    return jax.lax.fori_loop(0, iq_ref.shape[0], head, dik_SJ)

  dik_out[keys] = jax.lax.fori_loop(0, count_ref[p], one, before_ref[keys])


indexer_warmup = functools.partial(warm, by_row(forward_row, backward_row))
