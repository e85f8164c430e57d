"""Parts of sparse attention in its xla form by themselves, for `keye bench attention`: index scores, and attention to a
selection that is given as it lies inside a chunk.

B = 1 row. T query time, S key time, H query heads, K head dim, I indexer heads, J indexer head dim, C chunks, M groups
of a chunk.
"""
import jax

from pallas_kernels import tiles
from pallas_kernels.dense_attention.xla import join_queries
from pallas_kernels.dsa_attention import chunks, way
from pallas_kernels.dsa_attention.row import Options, stacked
from pallas_kernels.index_select import xla


def score(iq_TIJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S) -> jax.Array:
  """The largest index score of each query, [T], through the buffers that a selection uses."""
  keys = xla.cut_keys(xla.WIDE, ik_SJ, k_segment_S, k_order_S)
  size = min(len(q_order_T), xla.QUERIES)
  queries = xla.cut_queries(size, iq_TIJ.swapaxes(0, 1), gate_TI, q_segment_T, q_order_T, keys)
  step = lambda buffer, query: xla.in_scores(buffer, query, keys, lambda score_PTS, _: score_PTS.max((0, 2)))
  return jax.lax.scan(step, xla.empty_buffer(size, keys), queries)[1].reshape(-1)[:len(q_order_T)]


def cut(topk: int, arrays: tuple) -> tuple[Options, chunks.Plan]:
  """As `dsa_attention` cuts a long row of these arguments, without the indexer's loss."""
  q_BTHK, k_BSGK = arrays[:2]
  (_, T, H, K), S = q_BTHK.shape, k_BSGK.shape[1]
  row = jax.tree.map(lambda a: a[0], stacked(*arrays))
  options = Options(topk, K ** -0.5, False, way.choose('xla', H, T, S, topk, False, None))
  return options, chunks.plan(options, row, None, *chunks.sizes(row))


def words(topk: int, arrays: tuple) -> jax.Array:
  """What each chunk selects, a word of bits for every group and key, [C, M, S]."""
  options, row = cut(topk, arrays)
  step = lambda buffer, chunk: chunks.select(options, row, buffer, chunk, replay=False)[::2]
  return jax.lax.scan(step, chunks.start_buffer(row), row.chunks)[1]


def attend(topk: int, arrays: tuple, word_CMS: jax.Array) -> jax.Array:
  """o_BTHK of what `words` found."""
  (options, row), T = cut(topk, arrays), arrays[0].shape[1]
  kv_SX = chunks.gathered_keys(options, row)
  one = lambda inputs: chunks.attend(options, row, kv_SX, *inputs)[0]
  o_GNK = join_queries(jax.lax.map(one, (row.chunks, word_CMS)), T, row.size)
  return tiles.unstack_heads(o_GNK[None], T)
