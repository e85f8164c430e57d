"""Dense attention without the T x S matrix: an online softmax over key tiles, and its backward pass.

Key tiles in which nothing is visible are skipped, found from the least and greatest order and sample of each tile, so
that causal rows cost half and packed rows cost the sum of their samples' squares, in any layout. Rows of few tokens
are one tile: a plain softmax over the whole batch at once.

B batch, T query time, S key time, H query heads, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim,
Q query tiles, P key tiles.
"""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dense_attention.gradient import Options, Passes, Row, attend
from pallas_kernels.mask import NEG_INF, visible

SMALL = 512                # rows with at most this many keys are one tile
FEW = 16                   # so are this few queries (decoding), however many the keys
QUERY_ROWS = 2048          # query rows of a tile, all heads together
BACKWARD_KEYS = 128        # keys of a tile, backward: four arrays of logits are at work there, forward one
MASKS = 1 << 24            # places of query and key, of all rows together, up to which masks are made before the loop


def dense_attention(*arrays, **options):
  return attend(Passes(forward, backward), *arrays, **options)


def forward(options: Options, rows: Row):
  row, places, loop = of_rows(options, rows, forward_one, forward_tiles)
  return tiles.over_rows(row, (*rows[:3], *places), loop)


def backward(options: Options, rows: Row, *of_queries):
  row, places, loop = of_rows(options, rows, backward_one, backward_tiles)
  return tiles.over_rows(row, (*rows[:3], *of_queries, *places), loop)


def is_small(T: int, S: int) -> bool:
  return T <= FEW or max(T, S) <= max(SMALL, tiles.large())


def of_rows(options: Options, rows: Row, one: Callable, in_tiles: Callable):
  """(what computes a row, its last arguments of all rows: who sees whom, is the batch a loop)."""
  (B, G, N, _), T, S = rows.q_GNK.shape, rows.q_order_T.shape[1], rows.k_order_S.shape[1]
  places, (causal, scale) = rows[3:], options
  small = is_small(T, S)
  loop = not small or G * N * S >= tiles.MANY
  if not small:
    return functools.partial(in_tiles, causal=causal, scale=scale), places, loop
  if masks_first(B, T, S):
    return functools.partial(one, scale=scale), (mask_bias(*places, causal),), loop
  return lambda *arrays: one(*arrays[:-4], mask_bias(*arrays[-4:], causal), scale=scale), places, loop


def masks_first(B: int, T: int, S: int) -> bool:
  """Whether the masks of small rows are made before the loop over them, where there is memory for all. Computed inside
  it, a mask is fused into the loops over every head's logits, which then take 8 times as long on a CPU."""
  return B * T * S <= MASKS


def mask_bias(q_segment_T, k_segment_S, q_order_T, k_order_S, causal: bool) -> jax.Array:
  """`tiles.bias` of a row, or with a leading B of all rows."""
  return tiles.bias(visible(q_segment_T[..., :, None], k_segment_S[..., None, :], q_order_T[..., :, None],
                            k_order_S[..., None, :], causal))


def forward_one(q_GNK, k_GSK, v_GSK, bias_TS, *, scale):
  """(o_GNK float32, lse_GN) of a row in one tile."""
  return attend_one(q_GNK, k_GSK, v_GSK, bias_TS, scale)[:2]


def attend_one(q_GNK, k_GSK, v_GSK, bias_TS, scale):
  """(o_GNK float32, lse_GN, probabilities p_GNS) under any mask. A query that sees nothing gets 0 and NEG_INF."""
  x_GNS = tiles.logits(q_GNK, k_GSK, bias_TS, scale)
  m_GN = x_GNS.max(-1)
  seen_GN = m_GN > NEG_INF
  w_GNS = jnp.exp(x_GNS - jnp.where(seen_GN, m_GN, 0)[..., None])
  l_GN = jnp.where(seen_GN, w_GNS.sum(-1), 1)
  p_GNS = w_GNS / l_GN[..., None]
  return tiles.dot('GNS,GSK->GNK', p_GNS, v_GSK), jnp.where(seen_GN, m_GN + jnp.log(l_GN), NEG_INF), p_GNS


def backward_one(q_GNK, k_GSK, v_GSK, lse_GN, delta_GN, do_GNK, bias_TS, *, scale):
  _, dq_GNK, dk_GKS, dv_GKS = tiles.gradients(q_GNK, k_GSK, v_GSK, lse_GN, delta_GN, do_GNK, bias_TS, scale)
  return dq_GNK, *tiles.transposed(dk_GKS, dv_GKS)


def cut_row(q_GNK, k_GSK, v_GSK, q_segment_T, k_segment_S, q_order_T, k_order_S, causal, keys):
  """Tile size of the queries, then keys and values in tiles of `keys`, the mask of a tile pair, and
  `tiles.whole_first`."""
  (G, N, _), T = q_GNK.shape, len(q_order_T)
  block = min(keys, -(-T // 8) * 8) if tiles.large() else query_tile(T, G * N // T)
  cut = lambda x, axis, size, value=0: tiles.cut(tiles.pad(x, axis, size, value), axis, size)
  q_segment_QT, q_order_QT = cut(q_segment_T, 0, block, tiles.QUERY_PAD), cut(q_order_T, 0, block)
  k_segment_PS, k_order_PS = cut(k_segment_S, 0, keys, tiles.KEY_PAD), cut(k_order_S, 0, keys)

  def mask(i, p):
    return visible(q_segment_QT[i][:, None], k_segment_PS[p], q_order_QT[i][:, None], k_order_PS[p], causal)

  places = q_segment_QT, k_segment_PS, q_order_QT, k_order_PS, causal
  met = tiles.whole_first(tiles.meeting(*places), tiles.all_visible(*places))
  return block, (cut(k_GSK, 1, keys), cut(v_GSK, 1, keys)), mask, met


def key_tile() -> int:
  return tiles.large() or tiles.KEYS


def query_tile(T: int, H: int) -> int:
  """Queries of a tile: QUERY_ROWS rows over all heads, a multiple of 8."""
  return max(min(QUERY_ROWS // H, 512, -(-T // 8) * 8) // 8, 1) * 8


def cut_queries(x_GNK, T: int, block: int):
  G, N, *rest = x_GNK.shape
  x_GNK = tiles.pad(x_GNK.reshape(G, N // T, T, *rest), 2, block)
  return tiles.cut_heads(x_GNK.reshape(G, -1, *rest), x_GNK.shape[2], block)


def join_queries(x_QGNK, T: int, block: int):
  x_GNK = tiles.join_heads(x_QGNK, block)
  G, N, *rest = x_GNK.shape
  padded = x_QGNK.shape[0] * block
  return x_GNK.reshape(G, N // padded, padded, *rest)[:, :, :T].reshape(G, -1, *rest)


def forward_tiles(q_GNK, k_GSK, v_GSK, q_segment_T, k_segment_S, q_order_T, k_order_S, *, causal, scale):
  T = len(q_order_T)
  block, (k_PGSK, v_PGSK), mask, met = cut_row(q_GNK, k_GSK, v_GSK, q_segment_T, k_segment_S, q_order_T, k_order_S,
                                               causal, key_tile())
  is_bounded = tiles.bounded(q_GNK, k_GSK, scale)

  def one(query):
    i, q_GNK, met = query
    return tiles.attend(q_GNK, k_PGSK, v_PGSK, *met, lambda p: mask(i, p), scale, is_bounded)

  q_QGNK = cut_queries(q_GNK, T, block)
  o_QGNK, lse_QGN = jax.lax.map(one, (jnp.arange(len(q_QGNK)), q_QGNK, met))
  return join_queries(o_QGNK, T, block), join_queries(lse_QGN, T, block)


def backward_tiles(q_GNK, k_GSK, v_GSK, lse_GN, delta_GN, do_GNK, q_segment_T, k_segment_S, q_order_T, k_order_S, *,
                   causal, scale):
  T, S = len(q_order_T), len(k_order_S)
  block, (k_PGSK, v_PGSK), mask, (tile_QP, _, count_Q) = cut_row(
      q_GNK, k_GSK, v_GSK, q_segment_T, k_segment_S, q_order_T, k_order_S, causal, tiles.large() or BACKWARD_KEYS)
  queries = [cut_queries(x, T, block) for x in (q_GNK, lse_GN, delta_GN, do_GNK)]

  def one(grads, query):
    i, tile_P, count, q_GNK, lse_GN, delta_GN, do_GNK = query

    def step(n, carry):
      dq_GNK, dk_PGKS, dv_PGKS = carry
      p = tile_P[n]
      _, dq, dk, dv = tiles.gradients(q_GNK, k_PGSK[p], v_PGSK[p], lse_GN, delta_GN, do_GNK, tiles.bias(mask(i, p)),
                                      scale)
      return dq_GNK + dq, dk_PGKS.at[p].add(dk), dv_PGKS.at[p].add(dv)

    dq_GNK, *grads = jax.lax.fori_loop(0, count, step, (jnp.zeros(q_GNK.shape), *grads))
    return tuple(grads), dq_GNK

  init = tuple(jnp.zeros(x.shape) for x in tiles.transposed(k_PGSK, v_PGSK))
  dkv, dq_QGNK = jax.lax.scan(one, init, (jnp.arange(len(queries[0])), tile_QP, count_Q, *queries))
  return join_queries(dq_QGNK, T, block), *(tiles.join(x, 1)[:, :S] for x in tiles.transposed(*dkv))
