"""What can be had without looking at a clip: the majority answer of each question type, one interval for all clips."""
from collections import Counter
from collections.abc import Sequence

import numpy as np

from keye_jax.evals.intervals import Interval
from keye_jax.evals.scores import Question


def majority(train: Sequence[Question], asked: Sequence[Question]) -> list[str]:
  """Answers every question with the most frequent training answer of its type (the smallest text on a tie).

  Raises ValueError for a type that training does not have.
  """
  counts: dict[str, Counter] = {}
  for q in train:
    counts.setdefault(q.type, Counter())[q.expected] += 1
  if unknown := sorted({q.type for q in asked} - counts.keys()):
    raise ValueError(f'no training question of type {", ".join(unknown)}')
  best = {name: min(c, key=lambda answer: (-c[answer], answer)) for name, c in counts.items()}
  return [best[q.type] for q in asked]


def best_constant(questions: Sequence[Question], steps: int = 40) -> tuple[Interval, bool, float]:
  """The single interval with the highest mean IoU on the given grounding questions: (interval, relative, mean IoU).

  Searched twice, in seconds and (`relative`) in fractions of each clip's duration, over `steps` + 1 equal places.
  Handed the held-out questions themselves it is an upper bound of every constant answer.
  """
  asked = [q for q in questions if q.interval]
  if not asked:
    raise ValueError('no grounding questions')
  true_N2 = np.array([q.interval for q in asked])
  seconds_N = np.array([q.seconds for q in asked])
  if not (seconds_N > 0).all():
    raise ValueError('a grounding question without the duration of its clip')
  best = ((0.0, 0.0), False, -1.0)
  for relative in (False, True):
    places = np.linspace(0, 1 if relative else seconds_N.max(), steps + 1)
    scale_N = seconds_N if relative else np.ones_like(seconds_N)
    for i, start in enumerate(places):
      for end in places[i + 1:]:
        mean = _iou(start * scale_N, end * scale_N, true_N2).mean()
        if mean > best[2] + 1e-12:
          best = ((float(start), float(end)), relative, float(mean))
  return best


def constant_answers(questions: Sequence[Question], interval: Interval, relative: bool) -> list[str]:
  """"a - b" for every question."""
  scale = [q.seconds if relative else 1.0 for q in questions]
  return [f'{interval[0] * s:.6g} - {interval[1] * s:.6g}' for s in scale]


def _iou(start_N, end_N, true_N2):
  shared_N = np.clip(np.minimum(end_N, true_N2[:, 1]) - np.maximum(start_N, true_N2[:, 0]), 0, None)
  return shared_N / (end_N - start_N + true_N2[:, 1] - true_N2[:, 0] - shared_N)
