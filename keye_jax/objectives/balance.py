"""Load balance of the expert router.

L layers, B packed rows, E experts.
"""
import jax
import jax.numpy as jnp

from keye_jax.objectives.common import Metrics, over


def router_balance(balance_LB: jax.Array, row_B: jax.Array, total_rows: jax.Array) -> tuple[jax.Array, Metrics]:
  """Mean over layers and rows of the balance loss E * sum_e f_e P_e (Switch, arXiv 2101.03961 eq. 4).

  The router computes it per packed row, f_e the picks of expert e per token (so that an even load gives the number of
  experts a token uses) and P_e the mean router probability. It is quadratic in a row: splitting a batch into
  micro-batches does not change it, splitting a row does.

  Args:
    balance_LB: float32, one value a layer and row.
    row_B: float32, 1 for a row that holds tokens, 0 for an empty one.
    total_rows: number of rows that hold tokens in the whole batch.
  """
  layers = balance_LB.shape[0]
  summed = jnp.sum(balance_LB * row_B) / layers
  return over(total_rows, summed), {'balance': (summed, jnp.sum(row_B))}


def load_peak(load_LE: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How many times its even share the busiest expert of a layer gets, as (sum over layers, layers); 1 is even.

  load_LE: tokens routed to each expert.
  """
  mean_L = jnp.mean(load_LE, -1)
  peak_L = jnp.max(load_LE, -1) / jnp.where(mean_L > 0, mean_L, 1.0)
  return jnp.sum(peak_L), jnp.float32(load_LE.shape[0])
