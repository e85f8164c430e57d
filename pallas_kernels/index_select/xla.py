"""Index scores and top-k in memory linear in the sequence.

Long rows go in groups of QUERIES queries, whose scores against all keys lie in one buffer while the threshold is
searched; key tiles in which nothing is visible are neither scored nor searched.

B batch, T query time, S key time, I indexer heads, J indexer head dim, Q query groups, P key tiles.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.index_select import search
from pallas_kernels.index_select.selection import Selection, keep_all
from pallas_kernels.mask import visible

SMALL = 512        # rows with at most this many tokens are one tile
QUERIES = 32       # of a group: their selection is one word of bits for each key
WIDE = 4096        # keys of a tile
LENGTHS = 4        # static lengths a search is compiled for


def products(iq_ITJ, ik_SJ) -> jax.Array:
  """iq . ik, float32 [I, T, S]."""
  I, T, J = iq_ITJ.shape
  return stacked_products(iq_ITJ.reshape(I * T, J), ik_SJ).reshape(I, T, -1)


def stacked_products(iq_NJ, ik_SJ) -> jax.Array:
  """iq . ik, float32 [N, S]; products of bfloat16 are exact as they are."""
  exact = iq_NJ.dtype == ik_SJ.dtype == jnp.bfloat16
  return jnp.einsum('NJ,SJ->NS', iq_NJ, ik_SJ, precision=None if exact else 'highest',
                    preferred_element_type=jnp.float32)


def score(z_ITS, gate_TI) -> jax.Array:
  """[T, S] from `products`; one fused loop over the heads."""
  gate_TI = gate_TI.astype(jnp.float32)
  score_TS = sum(jax.nn.relu(z_ITS[i]) * gate_TI[:, i:i + 1] for i in range(len(z_ITS)))
  return jnp.where(score_TS == 0, 0.0, score_TS)


def masked_score(iq_ITJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S) -> jax.Array:
  """Scores [T, S], -inf where the key is not visible."""
  mask_TS = visible(q_segment_T[:, None], k_segment_S, q_order_T[:, None], k_order_S, causal=True)
  return jnp.where(mask_TS, score(products(iq_ITJ, ik_SJ), gate_TI), -jnp.inf)


def select_one(topk, iq_ITJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S):
  """(threshold_T, last_T) of a row in one tile."""
  score_TS = masked_score(iq_ITJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S)
  return search.kth(score_TS[None], k_order_S[None], topk)


def select_tiles(topk, iq_ITJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S):
  """(threshold_T, last_T) of a long row."""
  T = len(q_order_T)
  keys = cut_keys(WIDE, ik_SJ, k_segment_S, k_order_S)
  size = min(T, QUERIES)
  queries = cut_queries(size, iq_ITJ, gate_TI, q_segment_T, q_order_T, keys)

  def one(buffer_PTS, query):
    buffer_PTS, (threshold_T, last_T) = in_scores(buffer_PTS, query, keys, lambda x, order: search.kth(x, order, topk))
    return buffer_PTS, (threshold_T, last_T)

  _, (threshold_QT, last_QT) = jax.lax.scan(one, empty_buffer(size, keys), queries)
  return threshold_QT.reshape(-1)[:T], last_QT.reshape(-1)[:T]


class Keys(NamedTuple):
  """Index keys of a row in wide tiles."""
  ik_PSJ: jax.Array
  segment_PS: jax.Array
  order_PS: jax.Array


class Queries(NamedTuple):
  """Up to QUERIES index queries, or with a leading Q all of a row, and the key tiles they meet, in front."""
  iq_ITJ: jax.Array
  gate_TI: jax.Array
  segment_T: jax.Array
  order_T: jax.Array
  tile_P: jax.Array
  count: jax.Array


def cut_keys(wide: int, ik_SJ, segment_S, order_S) -> Keys:
  """Tiles of `wide` keys, of fewer in a short row."""
  size = min(wide, -(-len(order_S) // tiles.KEYS) * tiles.KEYS)
  cut = lambda x, value=0: tiles.cut(tiles.pad(x, 0, size, value), 0, size)
  return Keys(cut(ik_SJ), cut(segment_S, tiles.KEY_PAD), cut(order_S))


def cut_queries(size: int, iq_ITJ, gate_TI, segment_T, order_T, keys: Keys) -> Queries:
  cut = lambda x, axis=0, value=0: tiles.cut(tiles.pad(x, axis, size, value), axis, size)
  segment_QT, order_QT = cut(segment_T, 0, tiles.QUERY_PAD), cut(order_T)
  meet_QP = tiles.meeting(segment_QT, keys.segment_PS, order_QT, keys.order_PS, causal=True)
  return Queries(cut(iq_ITJ, 1), cut(gate_TI), segment_QT, order_QT, *tiles.front(meet_QP))


def empty_buffer(size: int, keys: Keys) -> jax.Array:
  """Room for the scores of `size` queries against all keys, used again by every group of queries."""
  P, S = keys.order_PS.shape
  return jnp.full((P, size, S), -jnp.inf)


def in_scores(buffer_PTS, query: Queries, keys: Keys, fn: Callable):
  """(buffer, fn(score_PTS, order_PS)) on the scores of `query` against the key tiles it meets, in front.

  fn runs on a prefix of the tiles, the shortest of a few static lengths that holds them; tiles beyond are -inf.
  """
  P = len(keys.order_PS)

  def fill(i, buffer_PTS):
    p = query.tile_P[i]
    score_TS = masked_score(query.iq_ITJ, keys.ik_PSJ[p], query.gate_TI, query.segment_T, keys.segment_PS[p],
                            query.order_T, keys.order_PS[p])
    return buffer_PTS.at[i].set(score_TS)

  lengths = sorted({-(-P * i // LENGTHS) for i in range(1, LENGTHS + 1)})
  choice = sum((query.count > n).astype(jnp.int32) for n in lengths[:-1])
  buffer_PTS = jax.lax.fori_loop(0, query.count, fill, buffer_PTS)
  buffer_PTS = jax.lax.fori_loop(query.count, jnp.asarray(lengths)[choice], lambda i, b: b.at[i].set(-jnp.inf),
                                 buffer_PTS)
  order_PS = keys.order_PS[query.tile_P]
  prefix = lambda n: lambda buffer_PTS: fn(buffer_PTS[:n], order_PS[:n])
  return buffer_PTS, jax.lax.switch(choice, [prefix(n) for n in lengths], buffer_PTS)


def is_small(heads: int, T: int, S: int) -> bool:
  return max(T, S) <= SMALL or T * S <= SMALL * SMALL and S <= WIDE or tiles.one_tile(heads, T, S)


def index_select(iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, *, topk) -> Selection:
  B, T, I, _ = iq_BTIJ.shape
  S = ik_BSJ.shape[1]
  if topk >= S:
    return keep_all((B, T))
  small = is_small(I, T, S)
  row = functools.partial(select_one if small else select_tiles, topk)
  return Selection(*tiles.over_rows(row, (iq_BTIJ.swapaxes(1, 2), ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS,
                                          q_order_BT, k_order_BS), loop=not small or I * T * S >= tiles.MANY))
