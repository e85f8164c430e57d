"""The host loop of training: batch -> update -> log -> save.

Run again with the same config and folder, it goes on from the newest whole checkpoint and reaches, on the same mesh,
the same losses bit for bit as if it had never stopped: parameters, optimizer, data position, random key and the
half-filled window of metrics are all part of a checkpoint.
"""
import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines import pipeline, streams
from data_pipelines.errors import InputError
from keye_jax import adapters, begin, checkpoint, feed, heldout, run_folder, watch
from keye_jax.config import RunConfig
from keye_jax.meter import Meter
from keye_jax.metrics import Compilations, Progress, Writer, say, say_anywhere
from keye_jax.steps.state import State


class Result(NamedTuple):
  step: int
  stopped_by: int              # number of the signal that ended the run early; 0 when it reached its last step
  summary: dict[str, Any]


def train(config: RunConfig, out: str | os.PathLike, wandb: str = '', profile: bool = False) -> Result:
  """Trains in the run folder `out` up to `config.train.steps`, going on from what is there. Set the mesh before.

  wandb: project to log to as well. profile: write a trace of a few steps, see `watch.Trace`.

  A first SIGTERM or SIGINT ends the step under way, saves and returns; a second one ends the process at once.
  Raises InputError: the objective learns from responses, which nothing makes yet; another process trains in `out`;
  `out` was started with another config or dataset; a checkpoint could not be saved; `max_bad_steps` steps in a row were
  skipped; the data gave no batch for too long.
  """
  t, vision, layout = config.train, config.model.vision, config.model.layout
  if t.objective != 'sft':
    raise InputError(f"train.objective = {t.objective!r} learns from a policy's responses and their rewards, which "
                     'nothing makes yet; `keye plan --what rl` plans its step')
  out = pathlib.Path(out)
  with contextlib.ExitStack() as stack:
    closing = lambda thing: stack.enter_context(contextlib.closing(thing))
    closing(run_folder.lock(out))
    compilations = closing(Compilations())
    part = feed.share(layout, t.batch)
    batches = closing(pipeline.train_batches(config.data, t.batch, t.seed, *part, vision.patch, vision.merge,
                                             report=say_anywhere))
    checkpoints, made = checkpoint.Checkpoints(out, t.keep, say), begin.programs(config)
    meter = Meter(t.max_bad_steps, t.spike_factor)
    base = adapters.reference(config)
    kept = {'config': dataclasses.asdict(config), 'dataset': pipeline.fingerprints(config.data)} | base
    state, step, judged = start(config, out, made, checkpoints, batches, meter, kept)
    trial = heldout.Trial(config, out, made.measure, judged, base) if t.heldout else None
    enough = lambda: trial is not None and trial.enough
    writer = closing(Writer(out, step, kept['config'], wandb))
    progress = closing(Progress('train', step, t.steps))

    trace = closing(watch.Trace(out, profile))
    signals = stack.enter_context(Signals())
    while step < t.steps and not enough():
      trace.step()
      with meter.timed('data'):
        batch = next(batches)
        placed = feed.place(layout, batch, *part)
        if t.balance_rows:
          placed = made.even(placed, feed.place_rows(layout, ('batch',), feed.costs(config, batch), *part))
      with meter.timed('compute'):
        state, metrics = made.update(state, placed, made.rates(step), meter.limit(step + 1))
        step += 1
        meter.add(step, metrics, feed.tokens(batch, placed), batches.sources)
        meter.settle(leave=1)           # one step stays under way while the host fetches the next batch
      progress.step()
      ended, stopped, record = step == t.steps, signals.stop(step), {}
      if ended or step % t.log_every == 0:         # not when stopped: the window goes on after a restart
        record = meter.record() | {'learning_rate': made.rates(step - 1)['model'],
                                   'rows_skipped': rows_skipped(batches.stats(), part),
                                   'compilations': compilations.count}
        record |= counters(batches.stats())
        record |= watch.mfu(config, record['tokens_per_s']) | watch.memory()
        progress.record(step, t.steps, record)
      if trial and (ended or step % t.eval_every == 0):
        checkpoints.wait()             # the best is saved too, one save at a time
        record |= trial.run(step, state)
        judged = trial.judged
      if record:
        writer.write(step, record)
      if ended or stopped or enough() or step % t.save_every == 0:
        meter.settle()
        with meter.timed('save'):
          checkpoints.save(step, adapters.without_base(config, state),
                           kept | {'data': batches.get_state(), 'meter': meter.saved(), 'heldout': judged})
      checkpoints.check()
      if stopped:
        break
    with meter.timed('save'):
      checkpoints.wait()
    stats = batches.stats()
    summary = {'run': str(out), 'step': step, 'steps': t.steps} | meter.summary() | {
        'rows skipped': rows_skipped(stats, part), 'last row skipped': (stats['last'] or [''])[-1],
        'compilations': compilations.count} | {
        f'source {name}' if name else 'data': f'{met["samples"]:,} samples, {met["tokens"]:,} tokens, '
        f'{met["skipped"]:,} rows skipped, {met["epochs"]:g} epochs' for name, met in stats['sources'].items()
        } | watch.memory()
    if 'tokens/s' in summary:
      summary |= watch.mfu(config, summary['tokens/s'])
    summary |= trial.summary() if trial else {}
    return Result(step, 0 if step >= t.steps else signals.caught, summary)


def start(config: RunConfig, out: pathlib.Path, made: begin.Programs, checkpoints: checkpoint.Checkpoints, batches,
          meter: Meter, kept: dict[str, Any]) -> tuple[State, int, dict[str, Any]]:
  """State, step and how the held-out evaluations went, to go on from: those of the newest whole checkpoint, else of
  step 0. Writes RUN/config.json. kept: what this run's checkpoints will say of dataset and base."""
  if config.model.remat == 'offload' and jax.default_backend() == 'cpu' and not jax.sharding.get_abstract_mesh().empty:
    raise InputError("model.remat = 'offload' does not run on a mesh of CPUs: XLA's partitioner for them refuses to "
                     "place scalars in a memory; write 'attention' there")
  words = pipeline.open_tokenizer(config.data)
  if words.size > config.model.text.vocab:
    raise InputError(f'{config.data.path}: its tokenizer has {words.size} tokens, more than model.text.vocab = '
                     f'{config.model.text.vocab}')
  checkpoints.tidy()
  found, judged = None, {}
  if checkpoints.exist():
    for line in run_folder.check_same(out, config):
      say(f'{out}: going on with another {line}')
    found = checkpoints.restore(adapters.without_base(config, jax.eval_shape(made.fresh, jax.random.key(0))))
  if found is None:
    state, step = begin.first_state(config, made, say), 0
  else:
    state, step = found.state, found.step
    if 'dataset' not in found.hosts[0]:         # of `keye import`, or the best step of a run
      raise InputError(f'{out}: holds a model, not a run to go on with; start from it: --config.train.init={out} and '
                       'another --out')
    for what, then in found.hosts[0]['dataset'].items():
      if then != (now := kept['dataset'].get(what, 'absent')):
        raise InputError(f'{config.data.path}: the {what} changed since the checkpoint of step {step} (fingerprint '
                         f'{then[:8]}, now {now[:8]}); bring them back, or start again with another --out')
    if config.lora.targets:
      adapters.check_base(out, found.hosts[0]['base'], kept['base'])
      state = state._replace(frozen=begin.first_state(config, made, say).frozen)
    batches.set_state(streams.join([host['data'] for host in found.hosts]))
    meter.restore(found.hosts[0]['meter'])
    judged = found.hosts[0].get('heldout', {})
    say(f'{out}: going on from step {step}' if step < config.train.steps else f'{out}: already at step {step}')
  if jax.process_index() == 0:
    run_folder.write_config(out, config)
    words.save(out)
  return state, step, judged


def rows_skipped(stats: dict[str, Any], part: tuple[int, int]) -> int:
  """Of all processes; every process must ask. part: (index, count) of this process's rows in a batch."""
  here = sum(stats['skipped'].values())
  if jax.process_count() == 1:
    return here
  # Processes that split the sequence read the same rows.
  return int(multihost_utils.process_allgather(np.array(here)).sum()) * part[1] // jax.process_count()


def counters(stats: dict[str, Any]) -> dict[str, float]:
  """{'data/NAME/samples': ...} for the metrics, of this process since the first step; 'data/samples' of one file."""
  return {'/'.join(filter(None, ('data', name, key))): value
          for name, met in stats['sources'].items() for key, value in met.items()}


class Signals:
  """SIGTERM and SIGINT as a flag, so that a run ends between two steps with a checkpoint.

  With several processes the notice goes to all of them and they agree on the step, through jax.distributed.
  """
  HANDLED = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.caught, self._before = 0, {}

  def __enter__(self) -> 'Signals':
    if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
      self._before = {s: signal.signal(s, self._catch) for s in self.HANDLED}
    return self

  def __exit__(self, *_) -> None:
    for s, handler in self._before.items():
      signal.signal(s, handler)

  def _catch(self, number: int, _) -> None:
    if self.caught:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    self.caught = number
    say(f'{signal.Signals(number).name}: saving after this step; send it again to end at once')

  def stop(self, step: int) -> bool:
    """Whether to end after `step`. Every process must ask after every step."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.caught = signal.SIGTERM
    return bool(self.caught)
