"""Who does what in a batch, so that nobody waits: frames over the devices of the vision tower, rows over the ranks of
the language model (arXiv 2606.10651, infrastructure: two-level balance). Pure functions of the batch; what a frame or
a row costs comes from the closed formulas of `nn/counts.py`.

X ranks, F frames of a rank, K its largest ones, B rows of a batch.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 16           # frames of a rank that are placed one by one


class Load(NamedTuple):
  """What the others must know of a rank's frames. float32, any unit."""
  largest_K: jax.Array       # costs of its largest frames, in descending order, 0 where it has fewer
  stripe_X: jax.Array        # cost of the others, cut into as many stripes as there are ranks


class Cut(NamedTuple):
  """A rank's frames as `frames` takes them."""
  index_K: jax.Array         # its largest
  stripe_F: jax.Array        # stripe of each of the others
  middle_F: jax.Array        # cost before the middle of each of the others, from the start of its stripe


def load(cost_F: jax.Array, ranks: int) -> tuple[Load, Cut]:
  """The load of a rank. cost_F: float32, 0 where there is no frame."""
  largest_K, index_K = jax.lax.top_k(cost_F, min(LARGEST, len(cost_F)))
  rest_F = cost_F.at[index_K].set(0, unique_indices=True)
  end_F = jnp.cumsum(rest_F)
  middle_F = end_F - rest_F / 2
  stripe_F = jnp.minimum(middle_F * ranks / jnp.maximum(end_F[-1], 1e-30), ranks - 1).astype(jnp.int32)
  start_X1 = jnp.concatenate([jnp.zeros(1), end_F])[jnp.searchsorted(stripe_F, jnp.arange(ranks + 1))]
  return Load(largest_K, jnp.diff(start_X1)), Cut(index_K, stripe_F, middle_F - start_X1[stripe_F])


def frames(cut: Cut, loads_X: Load, me: jax.Array) -> jax.Array:
  """The rank that sees each frame of rank `me`: int32 [F].

  A frame stays whole. The largest K frames of every rank go, in descending order, each to the rank that has least so
  far (LPT, Graham 1969; ties: the lowest index); then the others, which are small, fill the ranks up to a common level.
  They do so in stripes, the first of every rank, the second of every rank and so on, so that every pair of ranks
  exchanges about as much. With at most K frames a rank this is LPT, whose fullest rank has at most 4/3 of the least
  possible; with more, no rank stands above the level by more than a frame.

  loads_X: `load` of all ranks, the same everywhere, so that every rank comes to the same plan.
  """
  X, K = loads_X.largest_K.shape
  cost_N = loads_X.largest_K.reshape(-1)
  order_N = jnp.argsort(-cost_N, stable=True)

  def give(load_X, cost):
    rank = jnp.argmin(load_X).astype(jnp.int32)
    return load_X + jnp.where(jnp.arange(X) == rank, cost, 0), rank

  load_X, given_N = jax.lax.scan(give, jnp.zeros(X), cost_N[order_N])
  rank_XK = jnp.zeros_like(given_N).at[order_N].set(given_N, unique_indices=True).reshape(X, K)

  stripe_N = loads_X.stripe_X.T.reshape(-1)           # [stripe, rank]
  start_XX = (jnp.cumsum(stripe_N) - stripe_N).reshape(X, X)
  edge_X = jnp.cumsum(jnp.maximum(level(load_X, stripe_N.sum()) - load_X, 0))
  place_F = start_XX[cut.stripe_F, me] + cut.middle_F
  rank_F = jnp.minimum(jnp.searchsorted(edge_X, place_F, side='right'), X - 1).astype(jnp.int32)
  return rank_F.at[cut.index_K].set(rank_XK[me], unique_indices=True)


def level(load_X: jax.Array, more: jax.Array) -> jax.Array:
  """How high the ranks stand when `more` is poured over them, the lowest first."""
  low_X = jnp.sort(load_X)
  level_X = (jnp.cumsum(low_X) + more) / jnp.arange(1, len(low_X) + 1)      # over the lowest 1, 2, ... of them
  return level_X[jnp.maximum((level_X >= low_X).sum() - 1, 0)]


def rows(cost_B: jax.Array, ranks: int, micro: int) -> jax.Array:
  """Which row of a batch comes to each place: a permutation of its rows, int32 [B].

  Ranks wait for each other in every micro-batch, so one holds rows of like cost: rows go in descending order to the
  micro-batches, one after another, and inside it each to the rank that has least so far and a free place (ties: the
  lowest index). Rank r has the r-th equal part of the places, and micro-batch i the places i, i + micro, ...
  (`steps/update.py`). Raises ValueError when the rows do not divide.
  """
  B = len(cost_B)
  each, left = divmod(B, ranks * micro)
  if left:
    raise ValueError(f'{B} rows cannot be divided over {ranks} ranks and {micro} micro-batches')
  order_MN = jnp.argsort(-jnp.asarray(cost_B), stable=True).astype(jnp.int32).reshape(micro, -1)

  def give(state, cost):
    load_X, count_X = state
    rank = jnp.argmin(jnp.where(count_X < each, load_X, jnp.inf)).astype(jnp.int32)
    chosen_X = jnp.arange(ranks) == rank
    return (load_X + jnp.where(chosen_X, cost, 0), count_X + chosen_X), rank * each + count_X[rank]

  empty = jnp.zeros(ranks), jnp.zeros(ranks, jnp.int32)
  place_MN = jax.vmap(lambda cost_N: jax.lax.scan(give, empty, cost_N)[1])(jnp.asarray(cost_B, jnp.float32)[order_MN])
  place_MN = place_MN * micro + jnp.arange(micro)[:, None]
  return jnp.zeros(B, jnp.int32).at[place_MN.reshape(-1)].set(order_MN.reshape(-1), unique_indices=True)
