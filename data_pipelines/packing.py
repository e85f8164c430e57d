"""Samples into rows of a fixed shape: T tokens and R vision rows of N patches.

Several samples share a row and do not see each other (their segment ids differ). A sample is never cut: one that does
not fit an empty row is refused with a reason. A frame never crosses a vision row.

Letters: B rows, T tokens, R vision rows, N patches a vision row, P patches of a sample, F frames of a sample, M merged
vision tokens of a sample.
"""
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.schema import BRANCH_BITS, Batch, Example

PATCH_VALUES = 588        # of one patch, 3 * 14 * 14


class Shape(NamedTuple):
  """Static shape of a packed row."""
  tokens: int               # T
  vision_rows: int          # R
  vision_patches: int       # N
  merge: int = 2
  values: int = PATCH_VALUES  # C
  samples: int = 0          # at most; 0: as many as fit


class Bin:
  """One row being filled: which samples (by index), and where the frames of each lie."""

  def __init__(self, shape: Shape):
    self.tokens, self.most = shape.tokens, shape.samples         # free; most samples
    self.rows = [shape.vision_patches] * shape.vision_rows       # free patches of each vision row
    self.items: list[tuple[int, list]] = []                      # (sample, runs); see `place`

  def add(self, item: int, tokens: int, frames: list[tuple[int, int]]) -> bool:
    """Adds a sample if it fits; `frames` from `frame_runs`."""
    if tokens > self.tokens or (self.most and len(self.items) == self.most):
      return False
    placed = place(frames, self.rows)
    if placed is None:
      return False
    runs, self.rows = placed
    self.tokens -= tokens
    self.items.append((item, runs))
    return True


def frame_runs(example: Example) -> list[tuple[int, int]]:
  """[(patches of a frame, how many such frames follow each other)]."""
  if not len(example.frame_P):
    return []
  sizes = np.bincount(example.frame_P)[1:]
  edges = np.flatnonzero(np.diff(sizes)) + 1
  counts = np.diff(np.concatenate([[0], edges, [len(sizes)]]))
  return [(int(sizes[at]), int(n)) for at, n in zip(np.concatenate([[0], edges]), counts)]


def place(frames: list[tuple[int, int]], free: list[int]) -> tuple[list[tuple[int, int, int]], list[int]] | None:
  """First fit of frames into vision rows: ([(vision row, patches of a frame, frames)], free afterwards) or None."""
  free, runs = list(free), []
  for size, count in frames:
    for row, room in enumerate(free):
      if n := min(count, room // size):
        runs.append((row, size, n))
        free[row] -= n * size
        count -= n
      if not count:
        break
    if count:
      return None
  return runs, free


def spread(items: list[tuple[int, list]], shape: Shape) -> list[tuple[int, list]]:
  """The frames of a filled row laid over its vision rows by patch count, the largest first, each where most is free
  (LPT, Graham 1969), so that devices that share the row see about as much; as they were where that does not fit."""
  free = [(-shape.vision_patches, row) for row in range(shape.vision_rows)]
  laid = [[] for _ in items]
  for size, at, part, n in sorted(((size, at, part, n) for at, (_, runs) in enumerate(items) for part, (size, n)
                                   in enumerate(_merged(runs))), key=lambda run: (-run[0], *run[1:])):
    counts = [0] * shape.vision_rows
    for _ in range(n):
      room, row = free[0]
      if -room < size:
        return items
      heapq.heapreplace(free, (room + size, row))
      counts[row] += 1
    laid[at].append((part, [(row, size, count) for row, count in enumerate(counts) if count]))
  return [(item, [run for _, runs in sorted(parts) for run in runs]) for (item, _), parts in zip(items, laid)]


def _merged(runs: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
  """[(patches of a frame, frames)], as in `frame_runs`, of runs over vision rows."""
  return [(size, sum(n for _, _, n in same)) for size, same in itertools.groupby(runs, key=lambda run: run[1])]


def misfit(example: Example, shape: Shape) -> str:
  """Why a sample does not fit an empty row, or ''."""
  tokens = len(example.token_T)
  if tokens > shape.tokens:
    return f'{tokens} tokens do not fit a row of {shape.tokens}'
  if place(frame_runs(example), [shape.vision_patches] * shape.vision_rows) is None:
    return (f'{len(example.frame_P)} patches in frames of {sorted({s for s, _ in frame_runs(example)})} do not fit '
            f'{shape.vision_rows} vision row(s) of {shape.vision_patches}')
  return ''


def plan(examples: Sequence[Example], shape: Shape, together: bool = True) -> list[Bin]:
  """First-fit-decreasing over the given samples, each of which must fit an empty row.

  Rows come in the order of the earliest sample they hold, so that the order of a shuffled stream stays shuffled.
  `together=False`: one sample a row, in order.
  """
  sizes = [(len(e.token_T), frame_runs(e)) for e in examples]
  return fill(sizes, shape, together, lambda i: f'{examples[i].source}: {misfit(examples[i], shape)}')


def fill(sizes: Sequence[tuple[int, list[tuple[int, int]]]], shape: Shape, together: bool,
         why: Callable[[int], str]) -> list[Bin]:
  """`plan` of samples by their (tokens, frames as in `frame_runs`). why: what to say of a sample that does not fit an
  empty row."""
  room = max(shape.vision_rows * shape.vision_patches, 1)
  weight = [max(t / shape.tokens, sum(s * n for s, n in f) / room) for t, f in sizes]
  order = sorted(range(len(sizes)), key=lambda i: -weight[i]) if together else range(len(sizes))
  bins: list[Bin] = []
  for i in order:
    if not (together and any(b.add(i, *sizes[i]) for b in bins)):
      bins.append(Bin(shape))
      if not bins[-1].add(i, *sizes[i]):
        raise InputError(why(i))
  for b in bins:
    b.items = spread(sorted(b.items), shape)
  return sorted(bins, key=lambda b: b.items[0][0])


def collate(rows: Sequence[tuple[Bin, Sequence[Example]]], shape: Shape,
            origin: Callable[[Example], int] = lambda example: 0) -> Batch:
  """Filled rows to one batch; each row is a bin and the list that its sample indices point into. origin: the source of
  a mixture that a sample is of."""
  B, T, R, N, C = len(rows), shape.tokens, shape.vision_rows, shape.vision_patches, shape.values
  group = shape.merge ** 2
  if N % group:
    raise InputError(f'data.vision_patches={N} is not a multiple of merge**2={group}')
  token_BT, target_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  weight_BT, position_BT3 = np.zeros((B, T), np.float32), np.zeros((B, T, 3), np.int32)
  segment_BT, vision_BT = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
  patch_BRNC, coord_BRN4 = np.zeros((B, R, N, C), np.uint8), np.zeros((B, R, N, 4), np.int32)
  frame_BRN, origin_BT = np.zeros((B, R, N), np.int32), np.zeros((B, T), np.int32)
  for b, (bin_, examples) in enumerate(rows):
    at, used, frames = 0, [0] * R, [0] * R           # tokens, patches and frames so far
    for sample, (item, runs) in enumerate(bin_.items, 1):
      e = examples[item]
      to = slice(at, at + len(e.token_T))
      at = to.stop
      token_BT[b, to], target_BT[b, to], weight_BT[b, to] = e.token_T, e.target_T, e.weight_T
      position_BT3[b, to] = e.position_T3
      segment_BT[b, to], origin_BT[b, to] = (sample << BRANCH_BITS) | e.branch_T, origin(e)
      merged, start = [], 0
      for row, size, n in runs:
        dst, src = slice(used[row], used[row] + n * size), slice(start, start + n * size)
        patch_BRNC[b, row, dst], coord_BRN4[b, row, dst] = e.patch_PC[src], e.coord_P4[src]
        frame_BRN[b, row, dst] = frames[row] + np.repeat(np.arange(1, n + 1), size)
        merged.append(np.arange((row * N + dst.start) // group, (row * N + dst.stop) // group))
        used[row], frames[row], start = dst.stop, frames[row] + n, src.stop
      if merged:
        place_M = np.concatenate(merged)
        vision_BT[b, to] = np.where(e.vision_T < 0, -1, place_M[e.vision_T])
  order_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
  return Batch(token_BT, target_BT, weight_BT, position_BT3, segment_BT, order_BT, vision_BT, patch_BRNC, coord_BRN4,
               frame_BRN, origin_BT)


def pack(examples: Sequence[Example], shape: Shape, together: bool = True) -> Batch:
  """Samples to a batch of as many rows as they need. Raises InputError for one that does not fit an empty row."""
  return collate([(b, examples) for b in plan(examples, shape, together)], shape)
