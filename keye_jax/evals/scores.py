"""Scores of answered questions, by question type. Exact match for short answers, temporal IoU for intervals."""
from collections.abc import Sequence
from typing import NamedTuple

from keye_jax.evals import intervals
from keye_jax.evals.intervals import Interval
from keye_jax.evals.uncertainty import bootstrap, wilson


class Question(NamedTuple):
  """One question of a held-out file."""
  clip: str                     # questions of one clip are not independent: intervals are resampled by clip
  type: str                     # 'digit', 'count', 'order', 'when', ...
  text: str
  expected: str                 # without the reasons that the message may begin with
  interval: Interval | None = None     # of the asked event, in seconds: scored by IoU, not by exact match
  others: tuple[Interval, ...] = ()    # the other events of the clip
  seconds: float = 0.0                 # duration of the clip


class Score(NamedTuple):
  value: float
  low: float                    # 95% interval
  high: float
  n: int


def verdict(text: str) -> str:
  """An answer without the reasons it may begin with, "7 2.0, 3 4.5: before": what stands behind its last colon."""
  return text.rpartition(': ')[2].strip()


def is_right(question: Question, answer: str) -> bool:
  """Exact match but for surrounding white space and for reasons before it."""
  return question.expected in (answer.strip(), verdict(answer))


def points(question: Question, answer: str) -> float:
  """What one answer earns: temporal IoU for a grounding question, else 1 or 0."""
  if question.interval:
    return intervals.iou(intervals.parse(answer).interval, question.interval)
  return float(is_right(question, answer))


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Score]:
  """Scores by name, in the order: one accuracy per type, then all short answers together, then grounding.

  'accuracy/<type>', 'accuracy' (all short answers), 'miou', 'asked_over_other' (share of grounding answers that
  overlap the asked event more than any other event of the clip; only clips that have another), 'strict' (share of
  grounding answers that are exactly "a - b"). Shares carry Wilson's interval, means a bootstrap over clips.
  Raises ValueError when the two lists differ in length or are empty.
  """
  if len(questions) != len(answers) or not questions:
    raise ValueError(f'{len(questions)} questions and {len(answers)} answers')
  pairs = list(zip(questions, answers))
  short = [(q, a) for q, a in pairs if not q.interval]
  ground = [(q, a) for q, a in pairs if q.interval]
  out = {}
  for name in sorted({q.type for q, _ in short}):
    out[f'accuracy/{name}'] = share([is_right(q, a) for q, a in short if q.type == name])
  if short:
    out['accuracy'] = share([is_right(q, a) for q, a in short])
  if ground:
    earned = [points(q, a) for q, a in ground]
    low, high = bootstrap(earned, [q.clip for q, _ in ground])
    out['miou'] = Score(sum(earned) / len(earned), low, high, len(earned))
    contested = [(q, a) for q, a in ground if q.others]
    if contested:
      out['asked_over_other'] = share([
          intervals.prefers(intervals.parse(a).interval, q.interval, list(q.others)) for q, a in contested])
    out['strict'] = share([intervals.parse(a).strict for _, a in ground])
  return out


def share(hits: Sequence[bool]) -> Score:
  low, high = wilson(sum(hits), len(hits))
  return Score(sum(hits) / len(hits), low, high, len(hits))
