"""Who owns which page: what is shared, what is written, what comes back."""
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from keye_jax.rollout.pages import Pool, prompts


def test_sequences_share_the_pages_that_their_common_start_fills():
  pool = Pool(4)
  trunk = np.arange(10)
  held = pool.begin({0: np.append(trunk, [20, 21]), 1: np.append(trunk, 30), 3: np.arange(40, 43)})
  assert pool.pages == {0: [0, 1, 2], 1: [0, 1, 3], 3: [4]} and pool.total == 5
  assert held.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 20, 21], [8, 9, 30, -1], [40, 41, 42, -1]]
  table, lengths = pool.table(4, 3)
  assert lengths.tolist() == [12, 11, 0, 3] and table[1].tolist() == [0, 1, 3]
  assert pool.users == {0: 2, 1: 2, 2: 1, 3: 1, 4: 1}


def test_pages_are_taken_by_need_and_used_again():
  pool = Pool(2)
  pool.begin({0: np.arange(3), 1: np.arange(10, 12)})
  pool.grow(0)                                    # fits
  assert pool.total == 3
  pool.grow(1)                                    # its pages are full
  assert pool.pages == {0: [0, 1], 1: [2, 3]}
  pool.end(0)
  assert pool.free == [0, 1]
  pool.grow(1)
  pool.grow(1)
  assert pool.pages == {1: [2, 3, 0]} and pool.total == 4
  pool.end(1)
  assert not pool.users and sorted(pool.free) == [0, 1, 2, 3]
  with pytest.raises(KeyError):
    pool.end(1)


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_no_token_is_lost_or_written_over(data):
  """A model of the device's pool: what each sequence reads back is what was written for it."""
  size, draw = data.draw(st.integers(1, 4)), data.draw
  trunk = list(range(draw(st.integers(0, 9))))
  texts = {s: trunk + [100 * (s + 1) + i for i in range(draw(st.integers(0, 5)))] for s in range(4)}
  texts = {s: text for s, text in texts.items() if text}
  pool = Pool(size)
  device = {page: list(row) for page, row in enumerate(pool.begin({s: np.asarray(t, int) for s, t in texts.items()}))}
  for token in range(1000, 1000 + draw(st.integers(0, 12))):
    if texts and draw(st.booleans()):
      s = draw(st.sampled_from(sorted(texts)))
      pool.end(s)
      del texts[s]
    for s in texts:
      pool.grow(s)
      place = pool.lengths[s] - 1
      page = pool.pages[s][place // size]
      assert pool.users[page] == 1
      device.setdefault(page, [-1] * size)[place % size] = token * 10 + s
      texts[s].append(token * 10 + s)
    assert sorted([*pool.users, *pool.free]) == list(range(pool.total))
    assert len(pool.users) <= sum(-(-len(t) // size) for t in texts.values())
    table, lengths = pool.table(4, 40)
    for s, text in texts.items():
      assert lengths[s] == len(text)
      assert [device[table[s, i // size]][i % size] for i in range(len(text))] == text


def test_what_a_prompt_sees():
  one, two = 1 << 8, 2 << 8
  segment_BT = np.array([[one, one, one | 1, one | 1, one | 2, two, 0], [two] * 3 + [0] * 4], np.int32)
  order_BT = np.tile(np.arange(7, dtype=np.int32), (2, 1))
  order_BT[0, :2] = 1, 0                                    # a row in another order than its text
  found = prompts(segment_BT, order_BT, np.array([[3, 4, -1], [-1, -1, 1]]))
  assert {s: places.tolist() for s, places in found.items()} == {0: [1, 0, 2, 3], 1: [1, 0, 4], 5: [7, 8]}
