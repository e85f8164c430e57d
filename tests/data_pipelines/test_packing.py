"""Packing: nothing lost, nothing doubled, samples invisible to each other, frames whole; shapes of a hand case."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import packing
from data_pipelines.errors import InputError
from data_pipelines.schema import Example

VALUES = 3


def example(tag, text, frames=(), branches=(), source=''):
  """A sample whose numbers tell where they came from: `frames` lists the merged tokens of each frame."""
  merged, total = sum(frames), text + sum(frames) + sum(branches)
  base = tag * 1000 + np.arange(total, dtype=np.int32)
  vision_T = np.full(total, -1, np.int32)
  vision_T[1:1 + merged] = np.arange(merged)
  branch_T = np.zeros(total, np.int32)
  for b, n in enumerate(branches, 1):
    start = text + merged + sum(branches[:b - 1])
    branch_T[start:start + n] = b
  patches = 4 * merged
  patch_PC = np.stack([np.full(patches, tag), np.arange(patches) // 256, np.arange(patches) % 256], 1).astype(np.uint8)
  return Example(base, base + 1, (base % 2).astype(np.float32), np.stack([base % 97] * 3, 1), branch_T, vision_T,
                 patch_PC, np.arange(patches * 4, dtype=np.int32).reshape(-1, 4),
                 np.repeat(np.arange(1, len(frames) + 1, dtype=np.int32), 4 * np.asarray(frames, int)), source)


def test_no_more_samples_in_a_row_than_allowed():
  examples = [example(i, 2) for i in range(7)]
  rows = packing.plan(examples, packing.Shape(32, 0, 0, 2, VALUES, samples=3))
  assert [len(row.items) for row in rows] == [3, 3, 1]
  assert [len(row.items) for row in packing.plan(examples, packing.Shape(32, 0, 0, 2, VALUES))] == [7]


SAMPLES = st.lists(st.tuples(st.integers(1, 8), st.lists(st.integers(1, 3), max_size=4), st.lists(st.integers(1, 3),
                                                                                                  max_size=3)),
                   min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(SAMPLES, st.booleans(), st.integers(1, 3))
def test_every_sample_comes_out_whole_and_once(samples, together, rows):
  shape = packing.Shape(32, rows, 16, 2, VALUES)
  examples = [example(i, *s) for i, s in enumerate(samples)]
  examples = [e for e in examples if not packing.misfit(e, shape)]
  if not examples:
    return
  batch = packing.pack(examples, shape, together)
  seen, flat = [], batch.patch_BRNC.reshape(len(batch.token_BT), -1, VALUES)
  coord, frame = batch.coord_BRN4.reshape(len(flat), -1, 4), batch.frame_BRN.reshape(len(flat), -1)
  for b, segment_T in enumerate(batch.segment_BT):
    samples_here = np.unique(segment_T[segment_T > 0] >> 8)
    assert samples_here.tolist() == list(range(1, len(samples_here) + 1))
    used = np.zeros(flat.shape[1], int)
    for s in samples_here:
      at = np.flatnonzero(segment_T >> 8 == s)
      assert (np.diff(at) == 1).all()                         # one piece
      e = next(x for x in examples if x.token_T[0] == batch.token_BT[b, at[0]])
      seen.append(int(e.token_T[0]))
      for got, want in ((batch.token_BT, e.token_T), (batch.target_BT, e.target_T), (batch.weight_BT, e.weight_T),
                        (batch.position_BT3, e.position_T3), (batch.segment_BT & 255, e.branch_T)):
        np.testing.assert_array_equal(got[b, at], want)
      vision = batch.vision_BT[b, at]
      assert ((vision < 0) == (e.vision_T < 0)).all()
      for token, place in zip(e.vision_T, vision):             # the four patches of every vision token
        if token >= 0:
          src, dst = slice(4 * token, 4 * token + 4), slice(4 * place, 4 * place + 4)
          np.testing.assert_array_equal(flat[b, dst], e.patch_PC[src])
          np.testing.assert_array_equal(coord[b, dst], e.coord_P4[src])
          used[dst] += 1
          # A frame lies in one vision row, and no other frame has its number there.
          same = e.frame_P == e.frame_P[4 * token]
          row, number = 4 * place // 16, frame[b, 4 * place]
          assert (batch.frame_BRN[b, row] == number).sum() == same.sum()
    assert used.max(initial=0) <= 1 and ((frame[b] > 0) == (used > 0)).all()
    pads = segment_T == 0
    assert not batch.weight_BT[b, pads].any() and (batch.vision_BT[b, pads] == -1).all()
  assert sorted(seen) == [int(e.token_T[0]) for e in examples]
  assert (batch.order_BT == np.arange(32)).all()
  if not together:
    assert seen == [int(e.token_T[0]) for e in examples]


def test_hand_case():
  shape = packing.Shape(8, 2, 8, 2, VALUES)
  # Tokens 6, 3, 5, 2: decreasing 6 | 5 | 3 beside 5 | 2 beside 6. Frames of one token are 4 patches, two a vision row.
  examples = [example(0, 6), example(1, 1, [1, 1]), example(2, 3, [1], [1]), example(3, 2)]
  batch = packing.pack(examples, shape)
  assert batch.segment_BT.tolist() == [[256] * 6 + [512] * 2, [256] * 3 + [512] * 4 + [513]]
  assert batch.token_BT[1].tolist() == [1000, 1001, 1002, 2000, 2001, 2002, 2003, 2004]
  assert batch.vision_BT[1].tolist() == [-1, 0, 2, -1, 1, -1, -1, -1]
  assert batch.frame_BRN[1].tolist() == [[1] * 4 + [2] * 4, [1] * 4 + [0] * 4]


def test_frames_are_spread_over_vision_rows_by_patch_count():
  """By hand, in merged tokens of three rows of 8: 4 to row 0, 3 to row 1; of five of 1 three to row 2, then one to
  row 1, which has as much free, and one to row 2."""
  bin_, = packing.plan([example(1, 2, [1, 1, 1, 1, 1, 3]), example(2, 2, [4])], packing.Shape(64, 3, 32, 2, VALUES))
  assert bin_.items == [(0, [(1, 4, 1), (2, 4, 4), (1, 12, 1)]), (1, [(0, 16, 1)])]


def test_frames_stay_as_they_fitted_where_spread_they_do_not():
  """Two rows of 10 that are full: the largest first would leave 6 3 and 5 4, and no place for 2."""
  bin_, = packing.plan([example(1, 2, [6, 4, 5, 3, 2])], packing.Shape(64, 2, 40, 2, VALUES))
  assert bin_.items == [(0, [(0, 24, 1), (0, 16, 1), (1, 20, 1), (1, 12, 1), (1, 8, 1)])]


def test_a_frame_does_not_cross_a_vision_row():
  shape = packing.Shape(16, 2, 12, 2, VALUES)
  batch = packing.pack([example(0, 1, [2, 2])], shape)         # frames of 8 patches in rows of 12
  assert batch.frame_BRN[0].tolist() == [[1] * 8 + [0] * 4] * 2
  assert batch.vision_BT[0, :5].tolist() == [-1, 0, 1, 3, 4]
  assert 'do not fit 2 vision row' in packing.misfit(example(0, 1, [2, 2, 2]), shape)   # 24 patches, 24 places, no room


def test_a_sample_that_does_not_fit_is_refused_not_cut():
  shape = packing.Shape(8, 0, 0, 2, VALUES)
  assert packing.misfit(example(0, 8), shape) == ''
  assert packing.misfit(example(0, 9), shape) == '9 tokens do not fit a row of 8'
  assert 'do not fit 0 vision row' in packing.misfit(example(0, 1, [1]), shape)
  with pytest.raises(InputError, match='clip.jsonl:7: 9 tokens do not fit'):
    packing.pack([example(0, 9, source='clip.jsonl:7')], shape)


def test_packing_is_dense():
  rng, shape = np.random.default_rng(0), packing.Shape(128, 0, 0, 2, VALUES)
  examples = [example(i, int(n)) for i, n in enumerate(rng.integers(10, 70, 100))]
  rows = len(packing.plan(examples, shape))
  assert rows <= np.ceil(sum(len(e.token_T) for e in examples) / 128 * 1.05)
