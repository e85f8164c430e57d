"""Streams: the same batches whatever reads them; workers that die or hang are replaced, or a line says what did."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from data_pipelines import mixture, pipeline, streams
from data_pipelines.errors import InputError
from data_pipelines.schema import Batch
from tests.data_pipelines.test_pipeline import assert_same, config, path, take  # noqa: F401
from tests.processes import ROOT

DIED = 'Worker process was terminated unexpectedly with exit code -9. Search the logs above for the source.'


def joined(parts):
  """The global batch of the parts that the processes read."""
  return Batch(*(np.concatenate(leaves) for leaves in zip(*parts)))


def of_parts(path, count, n, state=None):  # noqa: F811
  """(global batches, state) of `count` processes that read four streams."""
  readers = [pipeline.train_batches(config(path, streams=4), 4, 5, i, count) for i in range(count)]
  out = []
  for reader in readers:
    if state:
      reader.set_state(state)
  for _ in range(n):
    out.append(joined([next(reader) for reader in readers]))
  states = json.loads(json.dumps([reader.get_state() for reader in readers]))
  for reader in readers:
    reader.close()
  return out, streams.join(states)


def test_batches_are_the_same_for_any_number_of_processes_and_go_on_with_another(path, monkeypatch):  # noqa: F811
  monkeypatch.setattr(pipeline, 'WINDOW_ROWS', 3)
  expected, _ = of_parts(path, 1, 6)
  for first, then in ((4, 2), (2, 1), (1, 4)):
    begun, state = of_parts(path, first, 2)
    gone_on, _ = of_parts(path, then, 4, state)
    assert_same(begun + gone_on, expected)
  with pytest.raises(InputError, match='come from 4 streams .* cannot be dealt out to 3 parts'):
    pipeline.train_batches(config(path, streams=4), 12, 5, 0, 3)
  with pytest.raises(InputError, match='train.batch=4 rows cannot come in equal shares from data.streams=8 streams'):
    pipeline.train_batches(config(path, streams=8), 4, 5, 0, 4)


def test_processes_read_disjoint_rows_and_together_all_of_them(path):  # noqa: F811
  good = [f'{path}:{i + 1}' for i in range(24) if i not in (4, 9)]
  load, seen = pipeline.Load(config(path), 14, 2, strict=False), []
  for process in range(2):
    stream = pipeline.shuffled(load, 2, process, 2)
    share = sum(not isinstance(stream[i], pipeline.Skip) for i in range(12))        # of the first epoch
    reader, rows = pipeline.train_batches(config(path, pack=False), 2, 2, process, 2), []
    while len(rows) < share:
      next(reader)
      rows += reader.sources
    reader.close()
    seen += rows
  assert sorted(seen) == sorted(good)


class Numbers:
  """An iterator like grain's: item n is (n, no skips, one sample); `trouble(n)` may raise or block before it."""

  def __init__(self, trouble):
    self.at, self.trouble = 0, trouble

  def __next__(self):
    self.trouble(self.at)
    self.at += 1
    return self.at - 1, [], [(f'row {self.at - 1}', 3)]

  def get_state(self):
    return {'at': self.at}

  def set_state(self, state):
    self.at = state['at']

  def close(self):
    pass


class OneSource:
  """What a stream asks of mixture.Rows."""
  sources, files = [mixture.Source('a', 'a.jsonl', 1.0)], [range(10)]

  def name(self, where):
    return 'a'


def numbers(trouble, waits=5.0, workers=False):
  said = []
  reading = streams.Reading(waits, workers, said.append)
  return streams.Batches(lambda s, of: Numbers(trouble), OneSource(), (0, 1), 1, reading), said


def test_workers_that_die_are_replaced_and_no_batch_is_lost():
  deaths = []

  def trouble(n):
    if n in (0, 3) and deaths.count(n) < 2:
      deaths.append(n)
      raise RuntimeError(DIED)
  it, said = numbers(trouble)
  assert take(it, 6) == list(range(6)) and deaths == [0, 0, 3, 3]
  assert said == ['data stream 0 of 1: Worker process was terminated unexpectedly with exit code -9; started again '
                  'behind the last batch'] * 4
  it.close()


def test_workers_that_always_die_end_the_run_with_a_line():
  def trouble(n):
    if n == 2:
      raise RuntimeError(DIED)
  it, _ = numbers(trouble)
  assert take(it, 2) == [0, 1]
  with pytest.raises(InputError, match='its workers died 4 times in a row .*lower data.workers'):
    next(it)
  it.close()


def test_other_errors_pass_through():
  def trouble(n):
    raise InputError('a.jsonl:3: bad')
  it, said = numbers(trouble)
  for _ in range(2):                       # again if asked again
    with pytest.raises(InputError, match='^a.jsonl:3: bad$'):
      next(it)
  assert not said
  it.close()


def test_reading_that_hangs_is_told_and_then_ends_the_run(monkeypatch):
  monkeypatch.setattr(streams, 'SAY_AFTER', 0.1)
  forever = threading.Event()
  it, said = numbers(lambda n: n == 2 and forever.wait(), waits=1.0)
  assert take(it, 2) == [0, 1]
  with pytest.raises(streams.Stuck, match=r'no batch for \d+ s .*after row 1. Look at the disk'):
    next(it)
  assert said[0].endswith('it may take 1 s (data.max_wait_seconds)')
  it.close()                               # does not wait for the thread
  forever.set()


@pytest.mark.slow
@pytest.mark.parametrize('number, waits, said', [(signal.SIGKILL, 1800.0, 'exit code -9'),
                                                 (signal.SIGSTOP, 30.0, 'its workers were killed')])
def test_a_worker_that_is_really_killed_or_stopped_changes_no_batch(path, number, waits, said):  # noqa: F811
  told = []
  it = pipeline.train_batches(config(path, workers=1, max_wait_seconds=waits), 2, seed=9, report=told.append)
  found = take(it, 2)
  told.clear()                             # on a busy machine the first worker may have been too slow
  (worker,) = multiprocessing.active_children()
  os.kill(worker.pid, number)
  while not told:                          # what it had read ahead comes first
    found += take(it, 1)
  found += take(it, 2)
  it.close()
  assert said in told[0]
  assert_same(found, take(pipeline.train_batches(config(path), 2, seed=9), len(found)))


@pytest.mark.slow
def test_closing_does_not_wait_for_a_worker_that_is_stopped(path, monkeypatch):  # noqa: F811
  monkeypatch.setattr(streams, 'KILL_SECONDS', 2.0)
  it = pipeline.train_batches(config(path, workers=1), 2, seed=9)
  take(it, 2)
  (worker,) = multiprocessing.active_children()
  os.kill(worker.pid, signal.SIGSTOP)
  it.close()
  worker.join(10)
  assert worker.exitcode == -signal.SIGKILL


def test_a_process_that_ends_without_closing_says_nothing(path):  # noqa: F811
  """Python 3.12 starts no thread as it ends."""
  code = ('from tests.data_pipelines.test_pipeline import config, pipeline, take\n'
          f'it, unread = (pipeline.train_batches(config({str(path)!r}), 2, seed=9) for _ in range(2))\n'
          'print(len(take(it, 2)))')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, '2\n', '')
