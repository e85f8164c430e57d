"""Positions against hand numbers and a slow token-by-token implementation of the rule."""
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import mrope


def slow(spans, base=0):
  """Token by token; tracks the largest position so far instead of a base."""
  out, largest = [], base - 1
  for span in spans:
    if isinstance(span, int):
      for _ in range(span):
        largest += 1
        out.append((largest, largest, largest))
    else:
      start = largest + 1
      grid = [(start, start + r, start + c) for r in range(span[0]) for c in range(span[1])]
      out += grid
      largest = max([largest, *(x for p in grid for x in p)])
  return out, largest + 1


def test_hand_numbers():
  position_T3, after = mrope.positions([2, (2, 3), 1, (1, 1), 1])
  assert position_T3.tolist() == [
      [0, 0, 0], [1, 1, 1],
      [2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4],
      [5, 5, 5], [6, 6, 6], [7, 7, 7]]
  assert after == 8 and position_T3.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 5), st.tuples(st.integers(1, 4), st.integers(1, 4))), max_size=12),
       st.integers(0, 1000))
def test_equals_the_slow_rule(spans, base):
  position_T3, after = mrope.positions(spans, base)
  expected, expected_after = slow(spans, base)
  assert position_T3.tolist() == [list(p) for p in expected] and after == expected_after


def test_the_cached_grid_is_not_changed_by_use():
  first, _ = mrope.positions([(2, 2)], 10)
  first += 5
  second, _ = mrope.positions([(2, 2)], 10)
  assert second.min() == 10
