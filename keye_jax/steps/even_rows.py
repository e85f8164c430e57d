"""Rows of a batch brought to the ranks and micro-batches that `keye_jax/balance.py` gives them: one ragged all-to-all
over the mesh axes that shard the batch, so that hosts exchange nothing. A rank is a group of devices that shares rows.

A sum over micro-batches does not ask for the order of rows; its rounding does. The order depends on the rows of the
step alone, not on the processes that read them.

B rows of a batch, N of a rank, X ranks.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax import balance, sharding
from keye_jax.nn.transport import ragged_exchange


def even_rows(layout: str, micro: int, batch: Any, cost_B: jax.Array) -> Any:
  """The rows of a placed batch (a NamedTuple of arrays) in an order by which ranks wait for each other least.

  cost_B: what each row costs a rank. micro: micro-batches of a step. Raises ValueError when the rows do not divide.
  """
  if sharding.has_mesh():
    cost_B = jax.sharding.reshard(cost_B, jax.P(None))
  row_B = balance.rows(cost_B, sharding.extent(layout, 'batch'), micro)
  move = functools.partial(moved, sharding.names(layout, 'batch')) if sharding.has_mesh() else lambda row_B, x: x[row_B]

  def one(name, x):
    axes = sharding.batch_axes(name, x.ndim)
    return sharding.local(move, layout, ((None,), axes), axes)(row_B, x)
  return type(batch)(*(one(name, x) for name, x in zip(batch._fields, batch)))


def moved(axes: tuple[str, ...], row_B: jax.Array, x_N: jax.Array) -> jax.Array:
  """The rows row_B[place] of the places of this rank. x_N: its rows as they were read, [N, ...]."""
  X, me, N = jax.lax.axis_size(axes), jax.lax.axis_index(axes), len(x_N)
  place_B = jnp.argsort(row_B)
  part = lambda a_B: jax.lax.dynamic_slice_in_dim(a_B, me * N, N)
  to_XN = (place_B // N).reshape(X, N)
  count_XX = (to_XN[..., None] == jnp.arange(X)).sum(1, dtype=jnp.int32)                # [from, to]
  from_XX, at_XX = (jnp.cumsum(count_XX, axis) - count_XX for axis in (1, 0))
  sent_N = x_N[jnp.argsort(part(place_B))]
  got_N = ragged_exchange(sent_N, jnp.zeros_like(sent_N), from_XX[me], count_XX[me], at_XX[me], count_XX[:, me], axes)
  came_N = jnp.argsort(part(row_B) // N, stable=True)          # they come by the rank that read them, then by place
  return jnp.zeros_like(x_N).at[came_N].set(got_N, unique_indices=True)
