"""Several processes, one end: when one of them cannot go on, all end, each with one line that says where and why.

Without this the others would wait in a collective for the one that is gone: on CPUs until its connection breaks, on
TPUs and GPUs until jax.distributed misses its heartbeat (100 s), and then end with a trace of somebody else's error. A
process that fails leaves its message with the coordinator, which is process 0; the others look there every second.
Process 0 leaves last: jax.distributed aborts every process that finds the coordinator gone.
"""
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from jax._src import distributed  # its key-value store has no public name; Orbax goes the same way
from jax.experimental import multihost_utils

from data_pipelines import streams
from data_pipelines.errors import InputError

LOST = 75                # EX_TEMPFAIL: a process of the run is gone; the same command goes on from the last checkpoint
LOOK_SECONDS = 1.0
FAILED, SEEN, LEFT = 'keye/failed', 'keye/seen', 'keye/left'
_ending = threading.Lock()         # held by the thread that ends the process: the first reason is the one told
# What a collective says when its other end is gone: gloo, NCCL, gRPC.
_GONE = re.compile(r'gloo|Connection (closed|reset|refused)|Socket closed|connection error|UNAVAILABLE|Broken pipe'
                   r'|DEADLINE_EXCEEDED|NCCL|heartbeat|coordination service|barrier', re.I)


def run(name: str, work: Callable[[], int]) -> int:
  """`work()`, the body of command `name`; returns its exit code.

  With several processes an exception of any of them ends all: exit code 2 for wrong input, LOST where another process
  is gone, 1 for a bug. With one process exceptions pass through, but for data that hang (LOST: their threads could not
  be ended by anything but the end of the process).
  """
  if jax.process_count() == 1:
    try:
      return work()
    except streams.Stuck as e:
      _leave(LOST, f'keye {name}: {e}')
  client, count, me = distributed.global_state.client, jax.process_count(), jax.process_index()
  where = f'keye {name}: process {me} of {count}'
  done = threading.Event()
  threading.Thread(target=_watch, args=(name, client, me, count, done), daemon=True, name='together').start()
  try:
    result = work()
    multihost_utils.sync_global_devices('end')       # nobody leaves while another may still fail
    done.set()
    return result
  except KeyboardInterrupt:
    code, line = 130, 'interrupted'
  except Exception as e:
    if _other_end_gone(e):
      time.sleep(3 * LOOK_SECONDS)     # the watcher says why, if the other process could
      _leave(LOST, f'{where}: another process of the run is gone; run the same command again on all')
    code, line = LOST if isinstance(e, streams.Stuck) else 2, str(e)
    if not isinstance(e, InputError):
      traceback.print_exc()
      code, line = 1, f'{type(e).__name__}: {" ".join(str(e).split())[:500]}'
  _leave_together(client, me, count, FAILED, f'{code} {line}', code, f'{where}: {line}')


def _other_end_gone(error: Exception) -> bool:
  """Also where a save failed of it, which is told as wrong input with the error as its cause."""
  error = error.__cause__ if isinstance(error, InputError) else error
  return isinstance(error, RuntimeError | OSError) and bool(_GONE.search(str(error)))


def _watch(name: str, client, me: int, count: int, done: threading.Event) -> None:
  """Ends this process when another one has failed, or the coordinator is gone."""
  misses = 0
  while not done.wait(LOOK_SECONDS):
    try:
      failed = {int(key.rpartition('/')[2]): value for key, value in client.key_value_dir_get(FAILED)}
      misses = 0
    except Exception:
      misses += 1
      if misses == 3 and not done.is_set():
        _leave(LOST, f'keye {name}: process {me} of {count}: process 0 is gone; run the same command again on all')
      continue
    if me in failed or not failed:
      continue
    other, said = min(failed.items())
    code, _, line = said.partition(' ')
    _leave_together(client, me, count, SEEN, '', int(code),
                    f'keye {name}: process {me} of {count}: ended with process {other}: {line}')


def _leave_together(client, me: int, count: int, key: str, said: str, code: int, line: str) -> NoReturn:
  """Ends the process when all know why (`said`, under `key`), process 0 when the others have left."""
  _say(line)
  try:
    client.key_value_set(f'{key}/{me}', said)
    _wait(client, (FAILED, SEEN), count)
    if me == 0:
      _wait(client, (LEFT,), count - 1)
      time.sleep(LOOK_SECONDS)
    else:
      client.key_value_set(f'{LEFT}/{me}', '')
  except Exception:
    pass                   # the coordinator is gone: nobody to tell
  _exit(code)


def _wait(client, keys: tuple[str, ...], count: int) -> None:
  """Until `count` processes have set one of the keys, or 10 looks are over."""
  deadline = time.monotonic() + 10 * LOOK_SECONDS
  while time.monotonic() < deadline:
    if len({name.rpartition('/')[2] for key in keys for name, _ in client.key_value_dir_get(key)}) >= count:
      return
    time.sleep(LOOK_SECONDS / 4)


def _leave(code: int, line: str) -> NoReturn:
  _say(line)
  _exit(code)


def _say(line: str) -> None:
  _ending.acquire()
  print(line, file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
  """Without waiting for anybody: shutting jax.distributed down would, for the processes that are gone."""
  sys.stdout.flush()
  os._exit(code)
