"""Temporal grounding: reading an interval out of an answer, and comparing intervals. Seconds throughout."""
import re
from typing import NamedTuple

Interval = tuple[float, float]

_NUMBER = r'\d+(?:\.\d+)?'
_STRICT = re.compile(rf'(?:\S+ )?({_NUMBER}) - ({_NUMBER})')


class Parsed(NamedTuple):
  interval: Interval | None
  strict: bool                # the answer was exactly "a - b" with a <= b, a word before it allowed


def parse(text: str) -> Parsed:
  """Interval of an answer.

  Strict form: "a - b", two numbers of seconds with a <= b, nothing around them but white space and one word at most,
  what the interval is of ("7 2.0 - 3.5"). Fallback, not strict: the first two numbers anywhere in the text, in rising
  order ("from 7.5 to 3 s" is (3.0, 7.5)). Fewer than two numbers: no interval, which scores 0.
  """
  if match := _STRICT.fullmatch(text.strip()):
    start, end = map(float, match.groups())
    if start <= end:
      return Parsed((start, end), True)
  numbers = [float(x) for x in re.findall(_NUMBER, text)[:2]]
  return Parsed((min(numbers), max(numbers)), False) if len(numbers) == 2 else Parsed(None, False)


def overlap(a: Interval, b: Interval) -> float:
  """Seconds that two intervals share."""
  return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


def iou(a: Interval | None, b: Interval) -> float:
  """Intersection over union in time, 0 without an interval. `b` is the true one and must have a length."""
  if b[1] <= b[0]:
    raise ValueError(f'true interval {b} has no length')
  if a is None:
    return 0.0
  shared = overlap(a, b)
  return shared / (a[1] - a[0] + b[1] - b[0] - shared)


def prefers(answer: Interval | None, asked: Interval, others: list[Interval]) -> bool:
  """True when the answer shares more time with the asked event than with any other event of the clip."""
  return answer is not None and overlap(answer, asked) > max(overlap(answer, other) for other in others)
