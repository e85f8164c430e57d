"""Assignments of frames and rows: by hand, against a greedy in plain Python, and what holds for any batch."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_jax import balance

X, F = 4, 32


@jax.jit
def plan(size_XF):
  """Rank of each frame, frames costing their size."""
  loads_X, cut_X = jax.vmap(functools.partial(balance.load, ranks=X))(size_XF * 1.0)
  return jax.vmap(balance.frames, (0, None, 0))(cut_X, loads_X, jnp.arange(X))


def frames_of(*sizes) -> np.ndarray:
  return np.stack([np.pad(s, (0, F - len(s))).astype(np.int32) for s in sizes])


def lpt(size_XF) -> np.ndarray:
  load, to_XF = np.zeros(X), np.zeros((X, F), int)
  for at in sorted(zip(*np.nonzero(size_XF)), key=lambda at: (-size_XF[at], at)):
    to_XF[at] = np.argmin(load)
    load[to_XF[at]] += size_XF[at]
  return to_XF


def test_few_frames_go_largest_first_to_who_has_least():
  """By hand: 9, 8, 7, 6 to the empty ranks; then 5 to rank 3 (6), 4 to rank 2 (7), 4 to rank 1 (8)."""
  to_XF = np.asarray(plan(frames_of([9, 8], [7, 6, 5], [], [4, 4])))
  assert to_XF[0, :2].tolist() == [0, 1] and to_XF[1, :3].tolist() == [2, 3, 3] and to_XF[3, :2].tolist() == [2, 1]


sizes = st.lists(st.integers(1, 14), max_size=F)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[sizes] * X))
def test_any_frames(rows):
  """Nobody stands above the mean by more than a frame; few frames go as by the greedy in plain Python."""
  size_XF = frames_of(*rows)
  to_XF = np.asarray(plan(size_XF))
  assert (to_XF >= 0).all() and (to_XF < X).all()
  load_X = np.bincount(to_XF.ravel(), size_XF.ravel(), X)
  assert load_X.max() <= load_X.mean() + size_XF.max() + 1e-3
  if max(map(len, rows)) <= balance.LARGEST:
    np.testing.assert_array_equal(to_XF[size_XF > 0], lpt(size_XF)[size_XF > 0])


def test_rows_of_like_cost_share_a_micro_batch():
  """By hand: two ranks, two micro-batches, two rows each. 8 7 6 5 come first: 8 and 5, 7 and 6; then 4 3 2 1."""
  cost_B = np.array([1, 8, 2, 7, 3, 6, 4, 5])
  place_B = np.asarray(balance.rows(cost_B, 2, 2))
  assert cost_B[place_B].tolist() == [8, 4, 5, 1, 7, 3, 6, 2]
  np.testing.assert_array_equal(balance.rows(np.ones(8), 2, 2), [0, 4, 2, 6, 1, 5, 3, 7])
  with pytest.raises(ValueError, match='6 rows cannot be divided over 2 ranks and 2 micro-batches'):
    balance.rows(np.ones(6), 2, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_any_rows(ranks, micro, each, random):
  """Every row has one place; a micro-batch costs no less than the next; inside it, as by the greedy in plain Python."""
  cost_B = np.array([random.randrange(1, 9) for _ in range(ranks * micro * each)])
  row_B = np.asarray(balance.rows(cost_B, ranks, micro))
  assert sorted(row_B) == list(range(len(cost_B)))
  left = sorted(range(len(cost_B)), key=lambda b: -cost_B[b])
  for i in range(micro):
    mine, left = left[:ranks * each], left[ranks * each:]
    load, held = [0] * ranks, [[] for _ in range(ranks)]
    for row in mine:
      rank = min((r for r in range(ranks) if len(held[r]) < each), key=lambda r: load[r])
      load[rank] += cost_B[row]
      held[rank].append(row)
    assert row_B[i::micro].reshape(ranks, each).tolist() == held
