"""Index scores and top-k on a GPU, exactly and without a sort.

A chunk of queries is scored against the key tiles that it meets into one buffer in device memory, as integers in the
order of the scores. The threshold of a row is found in steps that all run on many cores: a value that very likely lies
below it, from the scores of a sample of the keys; a list of the scores from there on, which is less than twice topk
long (how many each tile has is counted while it is scored, so that every tile knows where its own go); a bisection of
that list, or of the whole row when the list turned out too short or too long (a row in 30,000, or many equal scores).
Either way the result is that of a full sort. A last kernel turns scores and thresholds into words of bits.

T queries of a chunk, S keys of a tile, P key tiles, N keys of all tiles, C candidates, I indexer heads, J indexer head
dim, M groups of a chunk.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import gpu_call, tiles
from pallas_kernels.gpu_call import int32
from pallas_kernels.index_select import search
from pallas_kernels.index_select.selection import MAX_ORDER, Selection, keep_all
from pallas_kernels.mask import visible

GROUP = 16                 # queries whose selections are one word of bits
ROOM = 2**30               # bytes of the buffer of scores
MOST = 4096                # queries of a chunk
TILE = 128                 # keys of a tile
ROWS = 64                  # queries of a program that scores
STRIDE = 16                # of the keys that are sampled, at least
SAMPLE = 16384             # keys of a row that are sampled, at most
SLACK = 4                  # standard deviations by which the bound from a sample is lowered
CANDIDATES = 4096          # room for the scores from the bound on
BLOCK = 512                # scores of a row that a program handles at a time
STEPS = 24                 # halvings of the range of keys in a sample, which leave 256 of 2**32 apart

MASKED = -2**31            # below the key of every score, -inf included
LOW, HIGH = -0x7f800000, 0x7f800001        # keys of the least finite score, and of more than any
KEEP_ALL = LOW - 1                         # key of -inf


class Tiles(NamedTuple):
  """The key tiles that queries meet, in front, and what breaks ties in them."""
  order_PS: jax.Array
  tile_P: jax.Array
  count_M: jax.Array          # for each group: how many those are


class Chunk(NamedTuple):
  """Index queries of a chunk, and with a leading C of all chunks of a row."""
  iq_ITJ: jax.Array
  gate_IT: jax.Array          # float32
  segment_T: jax.Array
  order_T: jax.Array
  tile_P: jax.Array
  count_M: jax.Array


class Keys(NamedTuple):
  """Index keys of a row."""
  ik_PSJ: jax.Array
  segment_PS: jax.Array
  order_PS: jax.Array


def chunk_size(T: int, S: int) -> int:
  """Queries of a chunk, a multiple of a group: as many as have room."""
  fit = max(min(ROOM // (4 * S), MOST) // ROWS * ROWS, ROWS)
  return min(fit, -(-T // GROUP) * GROUP)


def meet(chunk: Chunk, keys: Keys) -> Tiles:
  return Tiles(keys.order_PS, chunk.tile_P, chunk.count_M)


def scores(chunk: Chunk, keys: Keys, low_T: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(key_TN int32, keys of the scores, tiles in the order of tile_P, those behind its front not written; number_TP, how
  many of a tile are at least low_T)."""
  T, (P, S) = chunk.iq_ITJ.shape[1], keys.order_PS.shape
  rows = min(ROWS, T & -T)
  return tuple(gpu_call.call(
      functools.partial(_scores, rows=rows), (T // rows, P), [*chunk[:4], *keys, *chunk[4:], low_T],
      [int32(T, buffer_width(P * S)), int32(T, P)], warps=4, stages=3))


def buffer_width(N: int) -> int:
  """Scores of a row that there is room for: whole blocks."""
  return -(-N // BLOCK) * BLOCK


def _scores(iq_ref, gate_ref, q_segment_ref, q_order_ref, ik_ref, k_segment_ref, k_order_ref, tile_ref, count_ref,
            low_ref, key_out, number_out, *, rows):
  t, n = pl.program_id(0) * rows, pl.program_id(1)
  heads, S = iq_ref.shape[0], ik_ref.shape[1]
  queries = pl.ds(t, rows)
  number_out[queries, n] = jnp.zeros(rows, jnp.int32)

  @pl.when(n < count_ref[0])
  def _():
    p = tile_ref[n]
    ik_SJ = ik_ref[p]

    def add(i, state):
      score_TS, gate_T = state
      after_T = gate_ref[jnp.minimum(i + 1, heads - 1), queries]       # on its way while the product is computed
      z_TS = gpu_call.dot(iq_ref[i, queries], ik_SJ.T)
      return score_TS + jnp.maximum(z_TS, 0) * gate_T[:, None], after_T

    score_TS, _ = jax.lax.fori_loop(0, heads, add, (jnp.zeros((rows, S), jnp.float32), gate_ref[0, queries]))
    mask_TS = visible(q_segment_ref[queries][:, None], k_segment_ref[p][None], q_order_ref[queries][:, None],
                      k_order_ref[p][None], causal=True)
    key_TS = jnp.where(mask_TS, search.key(jnp.where(score_TS == 0, 0.0, score_TS)), MASKED)
    key_out[queries, pl.ds(n * S, S)] = key_TS
    number_out[queries, n] = (key_TS >= low_ref[queries][:, None]).astype(jnp.int32).sum(1)


def sampled(chunk: Chunk, keys: Keys) -> tuple[Chunk, Keys, int]:
  """(chunk, keys, stride): every stride-th key of the tiles in front, which are tiles again."""
  P, S = keys.order_PS.shape
  stride = sample_stride(P * S)
  count = P * S // stride
  take = lambda x_PS, value=0: tiles.pad(x_PS[chunk.tile_P, ::stride].reshape(count, *x_PS.shape[2:]), 0, S, value)
  few = Keys(*(tiles.cut(take(x, value), 0, S) for x, value in zip(keys, (0, tiles.KEY_PAD, 0))))
  tile_P = jnp.arange(len(few.order_PS), dtype=jnp.int32)
  return chunk._replace(tile_P=tile_P, count_M=pl.cdiv(chunk.count_M, stride)), few, stride


def sample_stride(N: int) -> int:
  """Raises ValueError for rows that are too long to be sampled."""
  stride = max(gpu_call.ceil_pow2(-(-N // SAMPLE)), STRIDE)
  if stride > TILE:
    raise ValueError(f"index_select: {N} keys are more than the {SAMPLE * TILE} of the GPU's kernels; use "
                     "implementation='xla'")
  return stride


def bound(key_TN: jax.Array, length_T: jax.Array, stride: int, topk: int) -> jax.Array:
  """A key that very likely topk of the length_T scores of a row reach, from every stride-th of them: that of the sample
  whose rank is SLACK standard deviations beyond the expected one. In rows that fit into the list: below all."""
  T, N = key_TN.shape
  return gpu_call.call(functools.partial(_bound, stride=stride, topk=topk, size=gpu_call.ceil_pow2(N)), (T,),
                       [key_TN, length_T], [int32(T)], warps=4, stages=1)[0]


def _bound(key_ref, length_ref, low_out, *, stride, topk, size):
  t = pl.program_id(0)
  length, n = length_ref[t], jnp.arange(size, dtype=jnp.int32)
  x = triton.load(key_ref.at[t, n], mask=n < pl.cdiv(length, stride), other=MASKED)
  rank = int(topk / stride + SLACK * (topk / stride) ** 0.5) + 1

  def halve(_, state):
    low, high = state
    middle = search.halfway(low, high)
    up = count(x >= middle) >= rank
    return jnp.where(up, middle, low), jnp.where(up, high, middle)

  low, _ = jax.lax.fori_loop(0, STEPS, halve, (jnp.int32(MASKED + 1), jnp.int32(HIGH)))
  low_out[t] = jnp.where(length > CANDIDATES, low, MASKED + 1)


def score_and_bound(chunk: Chunk, keys: Keys, topk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(key_TN, number_TP, low_T): `scores` and the bound that they were counted from."""
  T, (P, S) = chunk.iq_ITJ.shape[1], keys.order_PS.shape
  low_T = jnp.full(T, MASKED + 1)
  if P * S > CANDIDATES:
    few_chunk, few_keys, stride = sampled(chunk, keys)
    key_TN, _ = scores(few_chunk, few_keys, low_T)
    low_T = bound(key_TN, jnp.broadcast_to(chunk.count_M[0] * S, T), stride, topk)
  return *scores(chunk, keys, low_T), low_T


def kth(key_TN, number_TP, low_T, met: Tiles, topk: int) -> tuple[jax.Array, jax.Array]:
  """(key_T, last_T): key of the threshold and order of the last key kept at it, from `scores`."""
  (T, N), S = key_TN.shape, met.order_PS.shape[1]
  length_T = jnp.repeat(met.count_M * S, T // len(met.count_M))
  end_TP = jnp.cumsum(number_TP, 1)
  rows = min(T & -T, 4)
  found = gpu_call.call(
      functools.partial(_candidates, rows=rows, S=S), (T // rows, N // BLOCK),
      [key_TN, length_T, low_T, end_TP - number_TP], [int32(T, CANDIDATES), int32(T, CANDIDATES)], warps=4, stages=1)
  return tuple(gpu_call.call(functools.partial(_kth, topk=topk), (T,),
                             [key_TN, length_T, met.order_PS, met.tile_P, low_T, *found, end_TP[:, -1]],
                             [int32(T), int32(T)], warps=4, stages=1))


def _candidates(key_ref, length_ref, low_ref, start_ref, key_out, place_out, *, rows, S):
  """Keys and places in the row of the scores from the bound on, as far as there is room."""
  t, n = pl.program_id(0) * rows, pl.program_id(1)
  queries, place_B = pl.ds(t, rows), n * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
  length_T1 = length_ref[queries][:, None]

  @pl.when(n * BLOCK < jnp.max(length_T1))
  def _():
    x_TB = triton.load(key_ref.at[queries, pl.ds(n * BLOCK, BLOCK)], mask=place_B[None] < length_T1, other=MASKED)
    flag_TB = x_TB >= low_ref[queries][:, None]
    rank_TB = start_ref[queries, n * BLOCK // S][:, None] + jnp.cumsum(flag_TB.astype(jnp.int32), 1) - 1
    flag_TB &= rank_TB < CANDIDATES
    row_T1 = t + jnp.arange(rows, dtype=jnp.int32)[:, None]
    gpu_call.store(key_out, (row_T1, rank_TB), x_TB, flag_TB)
    gpu_call.store(place_out, (row_T1, rank_TB), jnp.broadcast_to(place_B[None], x_TB.shape), flag_TB)


def part(key_ref, t, n, length):
  """(keys, places) of step n over a row."""
  place = n * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
  return triton.load(key_ref.at[t, pl.ds(n * BLOCK, BLOCK)], mask=place < length, other=MASKED), place


def count(flag: jax.Array) -> jax.Array:
  return jnp.sum(flag.astype(jnp.int32))


def _kth(key_ref, length_ref, order_ref, tile_ref, low_ref, key_candidates, place_candidates, found_ref, key_out,
         last_out, *, topk):
  t = pl.program_id(0)
  length = length_ref[t]
  found = found_ref[t]

  order = lambda place, flag: place_order(order_ref, tile_ref, place(flag), flag)

  def among_candidates():
    n = jnp.arange(CANDIDATES, dtype=jnp.int32)
    x = triton.load(key_candidates.at[t, pl.ds(0, CANDIDATES)], mask=n < found, other=MASKED)
    place = lambda flag: triton.load(place_candidates.at[t, n], mask=flag, other=0)
    least = jnp.maximum(low_ref[t], LOW)
    return bisect(lambda fn: fn(x, place).sum(), lambda fn: fn(x, place).max(), order, topk, least)

  def in_row():
    def fold(fn, combine, start):
      def step(n, state):
        x, place = part(key_ref, t, n, length)
        return combine(state, fn(x, lambda _: place))
      return jax.lax.fori_loop(0, pl.cdiv(length, BLOCK), step, jnp.full(BLOCK, start, jnp.int32))
    return bisect(lambda fn: fold(fn, jnp.add, 0).sum(), lambda fn: fold(fn, jnp.maximum, -2**31).max(), order, topk,
                  jnp.int32(LOW))

  enough = (found > topk) & (found <= CANDIDATES)
  key_out[t], last_out[t] = jax.lax.cond(enough, among_candidates, in_row)


def bisect(total: Callable, most: Callable, order: Callable, k: int, least):
  """(key, last) of the k-th entry by (key descending, order ascending), or that keep all when no more are visible.

  total(fn) and most(fn) are the sum and the maximum of the int32 fn(keys, places) over all entries; order(places, flag)
  are the orders where flag is True. Places are a function, since few searches need them. No visible entry is below
  `least`.
  """
  how_many = lambda flag: total(lambda x, place: flag(x, place).astype(jnp.int32))

  def narrow(state):
    low, high, n = state                  # at least k entries from `low` on, n of them, and fewer from `high` on
    middle = search.halfway(low, high)
    c = how_many(lambda x, _: x >= middle)
    up = c >= k
    return jnp.where(up, middle, low), jnp.where(up, high, middle), jnp.where(up, c, n)

  visible = how_many(lambda x, _: x > MASKED)
  start = least, most(lambda x, _: x) + 1, visible
  low, _, n = jax.lax.while_loop(lambda s: (s[2] > k) & (s[1] - 1 > s[0]), narrow, start)
  key = -most(lambda x, _: jnp.where(x >= low, -x, -MAX_ORDER))
  last = most(lambda x, place: jnp.where(x == key, order(place, x == key), -1))
  places = k - how_many(lambda x, _: x > key)

  def halve(state):
    low, high = state                     # too few are kept up to `low`, enough up to `high`
    middle = search.halfway(low, high)
    enough = how_many(lambda x, place: (x == key) & (order(place, x == key) <= middle)) >= places
    return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

  start = jnp.where(n > k, -1, last - 1), last                     # orders are not negative
  last = jax.lax.while_loop(lambda s: s[1] - 1 > s[0], halve, start)[1]
  return jnp.where(visible > k, key, KEEP_ALL), jnp.where(visible > k, last, MAX_ORDER)


def words(key_TN: jax.Array, key_T: jax.Array, last_T: jax.Array, met: Tiles) -> tuple[jax.Array, jax.Array]:
  """(word_MN, number_MB): one word of bits for each key and group of queries, bit t for query t, tiles in the order of
  tile_P; how many words of a block are not 0. Words of tiles behind the front are not written."""
  (T, N), M = key_TN.shape, len(met.count_M)
  return tuple(gpu_call.call(
      functools.partial(_words, group=T // M), (M, N // BLOCK), [key_TN, key_T, last_T, *met],
      [int32(M, N), int32(M, N // BLOCK)], warps=8, stages=1))


def _words(key_ref, threshold_ref, last_ref, order_ref, tile_ref, count_ref, word_out, number_out, *, group):
  m, n = pl.program_id(0), pl.program_id(1)
  S = order_ref.shape[1]
  queries, keys, length = pl.ds(m * group, group), pl.ds(n * BLOCK, BLOCK), count_ref[m] * S
  number_out[m, n] = 0

  @pl.when(n * BLOCK < length)
  def _():
    place_B = n * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    x_TB = triton.load(key_ref.at[queries, keys], mask=(place_B < length)[None], other=MASKED)
    threshold_T1 = threshold_ref[queries][:, None]
    equal_TB = x_TB == threshold_T1
    some_B = equal_TB.astype(jnp.int32).sum(0) > 0
    order_B = place_order(order_ref, tile_ref, place_B, some_B)
    kept_TB = (x_TB > MASKED) & ((x_TB > threshold_T1) | equal_TB & (order_B[None] <= last_ref[queries][:, None]))
    bit_T1 = jnp.left_shift(1, jnp.arange(group, dtype=jnp.int32))[:, None]
    word_B = jnp.where(kept_TB, bit_T1, 0).sum(0)
    word_out[m, keys] = word_B
    number_out[m, n] = count(word_B != 0)


def place_order(order_ref, tile_ref, place, flag):
  """Orders of the keys at places in a row, where flag is True."""
  S = order_ref.shape[1]
  tile = triton.load(tile_ref.at[place // S], mask=flag, other=0)
  return triton.load(order_ref.at[tile, place % S], mask=flag, other=0)


def cut(iq_ITJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S) -> tuple[Chunk, Keys]:
  """The chunks of a row and their keys. Of heads and of features there are powers of two; those added are 0."""
  (I, T, J), S = iq_ITJ.shape, len(k_order_S)
  size = chunk_size(T, S)
  heads, width = gpu_call.ceil_pow2(I), max(gpu_call.ceil_pow2(J), gpu_call.SMALLEST)
  iq_ITJ, ik_SJ = tiles.pad(tiles.pad(iq_ITJ, 2, width), 0, heads), tiles.pad(ik_SJ, 1, width)
  gate_IT = tiles.pad(gate_TI.astype(jnp.float32).T, 0, heads)
  key_tiles = lambda x, value=0: tiles.cut(tiles.pad(x, 0, TILE, value), 0, TILE)
  chunks = lambda x, axis=0, value=0: tiles.cut(tiles.pad(x, axis, size, value), axis, size)
  segment_CT, order_CT = chunks(q_segment_T, 0, tiles.QUERY_PAD), chunks(q_order_T)
  keys = Keys(key_tiles(ik_SJ), key_tiles(k_segment_S, tiles.KEY_PAD), key_tiles(k_order_S))
  tile_CP, count_C = tiles.front(tiles.meeting(segment_CT, keys.segment_PS, order_CT, keys.order_PS, causal=True))
  count_CM = jnp.repeat(count_C[:, None], size // GROUP, 1)
  return Chunk(chunks(iq_ITJ, 1), chunks(gate_IT, 1), segment_CT, order_CT, tile_CP,
               count_CM), keys


def index_select(iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, *, topk) -> Selection:
  B, T, _, _ = iq_BTIJ.shape
  if topk >= ik_BSJ.shape[1]:
    return keep_all((B, T))
  return Selection(*tiles.over_rows(functools.partial(select_row, topk), (
      iq_BTIJ.swapaxes(1, 2), ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS), loop=True))


def select_row(topk, *arrays):
  """(threshold_T, last_T) of a row."""
  chunks, keys = cut(*arrays)
  one = lambda chunk: kth(*score_and_bound(chunk, keys, topk), meet(chunk, keys), topk)
  key_CT, last_CT = jax.lax.map(one, chunks)
  T = arrays[0].shape[1]
  return search.value(key_CT.reshape(-1)[:T]), last_CT.reshape(-1)[:T]
