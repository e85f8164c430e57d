"""Several processes, one end: when one of them cannot go on, all end, each with one line that says where and why.

Without this the others would wait in a collective for the one that is gone: on CPUs until its connection breaks, on
TPUs and GPUs until jax.distributed misses its heartbeat (100 s), and then end with a trace of somebody else's error. A
process that fails, or finds another one gone, leaves its message with the coordinator, which is process 0; the others
look there every second. Process 0 leaves last, since the coordinator goes with it: jax.distributed aborts whoever finds
it gone. When process 0 is killed that still happens, and `end_aborts_in_words` has the last word.
"""
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its key-value store has no public name; Orbax goes the same way
from jax.experimental import multihost_utils

from data_pipelines import streams
from data_pipelines.errors import InputError

LOST = 75                # EX_TEMPFAIL: a process of the run is gone; the same command goes on from the last checkpoint
LOOK_SECONDS = 1.0
FAILED, SEEN, LEFT = 'keye/failed', 'keye/seen', 'keye/left'
AGAIN = 'is gone; run the same command again on all'
_ending = threading.Lock()         # held by the thread that ends the process: the first reason is the one told
_kept: list[Any] = []              # what C calls is not collected
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
    if other_end_gone(e):
      time.sleep(3 * LOOK_SECONDS)     # the watcher says why, if the other process could
      _leave_together(client, me, count, FAILED, LOST, f'another process of the run {AGAIN}', where, gone=1)
    code, line = LOST if isinstance(e, streams.Stuck) else 2, str(e)
    if not isinstance(e, InputError):
      traceback.print_exc()
      code, line = 1, f'{type(e).__name__}: {" ".join(str(e).split())[:500]}'
  _leave_together(client, me, count, FAILED, code, line, where)


def end_aborts_in_words(name: str) -> None:
  """From now on this process, one of several, ends with a line and LOST when it is aborted. name: of the command.

  jax.distributed aborts, from a thread of its own, when the processes do not come together and when the coordinator or
  a heartbeat is gone (xla's coordination/client.h). A function passed to its client ends in std::bad_cast, and Python's
  own signal handlers run in the main thread after the signal's, which is too late.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: _aborted(name))
  _kept.append(handler)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def _aborted(name: str) -> NoReturn:
  state = distributed.global_state
  host, _, port = state.coordinator_address.rpartition(':')
  try:
    socket.create_connection((host, int(port)), timeout=LOOK_SECONDS).close()
    who = f'aborted, the reason is above; most likely another process of the run {AGAIN}'
  except OSError:
    who = f'process 0 {AGAIN}'
  _leave(LOST, f'keye {name}: process {state.process_id} of {state.num_processes}: {who}')


def other_end_gone(error: Exception) -> bool:
  """Also where a save failed of it, which is told as wrong input with the error as its cause.

  jaxlib raises a failed collective as RuntimeError where the program is called and as ValueError where its result is
  read first.
  """
  error = error.__cause__ if isinstance(error, InputError) else error
  return isinstance(error, RuntimeError | OSError | ValueError) and bool(_GONE.search(str(error)))


def _watch(name: str, client, me: int, count: int, done: threading.Event) -> None:
  """Ends this process when another one has said that it cannot go on."""
  while not done.wait(LOOK_SECONDS):
    try:
      failed = {int(key.rpartition('/')[2]): value for key, value in client.key_value_dir_get(FAILED)}
    except Exception:
      continue               # the coordinator is gone, and jax.distributed about to abort
    if me in failed or not failed:
      continue
    other, said = min(failed.items())
    code, gone, line = said.split(' ', 2)
    _leave_together(client, me, count, SEEN, int(code), f'ended with process {other}: {line}',
                    f'keye {name}: process {me} of {count}', int(gone))


def _leave_together(client, me: int, count: int, key: str, code: int, line: str, where: str, gone: int = 0) -> NoReturn:
  """Ends the process when all but `gone` know why, process 0 when they have left."""
  _say(f'{where}: {line}')
  try:
    client.key_value_set(f'{key}/{me}', f'{code} {gone} {line}')
    _wait(client, (FAILED, SEEN), count - gone)
    if me == 0:
      _wait(client, (LEFT,), count - gone - 1)
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
  """Also where nobody reads stderr any more: whoever says why it ends must end."""
  _ending.acquire()
  with contextlib.suppress(OSError):
    print(line, file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
  """Without waiting for anybody: shutting jax.distributed down would, for the processes that are gone."""
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  os._exit(code)
