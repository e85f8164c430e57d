"""Several processes, one end: when one of them cannot go on, all end, each with one line that says where and why.

Without this the others would wait in a collective for the one that is gone: on CPUs until its connection breaks, on
TPUs and GPUs until jax.distributed misses its heartbeat (100 s), and then end with a trace of somebody else's error. A
process that fails leaves its message with the coordinator, which is process 0; the others look there every second.
"""
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
from jax._src import distributed  # its key-value store has no public name; Orbax goes the same way
from jax.experimental import multihost_utils

from data_pipelines import streams
from data_pipelines.errors import InputError

LOST = 75                # EX_TEMPFAIL: a process of the run is gone; the same command goes on from the last checkpoint
LOOK_SECONDS = 1.0
FAILED, SEEN = 'keye/failed', 'keye/seen'
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
      return _leave(LOST, f'keye {name}: {e}')
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
      return _leave(LOST, f'{where}: another process of the run is gone; run the same command again on all')
    code, line = LOST if isinstance(e, streams.Stuck) else 2, str(e)
    if not isinstance(e, InputError):
      traceback.print_exc()
      code, line = 1, f'{type(e).__name__}: {" ".join(str(e).split())[:500]}'
  _tell(client, me, count, f'{code} {line}')
  return _leave(code, f'{where}: {line}')


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
    try:
      client.key_value_set(f'{SEEN}/{me}', '')
    except Exception:
      pass
    _leave(int(code), f'keye {name}: process {me} of {count}: ended with process {other}: {line}')


def _tell(client, me: int, count: int, said: str) -> None:
  """Leaves the message, and waits for the others to read it: with process 0 the coordinator ends too."""
  try:
    client.key_value_set(f'{FAILED}/{me}', said)
    deadline = time.monotonic() + 10 * LOOK_SECONDS
    while time.monotonic() < deadline:
      time.sleep(LOOK_SECONDS / 4)
      done = {key.rpartition('/')[2] for kind in (SEEN, FAILED) for key, _ in client.key_value_dir_get(kind)}
      if len(done) >= count:
        return
  except Exception:
    pass                   # the coordinator is gone: nobody to tell


def _leave(code: int, line: str):
  """Ends the process without waiting for anybody: shutting jax.distributed down would, for the processes that are
  gone."""
  print(line, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)
