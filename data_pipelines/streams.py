"""Streams of packed rows: what one process draws its part of every batch from, and goes on with after a restart.

The rows of a batch come from a fixed number of streams, each an endless shuffled share of the dataset with a packer of
its own; stream s of S fills rows s * batch / S to (s + 1) * batch / S. How many streams there are is decided when a run
begins and kept in its checkpoints, so the batches are the same whatever number of processes reads them: a process takes
over whole streams.

A worker process that dies is replaced and its stream goes on behind the last batch given out. One that hangs is killed
first. What cannot be replaced ends the run with one line: reading never waits without a word.
"""
import collections
import multiprocessing
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import mixture
from data_pipelines.errors import InputError
from data_pipelines.schema import Batch

MET = ('samples', 'tokens', 'skipped')       # counted for each source
LAST = 20                       # skipped rows remembered with their reason
AHEAD = 2                       # batches read ahead
RESTARTS = 3                    # of the workers of a stream that gives no batch in between
SAY_AFTER = 60.0                # seconds without a batch until somebody is told
KILL_SECONDS = 15.0             # a thread notices within this time that its workers were killed or that it is to end


class Stuck(InputError):
  """Reading a batch takes longer than it may, and its threads cannot be ended: the process has to be."""


class Readers(NamedTuple):
  """Who makes samples of row numbers: this process, others beside it, or others elsewhere."""
  load: Callable[[int], Any]                 # a row number -> its sample
  read: Callable[[Any, int], Any]            # (grain.MapDataset of samples, streams that share them) -> IterDataset
  kill: Callable[[], None] | None = None     # ends their processes, which are then replaced; None: they have none
  close: Callable[[], None] = lambda: None   # at the end


class Reading(NamedTuple):
  """How to read. waits: seconds that a batch may take."""
  waits: float
  readers: Readers
  report: Callable[[str], None]


class Batches:
  """Iterator of `Batch` with exact resume. `get_state()` is small and JSON-compatible; `set_state` continues with the
  batch that would have come next, also with another number of workers or of processes. `close()` ends threads and
  workers; state and stats stay readable.

  opened: (stream, number of streams) -> a grain iterator of (Batch, skips, (file:row, tokens) of the batch's samples),
  which come from `rows`. part: (index, count), this process reads part `index` of `count` of the streams. Raises
  InputError when they cannot be dealt out.
  """

  def __init__(self, opened: Callable[[int, int], Any], rows: mixture.Rows, part: tuple[int, int], streams: int,
               reading: Reading):
    self._opened, self._rows, self._part, self._reading = opened, rows, part, reading
    self.sources: list[str] = []         # file:row of every sample in the last batch
    self._streams: list[Stream] = []
    self._deal(streams)

  def _deal(self, streams: int) -> None:
    index, count = self._part
    if streams % count:
      raise InputError(f'the rows of a batch come from {streams} streams (data.streams, or the processes that the run '
                       f'began with), which cannot be dealt out to {count} parts of the batch; use as many processes '
                       f'as divide {streams}')
    for stream in self._streams:
      stream.close()
    each = streams // count
    self._of, self._first = streams, index * each
    self._streams = [Stream(self._opened, self._rows, s, streams, self._reading)
                     for s in range(self._first, self._first + each)]

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    batches = [next(stream) for stream in self._streams]
    self.sources = [name for stream in self._streams for name in stream.sources]
    return batches[0] if len(batches) == 1 else Batch(*(np.concatenate(leaves) for leaves in zip(*batches)))

  def stats(self) -> dict[str, Any]:
    """Of this process's streams up to the last batch: {'skipped': {reason: count}, 'last': [the latest messages, each
    with file:row], 'sources': {name: {'samples', 'tokens', 'skipped', 'epochs'}}}; a dataset of one file has the name
    ''."""
    reasons = sum((stream.reasons for stream in self._streams), collections.Counter())
    last = [message for stream in self._streams for message in stream.last]
    found, share = {}, len(self._streams) / self._of
    for source, file in zip(self._rows.sources, self._rows.files):
      met = {key: sum(stream.met[source.name][key] for stream in self._streams) for key in MET}
      found[source.name] = met | {'epochs': round((met['samples'] + met['skipped']) / (len(file) * share), 3)}
    return {'skipped': dict(sorted(reasons.items())), 'last': last[-LAST:], 'sources': found}

  def get_state(self) -> dict[str, Any]:
    return {'of': self._of, 'streams': {str(self._first + i): s.get_state() for i, s in enumerate(self._streams)}}

  def set_state(self, state: dict[str, Any]) -> None:
    """state: what `get_state` gave, or `join` of what it gave to all processes. Raises InputError when its streams
    cannot be dealt out to the processes that there are now."""
    if state['of'] != self._of:
      self._deal(state['of'])
    for i, stream in enumerate(self._streams):
      stream.set_state(state['streams'][str(self._first + i)])

  def close(self) -> None:
    self._reading.readers.close()
    for stream in self._streams:
      stream.close()


def kill_children() -> None:
  """Kills the processes that this one started with multiprocessing, as grain does."""
  for child in multiprocessing.active_children():
    child.kill()


def join(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The states of all processes as one."""
  return {'of': states[0]['of'], 'streams': {k: v for state in states for k, v in state['streams'].items()}}


class Stream:
  """One stream: an iterator of `Batch` that reads ahead in a thread."""

  def __init__(self, opened: Callable[[int, int], Any], rows: mixture.Rows, index: int, of: int, reading: Reading):
    self._opened, self._name, self._reading = lambda: opened(index, of), f'{index} of {of}', reading
    self._owner, self.met = rows.name, {s.name: dict.fromkeys(MET, 0) for s in rows.sources}
    self.reasons, self.last = collections.Counter(), collections.deque(maxlen=LAST)
    self.sources: list[str] = []
    iterator = self._opened()
    self._position = iterator.get_state()
    self._live = [_Ahead(iterator)]
    # At exit too, and before modules are torn down: grain's own clean-up fails after that.
    self.close = weakref.finalize(self, _shut, self._live)

  def __next__(self) -> Batch:
    for restart in range(RESTARTS + 1):
      try:
        (batch, skips, taken), self._position = self._wait()
        break
      except WorkerDied as e:
        if restart == RESTARTS:
          raise InputError(f'data stream {self._name}: its workers died {restart + 1} times in a row without a batch '
                           f'in between ({e}); look for what kills them (memory, /dev/shm: lower data.workers, '
                           'data.cache_mb or data.max_pixels), or read without them: data.workers=0') from None
        self._reading.report(f'data stream {self._name}: {e}; started again behind the last batch')
        self._restart(self._position)
    self.sources = [where for where, _ in taken]
    for where, tokens in taken:
      met = self.met[self._owner(where)]
      met['samples'] += 1
      met['tokens'] += tokens
    for skip in skips:
      self.reasons[skip.reason] += 1
      self.last.append(skip.message)
      self.met[self._owner(skip.where)]['skipped'] += 1
    return batch

  def _wait(self):
    """The next (item, position). Raises WorkerDied, Stuck, and what reading raised."""
    if not self._live:
      raise ValueError('these batches are closed')
    begun, (ahead,), reading = time.monotonic(), self._live, self._reading
    limit = min(SAY_AFTER, reading.waits)
    while (found := ahead.get(limit)) is None:
      waited = time.monotonic() - begun
      if waited < reading.waits:
        reading.report(f'data stream {self._name}: no batch for {waited:.0f} s; it may take '
                       f'{reading.waits:.0f} s (data.max_wait_seconds)')
        limit = min(SAY_AFTER, reading.waits - waited)
        continue
      if reading.readers.kill:     # a killed worker is one that died
        reading.readers.kill()
        if (found := ahead.get(KILL_SECONDS)) is not None and not isinstance(found, tuple):
          raise WorkerDied(f'no batch for {waited:.0f} s (data.max_wait_seconds); its workers were killed')
      if found is None:
        self._live.clear()         # closing would wait for the thread
        raise Stuck(f'data stream {self._name}: no batch for {waited:.0f} s (data.max_wait_seconds); after '
                    f'{", ".join(self.sources[-4:]) or "nothing"}. Look at the disk or network that the data lie on')
      break
    if isinstance(found, tuple):
      return found
    if isinstance(found, RuntimeError) and 'terminated unexpectedly' in str(found):       # grain's words
      raise WorkerDied(str(found).partition('. ')[0])
    raise found

  def _restart(self, position) -> None:
    iterator = self._opened()
    iterator.set_state(dict(position))
    _shut(self._live)
    self._position = iterator.get_state()
    self._live.append(_Ahead(iterator))

  def get_state(self) -> dict[str, Any]:
    return {'position': self._position, 'skipped': dict(sorted(self.reasons.items())), 'last': list(self.last),
            'sources': {name: dict(met) for name, met in self.met.items()}}

  def set_state(self, state: dict[str, Any]) -> None:
    if not self._live:
      raise ValueError('these batches are closed')
    self._restart(state['position'])
    self.reasons, self.last = collections.Counter(state['skipped']), collections.deque(state['last'], LAST)
    self.met = {name: dict(met) for name, met in state['sources'].items()}


class WorkerDied(Exception):
  pass


class _Ahead:
  """Reads an iterator in a thread that begins with the first `get`, and closes it there: as the interpreter ends,
  Python 3.12 starts no thread any more."""

  def __init__(self, iterator):
    self._iterator, self._ready, self._stop = iterator, queue.Queue(AHEAD), threading.Event()
    self._thread, self._ended = threading.Thread(target=self._work, daemon=True, name='data'), None

  def _work(self) -> None:
    while not self._stop.is_set() and self._ended is None:
      try:
        found = next(self._iterator), self._iterator.get_state()
      except BaseException as e:             # raised where the batch is asked for
        found = self._ended = e
      self._ready.put(found)
    self._iterator.close()

  def get(self, seconds: float):
    """(item, state behind it), the exception that ended the iterator, or None when there is nothing in time."""
    if self._thread.ident is None:
      self._thread.start()
    try:
      return self._ready.get(timeout=seconds if self._ended is None else 0.01)
    except queue.Empty:
      return self._ended

  def close(self) -> None:
    """Waits for the item under way and for the workers, but not for any that hang: those are killed."""
    self._stop.set()
    if self._thread.ident is None:
      return self._iterator.close()
    if not self._joined():
      kill_children()
      self._joined()

  def _joined(self) -> bool:
    deadline = time.monotonic() + KILL_SECONDS
    while self._thread.is_alive() and time.monotonic() < deadline:
      try:
        self._ready.get(timeout=0.01)        # the thread may wait for a place in the queue
      except queue.Empty:
        pass
    return not self._thread.is_alive()


def _shut(live: list) -> None:
  while live:
    live.pop().close()
