import pytest

from keye_jax.evals import baselines, scores
from keye_jax.evals.scores import Question

ASKED = [
  Question('a', 'digit', 'which digit?', '7'),
  Question('a', 'digit', 'which digit?', '3'),
  Question('b', 'count', 'how many?', '2'),
  Question('b', 'when', 'when?', '2.0 - 4.0', (2.0, 4.0), ((6.0, 8.0),), 10.0),
  Question('c', 'when', 'when?', '6.0 - 8.0', (6.0, 8.0), ((2.0, 4.0),), 10.0),
  Question('d', 'when', 'when?', '1.0 - 2.0', (1.0, 2.0), (), 10.0),
]


def test_scores_by_hand():
  got = scores.score(ASKED, ['7', '33', ' 2\n', '3.0 - 5.0', 'at 2.5 to 4', '1.0 - 2.0'])
  assert {name: (s.value, s.n) for name, s in got.items()} == {
    'accuracy/count': (1.0, 1),
    'accuracy/digit': (0.5, 2),
    'accuracy': (pytest.approx(2 / 3), 3),
    'miou': (pytest.approx((1 / 3 + 0 + 1) / 3), 3),
    'asked_over_other': (0.5, 2),      # the third clip has one event
    'strict': (pytest.approx(2 / 3), 3),
  }
  for s in got.values():
    assert 0 <= s.low <= s.value <= s.high <= 1


@pytest.mark.parametrize('answer, right', [
    ('7 2.0, 3 4.5: before', True), ('before', True), (' 7 2.0: 3 4.5: before\n', True), ('7 2.0, 3 4.5: after', False),
    ('before: after', False), ('before, 7 2.0', False), ('before:', False), ('7 2.0, 3 4.5: ', False)])
def test_what_stands_behind_reasons_counts(answer, right):
  assert scores.is_right(Question('a', 'order', 'before or after?', 'before'), answer) == right


def test_an_answer_that_cannot_be_read_earns_nothing():
  got = scores.score(ASKED, ['', 'seven', 'two', '', 'no idea', '5'])
  assert {name: s.value for name, s in got.items()} == dict.fromkeys(got, 0.0)


def test_score_refuses_lists_of_different_length():
  with pytest.raises(ValueError, match='6 questions and 1 answers'):
    scores.score(ASKED, ['7'])


def test_majority_is_learnt_from_training_answers_only():
  train = [Question('t', 'digit', '', x) for x in '5525'] + [Question('t', 'count', '', x) for x in '3113']
  assert baselines.majority(train, ASKED[:3]) == ['5', '5', '1']       # a tie goes to the smallest text
  with pytest.raises(ValueError, match='no training question of type when'):
    baselines.majority(train, ASKED)


def test_best_constant_interval_in_seconds():
  asked = [Question(str(i), 'when', '', '', (2.0, 4.0), (), 8.0) for i in range(3)]
  asked.append(Question('x', 'when', '', '', (10.0, 12.0), (), 16.0))
  interval, relative, mean = baselines.best_constant(asked, steps=16)
  assert (interval, relative) == ((2.0, 4.0), False)
  assert mean == pytest.approx(0.75)
  got = scores.score(asked, baselines.constant_answers(asked, interval, relative))
  assert got['miou'].value == pytest.approx(mean) and got['strict'].value == 1.0


def test_best_constant_interval_in_fractions_of_the_clip():
  asked = [Question(str(n), 'when', '', '', (n / 4, n / 2), (), float(n)) for n in (8, 16, 40)]
  interval, relative, mean = baselines.best_constant(asked, steps=16)
  assert (interval, relative, mean) == ((0.25, 0.5), True, pytest.approx(1.0))
  assert baselines.constant_answers(asked, interval, relative) == ['2 - 4', '4 - 8', '10 - 20']


def test_best_constant_needs_durations():
  with pytest.raises(ValueError, match='duration'):
    baselines.best_constant([Question('a', 'when', '', '', (2.0, 4.0))])
