"""Keeps the books of a run: steps under way, metrics since the last record, where the time went, steps that failed."""
import collections
import contextlib
import time
from typing import Any, NamedTuple

import jax

from data_pipelines.errors import InputError
from keye_jax.metrics import Window

ROWS_NAMED = 4         # rows of a bad batch that a message names


class _Step(NamedTuple):
  number: int
  metrics: Any         # on the devices, perhaps still being computed
  tokens: Any          # int, or an array on the devices
  sources: list[str]


class Meter:
  """max_bad_steps: so many steps in a row with a loss or gradient that is not finite end the run."""

  def __init__(self, max_bad_steps: int):
    self._max_bad, self._bad = max_bad_steps, 0
    self._pending: collections.deque[_Step] = collections.deque()
    self._window = Window()
    self._totals = {'tokens': 0, 'skipped steps': 0}     # of every process that trained the run so far
    self._spent = collections.Counter()                                  # seconds since this process began
    self._loss, self._warm, self._done = None, None, 0
    self._since = (time.perf_counter(), 0, 0, self._spent.copy())        # of the last record: time, step, tokens, spent

  @contextlib.contextmanager
  def timed(self, what: str):
    """Counts the block's seconds as `what`: 'data', 'compute' or 'save'."""
    begun = time.perf_counter()
    yield
    self._spent[what] += time.perf_counter() - begun

  def add(self, step: int, metrics: Any, tokens: Any, sources: list[str]) -> None:
    self._pending.append(_Step(step, metrics, tokens, sources))

  def settle(self, leave: int = 0) -> None:
    """Waits for the steps added so far, but for the last `leave` of them. Raises InputError after too many bad ones."""
    while len(self._pending) > leave:
      step = self._pending.popleft()
      metrics = jax.device_get(step.metrics)
      self._window.add(metrics)
      self._totals['tokens'] += int(step.tokens)
      self._done += 1
      if self._warm is None:                 # the first step compiles
        self._warm = (time.perf_counter(), self._totals['tokens'])
      if not metrics['skipped'][0]:
        self._bad = 0
        continue
      self._bad += 1
      self._totals['skipped steps'] += 1
      if self._bad == self._max_bad:
        rows = ', '.join(step.sources[:ROWS_NAMED]) + (', ...' if len(step.sources) > ROWS_NAMED else '')
        raise InputError(f'step {step.number}: the loss or a gradient was not finite in {self._bad} steps in a row '
                         f'(train.max_bad_steps); the last batch held {rows}. Look at those rows, or lower '
                         'optimizer.learning_rate; the last checkpoint is from before')

  def record(self) -> dict[str, float]:
    """Weighted means since the last record, and rates: tokens_per_s, and seconds a step in data, compute and save."""
    self.settle()
    begun, done, tokens, spent = self._since
    now, steps = time.perf_counter(), max(self._done - done, 1)
    means = self._window.means()
    self._loss = means.get('loss', self._loss)
    rates = {f'{k}_s': (self._spent[k] - spent[k]) / steps for k in ('data', 'compute', 'save')}
    rates |= {'tokens_per_s': (self._totals['tokens'] - tokens) / (now - begun), 'step_s': (now - begun) / steps}
    self._window = Window()
    self._since = (now, self._done, self._totals['tokens'], self._spent.copy())
    return means | rates

  def saved(self) -> dict[str, Any]:
    """JSON for a checkpoint; `restore` takes it back."""
    return {'window': self._window.sums, 'totals': self._totals}

  def restore(self, saved: dict[str, Any]) -> None:
    self._window, self._totals = Window(saved['window']), dict(saved['totals'])
    self._since = (*self._since[:2], self._totals['tokens'], self._since[3])

  def summary(self) -> dict[str, Any]:
    """The run so far. Rates are of this process, from its second step on; totals of all that trained the run."""
    out = {'loss': self._loss, 'tokens': self._totals['tokens'], 'skipped steps': self._totals['skipped steps']}
    if self._warm and self._done > 1:
      seconds, tokens = time.perf_counter() - self._warm[0], self._totals['tokens'] - self._warm[1]
      out['tokens/s'] = tokens / seconds
    return out | {f'seconds in {k}': self._spent[k] for k in ('data', 'compute', 'save')}
