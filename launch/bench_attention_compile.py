"""Compiles the programs that `keye bench attention` times, from shapes alone, several at a time."""
import concurrent.futures
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from launch import bench_attention_parts as parts
from launch import bench_attention_settings as settings
from launch.bench_attention_parts import Shape
from launch.bench_attention_settings import Cell, Setting

Made = dict[tuple, Callable | str]          # a program, or why there is none
SHARE = 0.4            # of the time that is left, after which what is not compiled is given up
LATE = 'it was not compiled in time'


def key(cell: Cell, name: str) -> tuple:
  """Of a program: one for all u."""
  return cell.phase, cell.direction, cell.tokens, cell.batch, name


def compiled(shape: Shape, cells: Sequence[Cell], setting: Setting, say: Callable[[str], None],
             until: float = float('inf'), have: Mapping = {}) -> Made:
  """The programs of the cells, in their order, but for those we have. One that fails is its error, and so is one that
  is not done when SHARE of the time until `until` (on the monotonic clock) has passed."""
  found: Made = {}
  pool = concurrent.futures.ThreadPoolExecutor(max(setting.workers, 1))
  started = time.monotonic()
  end, waiting = started + SHARE * (until - started), {}
  for cell in cells:
    for name in settings.parts(setting, cell):
      if (k := key(cell, name)) in {**have, **found, **waiting}:
        continue
      if time.monotonic() > end:
        found[k] = LATE
        continue
      try:                       # tracing is Python and does not gain from threads
        fn = parts.programs(shape, *cell[:2])[name]
        waiting[k] = pool.submit(jax.jit(fn).lower(*shapes(shape, cell, setting)).compile)
      except Exception as e:     # whatever a compiler says is the result of its rows
        found[k] = first_lines(e)
  concurrent.futures.wait(waiting.values(), None if end == float('inf') else max(end - time.monotonic(), 0))
  pool.shutdown(wait=False, cancel_futures=True)
  for k, future in waiting.items():
    found[k] = outcome(future)
  if setting.workers:
    say(f'{len(found)} programs compiled in {time.monotonic() - started:.0f} s')
  return found


def outcome(future: concurrent.futures.Future) -> Callable | str:
  if future.cancelled() or not future.done():
    return LATE
  return first_lines(future.exception()) if future.exception() else future.result()


def first_lines(error: BaseException) -> str:
  """The error in one line: a compiler appends its whole allocation table."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return f'{type(error).__name__}: {" ".join(lines[:3])}'[:300]


def shapes(shape: Shape, cell: Cell, setting: Setting) -> tuple:
  """Shapes of `parts.arguments`, for which nothing is computed."""
  at_T = jnp.zeros(1 if cell.phase == 'decode' else cell.tokens // setting.share, jnp.int32)

  def make():
    x = parts.draw(shape, cell.tokens, cell.batch, at_T, setting.dtype, 0)[0]
    return parts.arguments(parts.prepare(shape, cell, settings.parts(setting, cell), x), cell.direction)

  return jax.eval_shape(make)
