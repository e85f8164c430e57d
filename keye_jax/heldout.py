"""Held-out rows while a run trains: their loss, the best parameters so far, and when to stop.

    RUN/best/       a run folder of its own, with the checkpoint of the step whose held-out loss was lowest
"""
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from data_pipelines import mixture, pipeline
from data_pipelines.errors import InputError
from keye_jax import adapters, checkpoint, feed, run_folder
from keye_jax.config import DataConfig, RunConfig
from keye_jax.metrics import Window, say
from keye_jax.steps.state import State

BEST = 'best'


class Trial:
  """Evaluates `train.heldout`, keeps the best parameters and counts evaluations since.

  measure: see `steps.update.make_measure`. judged: as it was in the checkpoint that the run goes on from, or {}. base:
  of a run with adapters, see `adapters.reference`. Raises InputError when the file is missing or has another tokenizer
  beside it.
  """

  def __init__(self, config: RunConfig, out: pathlib.Path, measure: Callable[[Any, Any, Any], Any],
               judged: dict[str, Any], base: dict[str, Any]):
    self.config, self.out, self.measure, self.base = config, out, measure, base
    self.rows = config.train.batch // config.train.accumulate       # at a time: what is known to fit
    self.part = feed.share(config.model.layout, self.rows)
    # best: lowest value so far, of step `step`; worse: evaluations in a row since then
    self.judged = {'best': float('inf'), 'step': 0, 'worse': 0} | judged
    self.words = pipeline.open_tokenizer(config.data)
    vision, data = config.model.vision, data_of(config)
    self.load = pipeline.Load(data, vision.patch, vision.merge, strict=True)
    if self.load.tokenizer.fingerprint() != self.words.fingerprint():
      raise InputError(f'{data.path}: has another tokenizer beside it than the training data; set data.tokenizer')

  @property
  def enough(self) -> bool:
    """Whether `train.patience` is used up."""
    return 0 < self.config.train.patience <= self.judged['worse']

  def run(self, step: int, state: State) -> dict[str, float]:
    """{'heldout/loss': ...}: the training metrics, averaged over every row of the file. Saves what is best so far.

    Raises InputError at a row that cannot be used: a held-out set must not shrink unseen.
    """
    window = Window()
    for batch in pipeline.heldout_batches(self.load, self.rows, *self.part, together=self.config.data.pack):
      placed = feed.place(self.config.model.layout, batch, *self.part)
      window.add(jax.device_get(self.measure(state.train, state.frozen, placed)))
    means = window.means()
    self.judged = judge(self.judged, step, means[metric(self.config)])
    if not self.judged['worse']:
      self._keep(step, state)
    if self.enough:
      say(f'step {step}: held-out {metric(self.config)} was lowest at step {self.judged["step"]}; stopping early')
    return {f'heldout/{name}': value for name, value in means.items()}

  def summary(self) -> dict[str, Any]:
    return {f'best held-out {metric(self.config)}': self.judged['best'], 'at step': self.judged['step']}

  def _keep(self, step: int, state: State) -> None:
    best = self.out / BEST
    checkpoints = checkpoint.Checkpoints(best, 1, say)
    checkpoints.tidy()
    if jax.process_index() == 0:
      best.mkdir(parents=True, exist_ok=True)
      run_folder.write_config(best, self.config)
      self.words.save(best)
    checkpoints.save(step, adapters.without_base(self.config, state), self.base)
    checkpoints.wait()


def data_of(config: RunConfig) -> DataConfig:
  """What reads `train.heldout`, relative to the folder of the training data."""
  return dataclasses.replace(config.data, path=str(mixture.folder(config.data) / config.train.heldout), sources=())


def metric(config: RunConfig) -> str:
  """What is compared: next-token loss, and the indexers' own while they alone learn."""
  return 'indexer_kl' if config.model.attention == 'warmup' else 'loss'


def judge(judged: dict[str, Any], step: int, value: float) -> dict[str, Any]:
  """`judged` after another evaluation. A value that is not finite is never the best."""
  if value < judged['best']:
    return {'best': value, 'step': step, 'worse': 0}
  return judged | {'worse': judged['worse'] + 1}
