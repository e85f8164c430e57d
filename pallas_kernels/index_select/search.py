"""The exact k-th largest score of each row by bisection, without a sort.

A float32 and its order-preserving integer key: counting the scores at or above a value halves the range of keys that
can be the threshold; the search ends when exactly k scores are at or above the lower end, or one key is left. On a
CPU a sort (`jax.lax.top_k`) takes ten times as long.

T queries, S keys of a tile, P key tiles: a row is cut into tiles, which XLA compares and adds up in one fused loop.
"""
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.index_select.selection import MAX_ORDER

LOWEST = float(jnp.finfo(jnp.float32).min)    # a masked score is -inf, below every threshold
SMALLEST = float(jnp.finfo(jnp.float32).tiny)
FUSED = 8                                     # tiles in one loop; more streams than that slow it down


def key(x: jax.Array) -> jax.Array:
  """float32 -> int32, keeping the order; x must not hold -0.0."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7fffffff)


def value(key: jax.Array) -> jax.Array:
  """The inverse of `key`."""
  return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7fffffff), jnp.float32)


def count(flag: Callable, *tiles: jax.Array) -> jax.Array:
  """How often flag(*tiles) holds in each row, int32 [T]. As products with ones: exact up to 2**24 keys."""
  P, _, S = tiles[0].shape
  flags = [flag(*(x[p] for x in tiles)).astype(jnp.float32) for p in range(P)]
  sums = [sum(flags[i:i + FUSED]) @ jnp.ones(S) for i in range(0, P, FUSED)]
  return sum(sums).astype(jnp.int32)


def at_least(score_PTS: jax.Array, threshold_T: jax.Array) -> jax.Array:
  return count(lambda x_TS: x_TS >= threshold_T[:, None], score_PTS)


def halfway(low, high):
  """The mean rounded down, without overflow."""
  return (low >> 1) + (high >> 1) + (low & high & 1)


def kth(score_PTS: jax.Array, order_PS: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """(threshold_T, last_T) of a `Selection`, from scores that are finite, or -inf where masked."""
  P, T, _ = score_PTS.shape
  n_T = at_least(score_PTS, jnp.full(T, LOWEST))
  choose_T = n_T > k

  def narrow(state, probe_T):
    """Counts at a key and moves the end of the range on its side: at least k scores at `low`, fewer at `high`."""
    low_T, high_T, n_T = state
    c_T = at_least(score_PTS, value(probe_T))
    up_T = c_T >= k
    return (jnp.where(up_T, jnp.maximum(low_T, probe_T), low_T), jnp.where(up_T, high_T, jnp.minimum(high_T, probe_T)),
            jnp.where(up_T & (probe_T >= low_T), c_T, n_T))

  def searching(state):
    low_T, high_T, n_T = state
    return (choose_T & (n_T > k) & (high_T - 1 > low_T)).any()

  top_T = functools.reduce(jnp.maximum, score_PTS).max(-1)
  state = key(jnp.full(T, LOWEST)), key(jnp.maximum(top_T, LOWEST)) + 1, n_T
  for zero in (0.0, SMALLEST):      # relu makes many exact zeros, and half of all keys lie between 0 and SMALLEST
    state = narrow(state, jnp.full(T, key(jnp.float32(zero))))
  low_T, _, n_T = jax.lax.while_loop(searching, lambda s: narrow(s, halfway(s[0], s[1])), state)

  low_T1 = value(low_T)[:, None]
  threshold_T = functools.reduce(jnp.minimum, [jnp.where(x >= low_T1, x, jnp.inf) for x in score_PTS]).min(-1)
  equal = [jnp.where(score_PTS[p] == threshold_T[:, None], order_PS[p], -1) for p in range(P)]
  last_T = functools.reduce(jnp.maximum, equal).max(-1)
  last_T = break_ties(score_PTS, order_PS, threshold_T, last_T, k, choose_T & (n_T > k))
  return jnp.where(choose_T, threshold_T, -jnp.inf), jnp.where(choose_T, last_T, MAX_ORDER)


def break_ties(score_PTS, order_PS, threshold_T, last_T, k, tied_T) -> jax.Array:
  """The order up to which scores equal to the threshold are kept; `last_T` where `tied_T` is False.

  Bisection over the orders of equal scores. Rows in one tile go together; of long rows the tied ones one by one, since
  they are few (a threshold of exactly 0) and a row fits into the cache.
  """
  places_T = k - count(lambda x_TS: x_TS > threshold_T[:, None], score_PTS)

  def bisect(score_PTS, threshold_T, high_T, places_T, tied_T):
    equal_PTS = jnp.where(score_PTS == threshold_T[:, None], order_PS[:, None], MAX_ORDER)

    def step(state):
      low_T, high_T = state           # too few are kept at `low`, enough at `high`
      middle_T = halfway(low_T, high_T)
      enough_T = count(lambda o_TS: o_TS <= middle_T[:, None], equal_PTS) >= places_T
      return jnp.where(enough_T, low_T, middle_T), jnp.where(enough_T, middle_T, high_T)

    low_T = jnp.where(tied_T, order_PS.min() - 1, high_T - 1)
    return jax.lax.while_loop(lambda s: (s[1] - 1 > s[0]).any(), step, (low_T, high_T))[1]

  if len(score_PTS) == 1:
    return bisect(score_PTS, threshold_T, last_T, places_T, tied_T)

  def one(state):
    tied_T, last_T = state
    t = jnp.argmax(tied_T)
    cut = lambda x, axis=0: jax.lax.dynamic_slice_in_dim(x, t, 1, axis)
    row = bisect(cut(score_PTS, 1), cut(threshold_T), cut(last_T), cut(places_T), cut(tied_T))
    return tied_T.at[t].set(False), last_T.at[t].set(row[0])

  return jax.lax.while_loop(lambda s: s[0].any(), one, (tied_T, last_T))[1]


def kept(score_TS, order_S, threshold_T, last_T) -> jax.Array:
  """bool [T, S]: the selection, of scores that are -inf where masked."""
  threshold_T1 = jnp.maximum(threshold_T, LOWEST)[:, None]
  return (score_TS >= threshold_T1) & ((score_TS > threshold_T1) | (order_S <= last_T[:, None]))


def words(score_PTS, order_PS, threshold_T, last_T) -> jax.Array:
  """The selection of up to 32 queries, one bit each: int32 [P, S], bit t of a word is query t."""
  def bit(t):
    row = lambda x: x[t:t + 1]
    flag_PS = kept(score_PTS[:, t], order_PS, row(threshold_T), row(last_T))
    return jnp.where(flag_PS, jnp.int32(-2 ** 31 if t == 31 else 1 << t), 0)

  return functools.reduce(operator.or_, [bit(t) for t in range(score_PTS.shape[1])])
