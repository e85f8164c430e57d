"""Numbers of a run: (sum, weight) pairs until here, written as jsonl and TensorBoard, shown as a bar and a table.

What a jitted step returns is already summed over all devices of all processes, so process 0 alone writes.
"""
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from tqdm import tqdm

from data_pipelines.errors import InputError

FILE = 'metrics.jsonl'
_COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'


class Window:
  """Sums of (sum, weight) metrics over the steps since the last record. Part of a checkpoint, so that a resumed run
  writes the record it would have written."""

  def __init__(self, sums: Mapping[str, list[float]] | None = None):
    self.sums = {name: list(pair) for name, pair in (sums or {}).items()}

  def add(self, metrics: Mapping[str, tuple[float, float]]) -> None:
    for name, (total, weight) in metrics.items():
      pair = self.sums.setdefault(name, [0.0, 0.0])
      pair[0] += float(total)
      pair[1] += float(weight)

  def means(self) -> dict[str, float]:
    """Weighted means; a metric whose weight is 0 in every step is left out."""
    return {name: total / weight for name, (total, weight) in self.sums.items() if weight}


class Writer:
  """metrics.jsonl and tensorboard/ in the run folder, and Weights & Biases when asked. A no-op off process 0.

  step: the step that the run continues from; records after it are dropped, they will be written again.
  wandb: project name, '' for none. Raises InputError when it is asked for and not installed.
  """

  def __init__(self, run: str | os.PathLike, step: int, config: Mapping[str, Any], wandb: str = ''):
    if wandb and importlib.util.find_spec('wandb') is None:
      raise InputError('--wandb: the package is not installed; run `pip install wandb`')
    self._file = None
    if jax.process_index():
      return
    run = pathlib.Path(run)
    run.mkdir(parents=True, exist_ok=True)
    kept = [json.dumps(r) + '\n' for r in read(run) if r['step'] <= step]
    part = run / f'{FILE}.part'
    part.write_text(''.join(kept))
    part.replace(run / FILE)
    self._file = open(run / FILE, 'a', buffering=1)
    self._board = _tensorboard()(str(run / 'tensorboard'), purge_step=step + 1)
    self._wandb = None
    if wandb:
      import wandb as package
      self._wandb = package.init(project=wandb, name=run.name, dir=str(run), config=dict(config), resume='allow')

  def write(self, step: int, record: Mapping[str, Any]) -> None:
    """One record. Numbers go to every writer, the rest to jsonl only."""
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **record}) + '\n')
    numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
    for name, value in numbers.items():
      self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(numbers, step=step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()
      if self._wandb:
        self._wandb.finish()


def _tensorboard():
  """tensorboardX.SummaryWriter, without the seconds it spends on importing torch where that is installed."""
  hidden = sys.modules.setdefault('torch', None) is None
  try:
    from tensorboardX import SummaryWriter
  finally:
    if hidden:
      del sys.modules['torch']
  return SummaryWriter


def read(run: str | os.PathLike) -> list[dict[str, Any]]:
  """Records of a run folder's metrics.jsonl in order; a last line that was cut off is left out."""
  path, records = pathlib.Path(run) / FILE, []
  if path.is_file():
    for line in path.read_text().splitlines():
      try:
        records.append(json.loads(line))
      except ValueError:
        continue
  return records


class Progress:
  """What a person sees on stderr: a bar with rate and time left on a terminal, one line a record in a log file."""

  def __init__(self, name: str, step: int, steps: int):
    self.shown = jax.process_index() == 0
    self._bar = tqdm(total=steps, initial=step, desc=name, unit='step', dynamic_ncols=True, leave=True,
                     disable=not (self.shown and sys.stderr.isatty()))

  def step(self) -> None:
    self._bar.update()

  def record(self, step: int, steps: int, record: Mapping[str, float]) -> None:
    loss = f'loss {record["loss"]:.4f}, ' if 'loss' in record else ''
    text = f'{loss}{record["tokens_per_s"]:,.0f} tok/s'
    if not self._bar.disable:
      self._bar.set_postfix_str(text)
    elif self.shown:
      left = duration(record['step_s'] * (steps - step))
      print(f'step {step}/{steps}  {text}, {left} left', file=sys.stderr, flush=True)

  def close(self) -> None:
    self._bar.close()


def is_writer() -> bool:
  """Whether this process prints and writes for all."""
  return jax.process_index() == 0


def say(line: str) -> None:
  """A line for the person who watches, above a bar if there is one; process 0 only."""
  if jax.process_index() == 0:
    tqdm.write(line, file=sys.stderr)


def say_anywhere(line: str) -> None:
  """`say` of any process, which it names when there are several: what went wrong where it went wrong."""
  where = f'process {jax.process_index()}: ' if jax.process_count() > 1 else ''
  tqdm.write(where + line, file=sys.stderr)


def duration(seconds: float) -> str:
  """'1:02:03' or '2:03'."""
  minutes, s = divmod(int(seconds + 0.5), 60)
  hours, m = divmod(minutes, 60)
  return f'{hours}:{m:02}:{s:02}' if hours else f'{m}:{s:02}'


def table(rows: Mapping[str, Any]) -> str:
  """Two aligned columns."""
  width = max(map(len, rows))
  return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows.items())


class Compilations:
  """Counts the programs this process compiles, or reads from the compilation cache, from now until `close`."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._heard)

  def _heard(self, event: str, seconds: float, **_: Any) -> None:
    self.count += event == _COMPILE_EVENT

  def close(self) -> None:
    jax.monitoring.unregister_event_duration_listener(self._heard)
