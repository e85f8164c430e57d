"""A build on the processes of one machine, with the verbs of flow.py. Results come in the order of the items."""
import collections
import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipelines.errors import InputError


class Local:

  def __init__(self, pool: concurrent.futures.ProcessPoolExecutor | None, folder: str):
    self.pool, self.folder = pool, folder

  def create(self, items: Iterable) -> list:
    return list(items)

  def map(self, items: Iterable, step: Callable, *sides: Any) -> list:
    return [result for item in items for result in step(item, *sides)]

  def spread(self, items: list, step: Callable, *sides: Any) -> list:
    if not self.pool:
      return self.map(items, step, *sides)
    # Sides can be large: every process reads them once.
    file = tempfile.NamedTemporaryFile(dir=self.folder, delete=False)
    with file:
      pickle.dump(sides, file)
    try:
      return list(itertools.chain.from_iterable(self.pool.map(_call, items, itertools.repeat(step),
                                                              itertools.repeat(file.name))))
    except BrokenProcessPool:
      raise InputError('a worker process died, out of memory or by a crash in a decoder; run again to go on, with '
                       'fewer --workers or, to see where, with one') from None

  def group(self, items: Iterable[tuple]) -> list[tuple]:
    groups = collections.defaultdict(list)
    for key, value in items:
      groups[key].append(value)
    return list(groups.items())

  def gather(self, items: list, step: Callable) -> Any:
    return step(items)


def run(flow: Callable[[Local], list], workers: int) -> None:
  """Runs a flow on `workers` processes; in this one when that is 1."""
  with tempfile.TemporaryDirectory() as folder:
    if workers < 2:
      flow(Local(None, folder))
      return
    # Spawned, not forked: the caller may have threads of jax running.
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _end_with_parent) as pool:
      try:
        flow(Local(pool, folder))
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _call(item, step, file) -> list:
  return list(step(item, *_sides(file)))


@functools.lru_cache(2)
def _sides(file: str) -> tuple:
  with open(file, 'rb') as f:
    return pickle.load(f)


def _end_with_parent() -> None:
  """A worker whose parent is killed would wait for work for ever."""
  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)
  threading.Thread(target=wait, daemon=True).start()
