"""Keeps the books of a run: steps under way, metrics since the last record, where the time went, steps that failed."""
import collections
import contextlib
import math
import statistics
import time
from typing import Any, NamedTuple

import jax

from data_pipelines.errors import InputError
from keye_jax.metrics import Window

ROWS_NAMED = 4         # rows of a bad batch that a message names
SPIKE_WINDOW = 64      # steps whose median loss a step is compared with
SPIKE_AFTER = 16       # of them, before any step is compared


class _Step(NamedTuple):
  number: int
  metrics: Any         # on the devices, perhaps still being computed
  tokens: Any          # int, or an array on the devices
  sources: list[str]


class Meter:
  """max_bad_steps: so many skipped steps in a row end the run. spike_factor: see `limit`; 0 for no limit."""

  def __init__(self, max_bad_steps: int, spike_factor: float = 0.0):
    self._max_bad, self._bad, self._spikes, self._factor = max_bad_steps, 0, 0, spike_factor
    self._losses: collections.deque[tuple[int, float]] = collections.deque(maxlen=SPIKE_WINDOW)     # (step, loss)
    self._pending: collections.deque[_Step] = collections.deque()
    self._window = Window()
    self._totals = {'tokens': 0, 'skipped steps': 0}     # of every process that trained the run so far
    self._spent = collections.Counter()                                  # seconds since this process began
    self._loss, self._warm, self._done = None, None, 0
    self._since = (time.perf_counter(), 0, 0, self._spent.copy())        # of the last record: time, step, tokens, spent

  @contextlib.contextmanager
  def timed(self, what: str):
    """Counts the block's seconds as `what`: 'data', 'compute' or 'save', a span of that name in a trace."""
    begun = time.perf_counter()
    with jax.profiler.TraceAnnotation(what):
      yield
    self._spent[what] += time.perf_counter() - begun

  def add(self, step: int, metrics: Any, tokens: Any, sources: list[str]) -> None:
    self._pending.append(_Step(step, metrics, tokens, sources))

  def limit(self, number: int) -> float:
    """The loss above which step `number` is to be skipped: spike_factor times the median of the recent steps.

    It looks at steps up to `number` - 2, those that have ended while one is under way, so that a resumed run sees
    the same limits. inf when there are too few, or when the median is not above 0.
    """
    losses = [loss for step, loss in self._losses if step <= number - 2]
    if not self._factor or len(losses) < SPIKE_AFTER:
      return math.inf
    median = statistics.median(losses)
    return self._factor * median if median > 0 else math.inf

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
        self._bad = self._spikes = 0
        if self._factor and metrics['loss'][1]:
          self._losses.append((step.number, float(metrics['loss'][0] / metrics['loss'][1])))
        continue
      self._bad += 1
      self._spikes += int(metrics['spikes'][0])
      self._totals['skipped steps'] += 1
      if self._bad == self._max_bad:
        rows = ', '.join(step.sources[:ROWS_NAMED]) + (', ...' if len(step.sources) > ROWS_NAMED else '')
        above = f'{self._factor} times its median (train.spike_factor)'
        what = ('the loss or a gradient was not finite' if not self._spikes else
                f'the loss was above {above}' if self._spikes == self._bad else
                f'the loss or a gradient was not finite, or the loss above {above},')
        raise InputError(f'step {step.number}: {what} in {self._bad} steps in a row (train.max_bad_steps); the last '
                         f'batch held {rows}. Look at those rows, or lower optimizer.learning_rate; the last '
                         'checkpoint is from before')

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
    return {'window': self._window.sums, 'totals': self._totals, 'losses': list(self._losses)}

  def restore(self, saved: dict[str, Any]) -> None:
    self._window, self._totals = Window(saved['window']), dict(saved['totals'])
    self._losses.extend(map(tuple, saved['losses']))
    self._since = (*self._since[:2], self._totals['tokens'], self._since[3])

  def summary(self) -> dict[str, Any]:
    """The run so far. Rates are of this process, from its second step on; totals of all that trained the run."""
    out = {'loss': self._loss, 'tokens': self._totals['tokens'], 'skipped steps': self._totals['skipped steps']}
    if self._warm and self._done > 1:
      seconds, tokens = time.perf_counter() - self._warm[0], self._totals['tokens'] - self._warm[1]
      out['tokens/s'] = tokens / seconds
    return out | {f'seconds in {k}': self._spent[k] for k in ('data', 'compute', 'save')}
