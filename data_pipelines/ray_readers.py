"""Decoding apart from training: rows become samples in actors of Ray, on whatever hosts of a cluster have free CPUs.

The ExtraIO of Keye-VL-2.0 (arXiv 2606.10651, infrastructure): a service for decoding and sampling that grows without
regard to training; its interface was not published. An actor does what a local worker does, with the same limits for
media that are not trusted. Which rows come next, and in what order their samples are used, the process that trains
decides (pipeline.Packed), so batches and states do not depend on who reads.

A sample is written once, by its actor into Ray's object store, its pixels as uint8, and read from there in place.
"""
import contextlib
import ctypes
import importlib.metadata
import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain

from data_pipelines import streams
from data_pipelines.errors import InputError

TRIES = streams.RESTARTS + 1      # of one row, and of starting an actor
AHEAD = 2                         # samples of each actor: one under way, one read
ALIKE = ('av', 'numpy', 'pillow', 'tokenizers')       # packages of which another release may give another sample


def readers(load: Callable[[int], Any], report: Callable[[str], None]) -> streams.Readers:
  """`load.data.workers` actors for this process, of the cluster that RAY_ADDRESS names, or of one on this machine that
  ends with this process.

  load: pickled to the actors; has `data` and `rows`. Raises InputError when Ray is not installed or does not answer.
  """
  pool = Pool(load, load.data.workers, report)

  def read(samples: grain.MapDataset, sharing: int) -> grain.IterDataset:
    ahead = -(-AHEAD * load.data.workers // max(sharing, 1))
    return samples.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead))

  return streams.Readers(pool, read, pool.kill, pool.close)


class Pool:
  """Row number -> `load` of it, from one of `count` actors. For many threads; at most `count` rows are under way.

  An actor that dies is replaced and the row it had is read again, which `report` is told. Calling raises what `load`
  raises; InputError when TRIES actors in a row died over one row, or cannot start; streams.WorkerDied after `kill`.
  """

  def __init__(self, load: Callable[[int], Any], count: int, report: Callable[[str], None]):
    self._ray, self._where, self._report = connect(count), load.rows.where, report
    cpus = self._ray.cluster_resources().get('CPU', 0)
    if cpus < count:
      report(f'data.readers: {count} actors want a CPU each, the Ray cluster has {cpus:g}; the others wait for hosts')
    # Pickled here and not by Ray: relative paths hold only when the actor has changed to this folder.
    self._task = self._ray.put((os.getcwd(), pickle.dumps(load), versions()))
    self._new = self._ray.remote(Reader).options(num_cpus=1, scheduling_strategy='SPREAD').remote
    self._changed, self._idle, self._actors = threading.Condition(), [], set()
    self._round = self._deaths = 0                   # how often all were killed; how many died
    self._fault: Exception | None = None             # why nothing can be read any more
    with self._changed:
      for _ in range(count):
        self._begin(TRIES)

  def __call__(self, i: int) -> Any:
    now = self._round
    for _ in range(TRIES):
      actor, where = self._take(now)
      done, sample = actor.load.options(num_returns=2).remote(i)
      try:
        self._ray.get(done)                          # an actor that died over the row takes no other
        self._put(actor)                             # it can go on while the sample travels
        return self._ray.get(sample)
      except self._ray.exceptions.RayTaskError as e:
        self._put(actor)
        raise e.cause from None
      except self._ray.exceptions.RayError as e:
        died = e
        self._lost(actor, e, f'{where} died over {self._where(i)}, which is read again')
    raise InputError(f'{self._where(i)}: {TRIES} readers in a row died over it, the last: {why(died)}; take the row '
                     'out, or lower what it may cost (data.max_pixels, data.max_mb)')

  def kill(self) -> None:
    """Ends all actors, also such as hang, and starts others. What is under way raises streams.WorkerDied."""
    with self._changed:
      old = self._drop()
      for _ in old:
        self._begin(TRIES)
    self._end(old)

  def close(self) -> None:
    """Ends all actors and whatever waits for them."""
    with self._changed:
      self._fault = ValueError('these readers are closed')
      old = self._drop()
    self._end(old)

  def _drop(self) -> set:
    self._round += 1
    old, self._actors = self._actors, set()
    self._idle.clear()
    self._changed.notify_all()
    return old

  def _end(self, actors: set) -> None:
    for actor in actors:
      self._ray.kill(actor)

  def _take(self, now: int):
    """(an actor that is there and has nothing to do, where it is)."""
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._idle or self._fault or self._round != now)
        if self._fault:
          raise self._fault.with_traceback(None)     # of many threads
        if self._round != now:
          raise streams.WorkerDied('its readers were killed')
        actor = self._idle.pop(0)
      try:
        return actor, self._ray.get(actor.where.remote())
      except self._ray.exceptions.RayError as e:     # that it was gone before is not the fault of a row
        self._lost(actor, e, 'an actor is gone')

  def _put(self, actor) -> None:
    with self._changed:
      if actor in self._actors:
        self._idle.append(actor)
        self._changed.notify()

  def _lost(self, actor, error: Exception, what: str) -> None:
    if not self._ray.is_initialized():               # it ends with this process, and would be started again
      raise error
    with self._changed:
      if actor not in self._actors:                  # killed, or found by another thread
        return
      self._actors.discard(actor)
      self._deaths += 1
      deaths = self._deaths
      self._begin(TRIES)
    self._end({actor})                               # it may only be out of reach
    self._report(f'data.readers: {what}; replaced, {deaths} so far ({why(error)})')

  def _begin(self, tries: int) -> None:
    """Starts an actor, which takes rows from when it is there."""
    actor = self._new()
    self._actors.add(actor)
    threading.Thread(target=self._welcome, args=(actor, tries), daemon=True, name='reader').start()

  def _welcome(self, actor, tries: int) -> None:
    fault = None
    try:
      self._ray.get(actor.begin.remote(self._task))
    except self._ray.exceptions.RayTaskError as e:
      fault = e.cause
    except self._ray.exceptions.RayError as e:
      fault = InputError(f'data.readers: an actor of Ray died {TRIES} times while it started; the last: {why(e)}')
      with self._changed:
        if actor in self._actors and tries > 1 and self._ray.is_initialized():
          self._actors.discard(actor)
          return self._begin(tries - 1)
    with self._changed:
      if actor in self._actors:
        self._fault = self._fault or fault
        self._idle.append(actor)
        self._changed.notify_all()


class Reader:
  """The actor: one process, which reads a row at a time."""

  def begin(self, task: tuple[str, bytes, dict[str, str]]) -> None:
    """Raises InputError when samples of this host would not be those of the process that trains."""
    folder, load, theirs = task
    host, ours = socket.gethostname(), versions()
    for name, version in theirs.items():
      if ours[name] != version:
        raise InputError(f'data.readers: the host {host} has {name} {ours[name]}, this process {version}; samples may '
                         'differ: install the same versions on both')
    with contextlib.suppress(OSError):
      os.chdir(folder)
    try:
      self._load = pickle.loads(load)                # opens the files of rows
    except OSError as e:
      raise InputError(f'data.readers: the host {host} cannot open the data ({e}); rows and media must be at the same '
                       'paths there') from None

  def where(self) -> str:
    return f'process {os.getpid()} on {socket.gethostname()}'

  def load(self, i: int) -> tuple[None, Any]:
    """(when it is done, the sample): two objects, so that one can wait for the sample without fetching it."""
    return None, self._load(i)


def connect(count: int) -> Any:
  """Ray's module, connected: to the cluster that RAY_ADDRESS names (host:port, or auto: the one that runs on this
  machine), else to a new one of `count` CPUs, which ends with this process. Raises InputError."""
  try:
    import ray
  except ImportError as e:
    raise InputError("data.readers='ray' needs Ray, the extra `cluster`: pip install 'keye_jax[cluster]' "
                     f"({e}); data.readers='local' reads in processes of this machine") from None
  if ray.is_initialized():
    return ray
  address = os.environ.get('RAY_ADDRESS') or 'local'
  alone = {'num_cpus': count, 'include_dashboard': False} if address == 'local' else {}
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')          # it would tell its makers over the network
  with sigterm_kept():
    try:
      ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (OSError, RuntimeError, ValueError) as e:
      raise InputError(f'data.readers: no cluster of Ray at RAY_ADDRESS={address} for this host ({why(e)}); start one '
                       'with `ray start`, or unset it to have one on this machine') from None
  # On standard output, where a command's results go, Ray would print a paragraph for each actor that dies.
  ray._private.worker.print_to_stdstream = lambda *_, **__: None
  return ray


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
  """Puts back whoever handled SIGTERM before: Ray takes it, and a run saves on it (keye_jax.loop.Signals; with several
  processes jax.distributed, whose handler Python does not know)."""
  libc, kept, mine = ctypes.CDLL(None), ctypes.create_string_buffer(512), signal.getsignal(signal.SIGTERM)
  libc.sigaction(signal.SIGTERM, None, kept)         # 512 bytes hold a struct sigaction of any platform
  try:
    yield
  finally:
    if mine is not None and threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, mine)
    libc.sigaction(signal.SIGTERM, kept, None)


def versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in ALIKE}


def why(error: Exception) -> str:
  """The line of Ray's message that says something."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  told = [line.partition('Worker exit detail: ')[2] for line in lines if 'Worker exit detail: ' in line]
  return (told or lines[-1:] or [type(error).__name__])[0].partition(' Some common causes')[0][:300]
