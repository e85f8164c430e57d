import pytest

from keye_jax.evals import intervals


@pytest.mark.parametrize('text, interval, strict', [
  ('3.5 - 6.0', (3.5, 6.0), True),
  (' 3 - 6\n', (3.0, 6.0), True),
  ('4.0 - 4.0', (4.0, 4.0), True),
  ('7 2.0 - 3.5', (2.0, 3.5), True),           # what it is of, then the interval
  ('the 7 2.0 - 3.5', (2.0, 7.0), False),
  ('6.0 - 3.5', (3.5, 6.0), False),            # the wrong way round
  ('3.5-6.0', (3.5, 6.0), False),              # no spaces
  ('3.5 - 6.0 seconds', (3.5, 6.0), False),
  ('from 7.5 to 3 s, or 12', (3.0, 7.5), False),
  ('at 3.5', None, False),
  ('never', None, False),
  ('', None, False),
])
def test_parse(text, interval, strict):
  assert intervals.parse(text) == (interval, strict)


@pytest.mark.parametrize('a, b, expected', [
  ((2.0, 4.0), (2.0, 4.0), 1.0),
  ((2.0, 4.0), (3.0, 5.0), 1 / 3),
  ((0.0, 1.0), (2.0, 3.0), 0.0),
  ((0.0, 2.0), (2.0, 3.0), 0.0),               # they touch
  ((0.0, 10.0), (4.0, 5.0), 0.1),
  ((4.5, 4.5), (4.0, 5.0), 0.0),               # an answer without length
  (None, (4.0, 5.0), 0.0),
])
def test_iou(a, b, expected):
  assert intervals.iou(a, b) == pytest.approx(expected)


def test_iou_refuses_a_true_interval_without_length():
  with pytest.raises(ValueError, match='no length'):
    intervals.iou((1.0, 2.0), (3.0, 3.0))


@pytest.mark.parametrize('answer, expected', [
  ((2.0, 4.0), True),
  ((2.0, 7.5), True),       # 2 s of the asked event, 1.5 of the other
  ((3.0, 8.0), False),      # 1 s and 2 s
  ((3.0, 7.0), False),      # a tie is no preference
  ((10.0, 11.0), False),
  (None, False),
])
def test_prefers(answer, expected):
  assert intervals.prefers(answer, (2.0, 4.0), [(6.0, 8.0), (20.0, 21.0)]) is expected
