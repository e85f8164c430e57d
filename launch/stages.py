"""What the commands that train several stages after each other share: the data, the clock, and one stage's run."""
import pathlib
import resource
import sys
import time
from contextlib import contextmanager
from typing import Any

from data_pipelines import frameforge, sources, tokenizer
from data_pipelines.frameforge import transcript
from keye_jax import loop
from keye_jax.config import RunConfig


class Stopped(Exception):
  """A signal, its number, ended a stage."""


class Clock:
  """Headlines and times of the stages."""

  def __init__(self):
    self.spent: list[tuple[str, float]] = []

  @contextmanager
  def stage(self, name: str):
    print(f'\n== {name}', flush=True)
    started = time.monotonic()
    yield
    self.spent.append((name, time.monotonic() - started))
    print(f'   {self.spent[-1][1]:.1f} s, {peak_gib():.1f} GiB at most so far', flush=True)

  @property
  def total(self) -> float:
    return sum(seconds for _, seconds in self.spent)


def build(data: pathlib.Path, clips: dict[str, int], vocab: int) -> dict[str, Any]:
  """FrameForge's clips, their transcripts and pictures in `data`, and a tokenizer of the training text. What is there
  stays."""
  made = frameforge.build(data, **clips)
  transcript.write(data)
  if not (data / 'tokenizer.json').is_file():
    tokenizer.train_bpe(sources.texts(data / 'train.jsonl'), vocab).save(data)
  for split in ('train', 'heldout'):
    asked = ', '.join(f'{n} {kind}' for kind, n in made[split]['questions'].items())
    print(f'   {split}: {made[split]["rows"]} clips; questions: {asked}')
  return made


def train(config: RunConfig, out: pathlib.Path) -> int:
  """Trains a stage to its end and returns the steps. Raises Stopped when a signal ended it before."""
  result = loop.train(config, out)
  if result.stopped_by:
    raise Stopped(result.stopped_by)
  return result.step


def peak_gib() -> float:
  """Largest resident memory so far of this process and its largest child together."""
  unit = 1 if sys.platform == 'darwin' else 1024
  both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
  return sum(resource.getrusage(who).ru_maxrss for who in both) * unit / 2**30
