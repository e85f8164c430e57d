import pytest

from keye_jax.evals import events
from keye_jax.evals.events import Event


def test_events_of_an_answer():
  assert events.parse('7 2.0 - 3.5, 3 4 - 4.5') == [Event('7', (2.0, 3.5)), Event('3', (4.0, 4.5))]
  assert events.parse('7 from 2.0 to 3.5; 3 4.5 - 4.0') == events.parse('') == []


@pytest.mark.parametrize('said, true, pairs', [
  ('7 0.0 - 2.0', '7 0.0 - 1.0', [(0, 0)]),                             # IoU of exactly a half
  ('7 0.0 - 2.1', '7 0.0 - 1.0', []),
  ('3 0.0 - 1.0', '7 0.0 - 1.0', []),                                   # another digit
  ('7 0.0 - 1.0, 7 0.0 - 1.0', '7 0.0 - 1.0', [(0, 0)]),                # said twice, is there once
  ('7 0.0 - 1.0', '7 0.0 - 1.0, 7 0.0 - 1.5', [(0, 0)]),
  ('7 0.0 - 1.4, 7 0.0 - 1.0', '7 0.0 - 1.0, 7 0.0 - 1.5', [(0, 1), (1, 0)]),
])
def test_each_event_is_found_once(said, true, pairs):
  assert events.match(events.parse(said), events.parse(true)) == pairs


def test_recall_and_precision_by_hand():
  """Two of three events are found, by two of four that are named."""
  answers = ['7 0.0 - 1.0, 3 2.0 - 3.0, 3 5.0 - 6.0', '1 0.0 - 1.0']
  expected = ['3 2.0 - 3.0, 7 0.0 - 1.0', '2 0.0 - 1.0']
  found = events.score(answers, expected, ['a', 'b'])
  assert (found['event_recall'].value, found['event_recall'].n) == (pytest.approx(2 / 3), 3)
  assert (found['event_precision'].value, found['event_precision'].n) == (0.5, 4)
  assert found['event_recall'].low == 0 and found['event_recall'].high == 1
  assert set(events.score(['nothing'], ['7 0.0 - 1.0'], ['a'])) == {'event_recall'}
  with pytest.raises(ValueError, match='none of 1 expected answers'):
    events.score(['7 0.0 - 1.0'], ['nothing'], ['a'])
