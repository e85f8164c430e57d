"""A selection of keys in two numbers a query, and the test of membership.

B batch, T query time, S key time.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_ORDER = 2 ** 31 - 1


class Selection(NamedTuple):
  """Keeps the visible keys that score above the threshold, and those that equal it up to an order.

  Orders of the keys one query sees are unique, so among equal scores the lowest orders are kept and never more than k.
  A query with at most k visible keys has threshold -inf: it keeps all of them.
  """
  threshold_BT: jax.Array    # float32, score of the k-th key
  last_BT: jax.Array         # int32, order of the last key kept at that score


def keep_all(shape: tuple[int, ...]) -> Selection:
  return Selection(jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, MAX_ORDER, jnp.int32))


def selected(score: jax.Array, k_order: jax.Array, threshold: jax.Array, last: jax.Array) -> jax.Array:
  """bool, by broadcasting. Visibility is not included: combine with `pallas_kernels.mask.visible`."""
  return (score > threshold) | ((score == threshold) & (k_order <= last))
