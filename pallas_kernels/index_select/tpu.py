"""Index scores and the exact top-k on a TPU: the scores of a group of queries never leave the chip.

A kernel step scores one group of queries against one wide tile of keys and keeps the result in VMEM as integers in the
order of the scores; after the group's last tile the threshold is searched there by bisection, ties by a second
bisection over orders (as in search.py), and the selection leaves as one word of bits for every key. Key tiles in which
the group sees nothing are neither read nor scored.

B batch, T queries of a group, S keys (of a wide tile where a P is in front), P wide key tiles, M groups of a chunk,
C chunks, I indexer heads, J indexer head dim, N stacked queries I * T.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles, tpu_call
from pallas_kernels.index_select import search
from pallas_kernels.index_select import xla as index
from pallas_kernels.index_select.selection import MAX_ORDER, Selection, keep_all
from pallas_kernels.mask import visible
from pallas_kernels.tpu_call import LANES, column, row

GROUPS = (32, 16, 8)       # queries of a group: the most whose scores fit into ROOM
ROOM = 32 * 2**20          # bytes; the smallest VMEM of the TPUs meant here (v5p, v6e, tpu7x) is 64 MiB a core
BESIDE = 24 * 2**20        # bytes for everything else
MANY = 4                   # groups of one kernel call
WIDE = 1024                # keys of a tile

MASKED = -2**31            # below the key of every score, -inf included
LOW, HIGH = -0x7f800000, 0x7f800001        # keys of the least finite score, and of more than any
KEEP_ALL = LOW - 1                         # key of -inf
ZERO_PROBES = (0, 0x00800000)              # keys of 0 and of the smallest normal number: see search.kth


def group_size(T: int, S: int) -> int:
  """Queries of a group. Raises ValueError when not even the fewest fit."""
  fits = [n for n in GROUPS if n * S * 4 <= ROOM]
  if not fits:
    raise ValueError(f'index_select: the scores of {GROUPS[-1]} queries against {S} keys need more than '
                     f"{ROOM >> 20} MiB of VMEM; use implementation='xla' or fewer keys")
  return min(fits[0], -(-T // 8) * 8)


def index_select(iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, *, topk) -> Selection:
  B, T, _, _ = iq_BTIJ.shape
  S = ik_BSJ.shape[1]
  if topk >= S:
    return keep_all((B, T))
  return Selection(*tiles.over_rows(functools.partial(select_row, topk), (
      iq_BTIJ.swapaxes(1, 2), ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS), loop=True))


def select_row(topk, iq_ITJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S):
  """(threshold_T, last_T) of a row: a loop over chunks of MANY groups."""
  T, size = len(q_order_T), group_size(len(q_order_T), len(k_order_S))
  keys = index.cut_keys(WIDE, ik_SJ, k_segment_S, k_order_S)
  fill = lambda x, axis, value=0: tiles.pad(x, axis, size * min(MANY, -(-T // size)), value)
  groups = index.cut_queries(size, fill(iq_ITJ, 1), fill(gate_TI, 0), fill(q_segment_T, 0, tiles.QUERY_PAD),
                             fill(q_order_T, 0), keys)
  chunks = jax.tree.map(lambda x: x.reshape(-1, min(MANY, -(-T // size)), *x.shape[1:]), groups)
  every = keep_all(chunks.order_T.shape[1:])
  selection = jax.lax.map(lambda group: select(group, keys, every, topk)[0], chunks)
  return selection.threshold_BT.reshape(-1)[:T], selection.last_BT.reshape(-1)[:T]


def select(group: index.Queries, keys: index.Keys, given: Selection, topk: int | None):
  """(Selection [M, T], its bits as words [M, P, S]) of M groups; topk None: of `given`, replayed.

  Bit t of a word is query t of the group. Leaves of `group` and `given` lead with M.
  """
  M, I, T, J = group.iq_ITJ.shape
  P, S, _ = keys.ik_PSJ.shape
  flat, most = lambda x_MT: x_MT[:, None], jnp.maximum(group.count.max(), 1)
  per_group = lambda *shape: pl.BlockSpec((1, *shape), lambda m, n, tile, count: (m, *[0] * len(shape)))
  meet = lambda m, n, tile, count: tile[m, jnp.minimum(n, jnp.maximum(count[m] - 1, 0))]
  per_tile = lambda *shape: pl.BlockSpec((1, *shape), lambda m, n, *lists: (meet(m, n, *lists), *[0] * len(shape)))
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
  key_M1T, last_M1T, word_MP1S = tpu_call.call(
      functools.partial(_kernel, topk=topk), (M, most), [group.tile_P, group.count],
      [group.iq_ITJ.reshape(M, I * T, J), group.gate_TI, flat(group.segment_T), flat(group.order_T),
       flat(search.key(given.threshold_BT)), flat(given.last_BT), keys.ik_PSJ, keys.segment_PS[:, None],
       keys.order_PS[:, None]],
      [per_group(I * T, J), per_group(T, I), *[per_group(1, T)] * 4, per_tile(S, J), per_tile(1, S), per_tile(1, S)],
      [(shape(M, 1, T), per_group(1, T)), (shape(M, 1, T), per_group(1, T)), (shape(M, P, 1, S), per_group(P, 1, S))],
      [pltpu.VMEM((P, T, S), jnp.int32), pltpu.VMEM((P, 1, S), jnp.int32)], parallel=(True, False), vmem=ROOM + BESIDE)
  return Selection(search.value(key_M1T[:, 0]), last_M1T[:, 0]), word_MP1S[:, :, 0]


def _kernel(tile_ref, count_ref, iq_ref, gate_ref, q_segment_ref, q_order_ref, given_key_ref, given_last_ref, ik_ref,
            k_segment_ref, k_order_ref, key_ref, last_ref, word_ref, score_ref, order_ref, *, topk):
  m, n = pl.program_id(0), pl.program_id(1)
  count = count_ref[m]

  @pl.when(n < count)
  def _():
    I, T, S = gate_ref.shape[2], gate_ref.shape[1], ik_ref.shape[1]
    z_ITS = index.stacked_products(iq_ref[0], ik_ref[0]).reshape(I, T, S)
    mask_TS = visible(column(q_segment_ref[0]), k_segment_ref[0], column(q_order_ref[0]), k_order_ref[0], causal=True)
    score_ref[n] = jnp.where(mask_TS, search.key(index.score(z_ITS, gate_ref[0])), MASKED)
    order_ref[n] = k_order_ref[0]

  @pl.when(n == pl.num_programs(1) - 1)
  def _():
    if topk is None:
      key_T1, last_T1 = column(given_key_ref[0]), column(given_last_ref[0])
    else:
      key_T1, last_T1 = kth(score_ref, order_ref, count, topk)
    key_ref[0], last_ref[0] = row(key_T1), row(last_T1)
    write_words(word_ref, score_ref, order_ref, lambda i: tile_ref[m, i], count, key_T1, last_T1)


def over(score_ref, order_ref, count, fn, init):
  """carry = fn(carry, keys [T, lanes], orders [1, lanes]) over the first `count` tiles, a few lanes at a time."""
  S = score_ref.shape[2]
  lanes = min(S, LANES)

  def tile(i, carry):
    for s in range(0, S, lanes):
      carry = fn(carry, score_ref[i, :, pl.ds(s, lanes)], order_ref[i, :, pl.ds(s, lanes)])
    return carry

  return jax.lax.fori_loop(0, count, tile, jnp.full((score_ref.shape[1], lanes), init, jnp.int32))


def kth(score_ref, order_ref, count, k: int):
  """(key_T1, last_T1): what search.kth finds, from keys that are MASKED where nothing is visible."""
  T = score_ref.shape[1]
  fold = functools.partial(over, score_ref, order_ref, count)

  def how_many(flag):
    return fold(lambda sum_TL, x, o: sum_TL + jnp.where(flag(x, o), 1, 0), 0).sum(1, keepdims=True)

  full = lambda value: jnp.full((T, 1), value, jnp.int32)
  n_T1 = how_many(lambda x, o: x > MASKED)
  choose_T1 = n_T1 > k

  def narrow(state, probe_T1):
    """Moves the end of the range on the side of the probe: at least k keys from `low` on, fewer from `high` on."""
    low_T1, high_T1, n_T1 = state
    c_T1 = how_many(lambda x, o: x >= probe_T1)
    up_T1 = c_T1 >= k
    return (jnp.where(up_T1, jnp.maximum(low_T1, probe_T1), low_T1),
            jnp.where(up_T1, high_T1, jnp.minimum(high_T1, probe_T1)),
            jnp.where(up_T1 & (probe_T1 >= low_T1), c_T1, n_T1))

  state = full(LOW), full(HIGH), n_T1
  for probe in ZERO_PROBES:
    state = narrow(state, full(probe))
  searching = lambda s: jnp.any(choose_T1 & (s[2] > k) & (s[1] - 1 > s[0]))
  low_T1, _, n_T1 = jax.lax.while_loop(searching, lambda s: narrow(s, search.halfway(s[0], s[1])), state)

  above = lambda least_TL, x, o: jnp.minimum(least_TL, jnp.where(x >= low_T1, x, MAX_ORDER))
  key_T1 = fold(above, MAX_ORDER).min(1, keepdims=True)
  equal = lambda most_TL, x, o: jnp.maximum(most_TL, jnp.where(x == key_T1, o, -1))
  last_T1 = fold(equal, -1).max(1, keepdims=True)

  tied_T1 = choose_T1 & (n_T1 > k)
  places_T1 = k - how_many(lambda x, o: x > key_T1)

  def halve(state):
    low_T1, high_T1 = state                # too few are kept up to `low`, enough up to `high`
    middle_T1 = search.halfway(low_T1, high_T1)
    enough_T1 = how_many(lambda x, o: (x == key_T1) & (o <= middle_T1)) >= places_T1
    return jnp.where(enough_T1, low_T1, middle_T1), jnp.where(enough_T1, middle_T1, high_T1)

  start = jnp.where(tied_T1, -1, last_T1 - 1), last_T1             # orders are not negative
  last_T1 = jax.lax.while_loop(lambda s: jnp.any(s[1] - 1 > s[0]), halve, start)[1]
  return jnp.where(choose_T1, key_T1, KEEP_ALL), jnp.where(choose_T1, last_T1, MAX_ORDER)


def write_words(word_ref, score_ref, order_ref, place, count, key_T1, last_T1):
  """The bits of the selection; `place(i)` is the key tile that lies at i among those in front."""
  _, T, S = score_ref.shape
  lanes = min(S, LANES)
  bit_T1 = jax.lax.shift_left(jnp.ones((T, 1), jnp.int32), jax.lax.broadcasted_iota(jnp.int32, (T, 1), 0))
  word_ref[...] = jnp.zeros_like(word_ref)

  def tile(i, _):
    p = place(i)
    for s in range(0, S, lanes):
      x, o = score_ref[i, :, pl.ds(s, lanes)], order_ref[i, :, pl.ds(s, lanes)]
      kept = (x > key_T1) | ((x == key_T1) & (o <= last_T1))
      word_ref[0, p, :, pl.ds(s, lanes)] = jnp.where(kept, bit_T1, 0).sum(0, keepdims=True)
    return 0

  jax.lax.fori_loop(0, count, tile, 0)
