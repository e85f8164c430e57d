"""Dense captions: the events that an answer names, against those that happen. Seconds throughout."""
import re
from collections.abc import Sequence
from typing import NamedTuple

from keye_jax.evals.intervals import Interval, iou
from keye_jax.evals.scores import Score
from keye_jax.evals.uncertainty import bootstrap

LEAST_IOU = 0.5            # from which an event of the same name is the one that was meant
_EVENT = re.compile(r'(\S+) (\d+(?:\.\d+)?) - (\d+(?:\.\d+)?)')


class Event(NamedTuple):
  name: str
  interval: Interval


def parse(text: str) -> list[Event]:
  """Every "name a - b" of an answer with a <= b: "7 2.0 - 3.5, 3 4.0 - 4.5" has two."""
  found = [Event(name, (float(a), float(b))) for name, a, b in _EVENT.findall(text)]
  return [event for event in found if event.interval[0] <= event.interval[1]]


def match(said: Sequence[Event], true: Sequence[Event]) -> list[tuple[int, int]]:
  """Pairs (said, true) of one name with an IoU of LEAST_IOU, each event in one pair at most, the best overlap first."""
  pairs = sorted((-iou(a.interval, b.interval), i, j) for i, a in enumerate(said) for j, b in enumerate(true)
                 if a.name == b.name)
  out: dict[int, int] = {}
  for negative, i, j in pairs:
    if -negative >= LEAST_IOU and i not in out and j not in out.values():
      out[i] = j
  return sorted(out.items())


def score(answers: Sequence[str], expected: Sequence[str], clips: Sequence[str]) -> dict[str, Score]:
  """'event_recall': the share of true events that an answer names; 'event_precision': the share of named events that
  are true, absent when none is named. Intervals are a bootstrap over clips. Raises ValueError without a true event."""
  hit_true, hit_said, of_true, of_said = [], [], [], []
  for answer, truth, clip in zip(answers, expected, clips, strict=True):
    said, true = parse(answer), parse(truth)
    found = match(said, true)
    hit_said += [i in {i for i, _ in found} for i in range(len(said))]
    hit_true += [j in {j for _, j in found} for j in range(len(true))]
    of_said += [clip] * len(said)
    of_true += [clip] * len(true)
  if not hit_true:
    raise ValueError(f'none of {len(expected)} expected answers names an event')
  share = lambda hits, of: Score(sum(hits) / len(hits), *bootstrap(hits, of), len(hits))
  return {'event_recall': share(hit_true, of_true)} | (
      {'event_precision': share(hit_said, of_said)} if hit_said else {})
