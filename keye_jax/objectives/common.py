"""What an objective is, and the sums all of them share."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Metrics = dict[str, tuple[jax.Array, jax.Array]]     # name -> (sum, weight), float32 scalars; the host divides


class Objective(NamedTuple):
  """Two pure functions; every algorithm's training step is `steps.update.make_update(apply, objective, ...)`.

  `totals(batch)` returns the denominators. They depend on the batch alone and are computed for the whole batch before
  any gradient, so that a sum over micro-batches is the same loss as one pass over all rows.
  `loss(output, batch, totals)` returns this (micro-)batch's share of the loss and its metrics as (sum, weight).
  """
  totals: Callable[[Any], dict[str, jax.Array]]
  loss: Callable[[Any, Any, dict[str, jax.Array]], tuple[jax.Array, Metrics]]


def over(total: jax.Array, numerator: jax.Array) -> jax.Array:
  """numerator / total, and 0 where the batch holds nothing to average (total == 0)."""
  return numerator / jnp.where(total > 0, total, 1.0)
