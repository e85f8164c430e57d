"""Rows whose media point where those of an earlier row do."""
import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.corpus import looks, steps, vectors

RNG = np.random.default_rng(0)
FRAMES = np.zeros((1, 2, 2, 3), np.uint8)


def drawn(centre, spread=0.0, kind='image'):
  """A vector around one of some random directions."""
  base = np.random.default_rng(centre).normal(size=40)
  medium = FRAMES[0] if kind == 'image' else video.Clip(FRAMES, np.zeros(1), 'x', 1.0)
  return vectors.vector(lambda frames: base + spread * RNG.normal(size=40), kind, medium)


def plainly(rows_NMW, least):
  """The definition, a pair at a time in float64."""
  kept, found = [], []
  unit = rows_NMW.astype(np.float64) / np.linalg.norm(rows_NMW.astype(np.float64), axis=2, keepdims=True)
  for i, row in enumerate(unit):
    like = [k for k in kept if all(float(a @ b) >= least for a, b in zip(row, unit[k]))]
    found += [(k, i) for k in like]
    if not like:
      kept.append(i)
  return found


@pytest.mark.parametrize('block', [1, 3, 7, 1024])
def test_what_repeats_does_not_depend_on_blocks(monkeypatch, block):
  rows = np.stack([vectors.directions([drawn(c % 5, 0.3), drawn(c % 3, 0.3)]) for c in RNG.integers(0, 15, 60)])
  expected = plainly(rows, 0.85)
  assert 10 < len(expected)
  monkeypatch.setattr(vectors, 'BLOCK', block)
  assert sorted(vectors.repeated(rows, 0.85)) == sorted(expected)


def test_sums_are_exact_in_any_order():
  """For vectors as long as towers are wide, whose sums come nearest to what float32 holds."""
  a, b = (vectors.directions([drawn(0, 1e-3)] * 3) for _ in range(2))
  wide = np.tile(np.round(vectors.LENGTH / 1152 ** 0.5), (2, 1152)).astype(np.float32)
  for x, y in ((a, b), (wide, wide)):
    exact = x.astype(np.int64) @ y.T.astype(np.int64)
    assert exact.max() < 2 ** 24
    np.testing.assert_array_equal(x @ y.T, exact)
    order = RNG.permutation(x.shape[1])
    np.testing.assert_array_equal(x[:, order] @ y[:, order].T, exact)
    np.testing.assert_allclose(np.diag(vectors.likeness(x, y)), 1, atol=1e-5)
  assert vectors.nearest(np.concatenate([-a, a]), drawn(0)) == (3, pytest.approx(1, abs=1e-5))
  nothing = vectors.directions([vectors.vector(lambda frames: np.zeros(40), 'image', FRAMES[0])])
  assert not vectors.likeness(nothing, a).any()


def test_frames_are_taken_at_shares_of_a_clip():
  """Two rates of one clip give frames of the same moments."""
  seen = []
  for fps in (2, 8):
    seconds = np.arange(0, 16, 1 / fps)
    frames = np.broadcast_to(seconds[:, None, None, None].astype(np.uint8), (len(seconds), 2, 2, 3))
    clip = video.Clip(frames, seconds + 3, 'x', 16.0)
    see = lambda f: seen.append(f[:, 0, 0, 0].tolist()) or np.ones(4)
    assert vectors.kinds([vectors.vector(see, 'video', clip)]) == 'video'
  assert seen[0] == seen[1] == [1, 3, 5, 7, 9, 11, 13, 15]


def measured(row, text, found):
  noise = np.random.default_rng(row).integers(0, 256, (56, 56, 3), np.uint8)         # looks like no other
  media = (looks.look('image', noise),)
  return steps.Measured(row, f'r{row}', exact=str(row), text=text, media=media, vectors=(found,))


def dropped(same, *rows):
  job, groups = steps.Job('', (), (), None, 14, 2, 1, 13, same, similar=0.9), {}
  for row in rows:
    for key, value in steps.keys(row, job):
      groups.setdefault(key, []).append(value)
  return steps.choose(pair for key, group in groups.items() for pair in steps.near((key, group[::-1]), job))


def test_rows_of_one_text_go_unless_the_medium_alone_counts():
  rows = [measured(i, text, drawn(*how)) for i, (text, how) in enumerate((
      ('a', (0,)), ('a', (0, 0.1)), ('b', (0, 0.1)), ('a', (1,)), ('a', (0, 0.1, 'video'))))]
  assert dropped('row', *rows) == {1: ('r0', 'similar')}
  assert dropped('medium', *rows) == {1: ('r0', 'similar'), 2: ('r0', 'similar')}
  assert dropped('nothing', *rows) == {}


def test_what_an_evaluation_set_shows_is_kept_out():
  held = steps.index([steps.Seen('e:1', (), (), (drawn(0),)), steps.Seen('e:2', (), (), (drawn(1), drawn(2)))])
  reason, message = steps.contaminated([], (), held, 13, [drawn(3), drawn(2, 0.05)], 0.95)
  assert reason == 'medium of an evaluation set'
  assert 'its picture is like that of e:2 to the model (cosine 0.9' in message
  for other in (drawn(3), drawn(2, 0.05, 'video'), drawn(2, 1.0)):
    assert steps.contaminated([], (), held, 13, [other], 0.95) is None
