"""What happens in a clip, and what can be asked about it: digits that appear and disappear, with exact answers.

Times are counted in half seconds, the distance of sampled frames at 2 frames a second. A clip has slots, stretches of
time that do not touch; in a slot one digit is shown, or two side by side in a clip that asks about co-occurrence.
"""
from typing import NamedTuple

import numpy as np

HALF = 0.5                     # seconds
LENGTHS = range(8, 15)         # of a clip
SLOTS = (2, 3, 4)
PAIR_SHARE = 0.25              # of clips: those with two digits at once
ALONE, LEFT, RIGHT = range(3)  # where on the screen
LIST = 'When does each digit appear?'


class Event(NamedTuple):
  digit: int
  start: int                   # half seconds; it is visible in the sampled frames start ... end - 1
  end: int
  place: int                   # ALONE, LEFT or RIGHT

  @property
  def interval(self) -> list[float]:
    return [self.start * HALF, self.end * HALF]


class Question(NamedTuple):
  type: str                    # digit, count, order, cooccur, ground or list
  text: str
  answer: str                  # of ground: what is asked about, then its interval, "7 2.0 - 3.5"
  interval: list[float] | None = None      # seconds, of the asked event; only for ground
  others: tuple[list[float], ...] = ()     # of the clip's other events; only for ground
  reasons: str = ''            # said before the answer

  @property
  def message(self) -> str:
    return f'{self.reasons}: {self.answer}' if self.reasons else self.answer


class Script(NamedTuple):
  length: int                  # half seconds
  events: tuple[Event, ...]    # in the order of their start
  questions: tuple[Question, ...]


def write(rng: np.random.Generator, teach: bool = False) -> Script:
  """A clip with its questions. An event lasts 10-25% of the clip.

  teach: ask for all events as well. Each of them is a match of a digit and its time for the price of a few tokens, and
  that match is what takes longest to learn (docs/main_job.md).
  """
  paired = rng.random() < PAIR_SHARE
  count = int(rng.choice(SLOTS[:-1] if paired else SLOTS))
  # Events of two half seconds, and one between them, must fit.
  length = int(rng.choice([n for n in LENGTHS if n >= 3 * count - 1]))
  times = slots(rng, length, count, 2, length // 4)
  plot = (_pair_clip if paired else _sequence_clip)(rng, length, times)
  return _with_list(rng, plot) if teach else plot


def write_still(rng: np.random.Generator) -> Script:
  """A single picture: one digit, two side by side, or none."""
  kind, a, b = rng.random(), *map(int, rng.choice(10, 2, replace=False))
  if kind < 0.7:
    events, answer = (Event(a, 0, 1, ALONE),), str(a)
  elif kind < 0.9:
    events, answer = (Event(a, 0, 1, LEFT), Event(b, 0, 1, RIGHT)), f'{a} and {b}'
  else:
    events, answer = (), 'none'
  return Script(1, events, (Question('digit', 'Which digits are shown?', answer),))


def slots(rng: np.random.Generator, length: int, count: int, least: int, most: int) -> list[tuple[int, int]]:
  """`count` stretches of `least` ... `most` half seconds, gaps of at least one, uniform over all arrangements."""
  size = rng.integers(least, most + 1, count)
  free = length - size.sum() - (count - 1)
  if free < 0:
    size, free = np.full(count, least), length - (least + 1) * count + 1
  before = np.sort(rng.choice(free + count, count, replace=False)) - np.arange(count)
  start = before + np.concatenate([[0], np.cumsum(size + 1)[:-1]])
  return [(int(s), int(s + n)) for s, n in zip(start, size)]


def _sequence_clip(rng, length, times) -> Script:
  """One digit at a time, at least two different ones; one of them may come twice or three times."""
  count = len(times)
  repeats = int(rng.integers(1, count))
  different = rng.permutation(10)
  shown = rng.permutation([different[0]] * repeats + list(different[1:count - repeats + 1])).tolist()
  events = tuple(Event(d, *slot, ALONE) for d, slot in zip(shown, times))
  once = [e for e in events if shown.count(e.digit) == 1]
  once = [once[i] for i in rng.permutation(len(once))]
  absent = int(different[-1])
  asked = absent if repeats == 1 and rng.random() < 0.5 else int(different[0])
  how_many = (Question('count', 'How many digits appear?', str(count)) if rng.random() < 0.5 else
              Question('count', f'How many times does {asked} appear?', str(shown.count(asked))))
  questions = [
      how_many, _end(rng, events), _at(rng, events[rng.integers(count)]),
      *(_when(e, events) for e in once[:2]), *([_order(*once[:2])] if len(once) > 1 else [])]
  return _shuffled(rng, length, events, questions)


def _pair_clip(rng, length, times) -> Script:
  """Two digits side by side in one slot, one digit in each other slot, all different."""
  count = len(times)
  pair = int(rng.integers(count))
  different = rng.permutation(10).tolist()
  a, b, singles = different[0], different[1], different[2:count + 1]
  events = []
  for i, slot in enumerate(times):
    events += [Event(a, *slot, LEFT), Event(b, *slot, RIGHT)] if i == pair else [Event(singles.pop(), *slot, ALONE)]
  alone = [e for e in events if e.place == ALONE]
  other = alone[rng.integers(len(alone))]
  of_pair = events[pair + rng.integers(2)]
  together = [(a, b), (of_pair.digit, other.digit)]
  questions = [Question('cooccur', 'Are {} and {} shown together?'.format(*rng.permutation(two)), answer)
               for two, answer in zip(together, ('yes', 'no'))]
  questions += [_at(rng, other), _when(other, events),
                _order(*((other, of_pair) if rng.random() < 0.5 else (of_pair, other)))]
  return _shuffled(rng, length, tuple(events), questions)


def _end(rng, events) -> Question:
  word, event = ('first', events[0]) if rng.random() < 0.5 else ('last', events[-1])
  return Question('digit', f'Which digit appears {word}?', str(event.digit))


def _at(rng, event) -> Question:
  seconds = int(rng.integers(event.start, event.end)) * HALF
  return Question('digit', f'Which digit is shown at {seconds:.1f}?', str(event.digit))


def _when(event, events) -> Question:
  return Question('ground', f'When does {event.digit} appear?', said(event.digit, event.interval), event.interval,
                  tuple(o.interval for o in events if o is not event))


def _with_list(rng, plot: Script) -> Script:
  """Events by digit, not by time: what comes next must be found by its digit."""
  events = sorted(plot.events, key=lambda e: (e.digit, e.start))
  asked = Question('list', LIST, ', '.join(said(e.digit, e.interval) for e in events))
  at = int(rng.integers(len(plot.questions) + 1))
  return plot._replace(questions=(*plot.questions[:at], asked, *plot.questions[at:]))


def said(digit: int, interval) -> str:
  return '{} {:.1f} - {:.1f}'.format(digit, *interval)


def _order(a: Event, b: Event) -> Question:
  reasons = ', '.join(f'{e.digit} {e.start * HALF:.1f}' for e in (a, b))
  return Question('order', f'Does {a.digit} appear before or after {b.digit}?',
                  'before' if a.start < b.start else 'after', reasons=reasons)


def _shuffled(rng, length, events, questions) -> Script:
  return Script(length, events, tuple(questions[i] for i in rng.permutation(len(questions))))
