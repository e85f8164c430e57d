"""The exact k-th largest score of each row by bisection, without a sort.

A float32 and its order-preserving integer key: counting the scores at or above a value halves the range of keys that
can be the threshold; the search ends when exactly k scores are at or above the lower end, or one key is left. On a
CPU a sort (`jax.lax.top_k`) takes ten times as long.

T queries, S keys.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.index_select.selection import MAX_ORDER

LOWEST = float(jnp.finfo(jnp.float32).min)    # a masked score is -inf, below every threshold
SMALLEST = float(jnp.finfo(jnp.float32).tiny)
SLICES = 8                                    # a long row is counted in slices: XLA then fuses the comparisons


def key(x: jax.Array) -> jax.Array:
  """float32 -> int32, keeping the order; x must not hold -0.0."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7fffffff)


def value(key: jax.Array) -> jax.Array:
  """The inverse of `key`."""
  return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7fffffff), jnp.float32)


def count(flag, *arrays_TS: jax.Array) -> jax.Array:
  """How often flag(*arrays) holds in each row, int32 [T]. As a product with ones: exact up to 2**24 keys."""
  S = arrays_TS[0].shape[-1]
  n = SLICES if S % (SLICES * 128) == 0 else 1
  parts = [flag(*(a[..., i * S // n:(i + 1) * S // n] for a in arrays_TS)) for i in range(n)]
  return (sum(p.astype(jnp.float32) for p in parts) @ jnp.ones(S // n)).astype(jnp.int32)


def at_least(score_TS: jax.Array, threshold_T: jax.Array) -> jax.Array:
  return count(lambda x: x >= threshold_T[:, None], score_TS)


def halfway(low, high):
  """The mean rounded down, without overflow."""
  return (low >> 1) + (high >> 1) + (low & high & 1)


def kth(score_TS: jax.Array, order_S: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """(threshold_T, last_T) of a `Selection`: of finite scores, masked ones being -inf."""
  T, S = score_TS.shape
  n_T = at_least(score_TS, jnp.full(T, LOWEST))
  choose_T = n_T > k

  def narrow(state, probe_T):
    """Counts at a key and moves the end of the range on its side: at least k scores at `low`, fewer at `high`."""
    low_T, high_T, n_T = state
    c_T = at_least(score_TS, value(probe_T))
    up_T = c_T >= k
    return (jnp.where(up_T, jnp.maximum(low_T, probe_T), low_T), jnp.where(up_T, high_T, jnp.minimum(high_T, probe_T)),
            jnp.where(up_T & (probe_T >= low_T), c_T, n_T))

  def searching(state):
    low_T, high_T, n_T = state
    return (choose_T & (n_T > k) & (high_T - 1 > low_T)).any()

  state = (jnp.full(T, LOWEST), jnp.maximum(score_TS.max(-1), LOWEST))
  state = (key(state[0]), key(state[1]) + 1, n_T)
  for zero in (0.0, SMALLEST):      # relu makes many exact zeros, and half of all keys lie between 0 and SMALLEST
    state = narrow(state, jnp.full(T, key(jnp.float32(zero))))
  low_T, _, n_T = jax.lax.while_loop(searching, lambda s: narrow(s, halfway(s[0], s[1])), state)

  at_low_TS = score_TS >= value(low_T)[:, None]
  threshold_T = jnp.where(at_low_TS, score_TS, jnp.inf).min(-1)
  equal_TS = score_TS == threshold_T[:, None]
  last_T = jnp.where(equal_TS, order_S, -1).max(-1)
  last_T = break_ties(score_TS, order_S, threshold_T, last_T, k, choose_T & (n_T > k))
  return jnp.where(choose_T, threshold_T, -jnp.inf), jnp.where(choose_T, last_T, MAX_ORDER)


def break_ties(score_TS, order_S, threshold_T, last_T, k, tied_T) -> jax.Array:
  """The order up to which scores equal to the threshold are kept; `last_T` where `tied_T` is False.

  Bisection over orders; no step is taken when no row has more equal scores than places.
  """
  def step(state):
    low_T, high_T = state             # too few are kept at `low`, enough at `high`
    middle_T = halfway(low_T, high_T)
    order_TS = jnp.broadcast_to(order_S, score_TS.shape)
    kept_T = count(lambda x, o: (x > threshold_T[:, None]) | ((x == threshold_T[:, None]) & (o <= middle_T[:, None])),
                   score_TS, order_TS)
    return jnp.where(kept_T < k, middle_T, low_T), jnp.where(kept_T < k, high_T, middle_T)

  low_T = jnp.where(tied_T, order_S.min() - 1, last_T - 1)
  return jax.lax.while_loop(lambda s: (s[1] - 1 > s[0]).any(), step, (low_T, last_T))[1]
