"""Held-out rows to prompts that share their clip, and to the questions that are scored.

A row that forks becomes one sample: its trunk (the clip) is read once, every branch ends where the assistant begins to
answer. A row that does not fork asks for its last assistant message.

T tokens of a sample, Q questions of a sample, B rows.
"""
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines import packing, pipeline, sources
from data_pipelines.errors import InputError
from data_pipelines.schema import Batch, Example
from keye_jax.evals.scores import Question, verdict


class Asked(NamedTuple):
  """One row of the file."""
  example: Example              # prompts only: the answers are cut out
  last_Q: tuple[int, ...]       # place of each question's last token
  questions: tuple[Question, ...]


class Group(NamedTuple):
  """Rows that are answered together."""
  batch: Batch
  last_BQ: np.ndarray           # int32, -1 where a row has fewer questions
  questions: tuple[Question, ...]    # row after row


def read(data, patch: int = 14, merge: int = 2) -> Iterator[Asked]:
  """Rows of `data.path` in file order; media are decoded as they come.

  Raises InputError at the first row that cannot be used: an evaluation must not shrink unseen.
  """
  load = pipeline.Load(data, patch, merge, strict=True)
  for i in range(len(load.rows)):
    row = load.rows[i]
    example, last_Q = prompts(load.example(i))
    yield Asked(example, last_Q, tuple(question(row, b) for b in range(max(len(row.branches), 1))))


def texts(path: str) -> list[Question]:
  """The questions of a file in order, without opening its media."""
  rows = sources.Rows(path)
  return [question(row, b) for row in map(rows.__getitem__, range(len(rows)))
          for b in range(max(len(row.branches), 1))]


def prompts(example: Example) -> tuple[Example, tuple[int, ...]]:
  """Cuts the answers out of a training sample: (sample of prompts, index of the last token of each).

  The answer of a branch is its last run of weighted targets, together with all that follows it.
  """
  branches = range(1, example.branch_T.max() + 1) if example.branch_T.any() else [0]
  keep_T, last = np.ones(len(example.token_T), bool), []
  for branch in branches:
    (place_N,) = np.nonzero(example.branch_T == branch)
    weight_N = example.weight_T[place_N] > 0
    if not weight_N.any():
      raise InputError(f'{example.source}: a question without an assistant message to compare an answer with')
    (start_N,) = np.nonzero(weight_N & ~np.concatenate([[False], weight_N[:-1]]))
    keep_T[place_N[start_N[-1] + 1:]] = False
    last.append(place_N[start_N[-1]])
  new_T = np.cumsum(keep_T) - 1
  cut = {name: getattr(example, name)[keep_T] for name in
         ('token_T', 'target_T', 'weight_T', 'position_T3', 'branch_T', 'vision_T')}
  cut['weight_T'] = np.zeros_like(cut['weight_T'])
  return example._replace(**cut), tuple(int(new_T[i]) for i in last)


def groups(rows: Iterable[Asked], size: int, tokens: int = 0, vision_patches: int = 0, merge: int = 2,
           values: int = packing.PATCH_VALUES) -> Iterator[Group]:
  """Groups of `size` rows, the last one filled with empty rows.

  A compilation costs more than padding, so shapes come in few sizes. tokens: length of a row where its sample fits,
  as in training. vision_patches: of a vision row, as in training; 0: whole frames up to about a thousand patches.
  """
  rows = iter(rows)
  while taken := list(itertools.islice(rows, size)):
    yield _group(taken, size, tokens, vision_patches, merge, values)


def round_up(n: int, least: int) -> int:
  """The smallest least * 2**k at or above n."""
  while least < n:
    least *= 2
  return least


def _group(rows: Sequence[Asked], size: int, tokens: int, vision_patches: int, merge: int, values: int) -> Group:
  frames = [packing.frame_runs(row.example) for row in rows]
  largest = max((patches for runs in frames for patches, _ in runs), default=0)
  N, R = 0, 0
  if largest:
    N = max(vision_patches, largest) if vision_patches else max(1024 // largest, 1) * largest
    N = -(-N // merge ** 2) * merge ** 2
  while any(packing.place(runs, [N] * R) is None for runs in frames):
    R = round_up(R + 1, 1)
  longest = max(len(row.example.token_T) for row in rows)
  shape = packing.Shape(tokens if longest <= tokens else round_up(longest, 64), R, N, merge, values)
  batch = packing.pack([row.example for row in rows], shape, together=False)
  batch = Batch(*(np.concatenate([a, np.zeros((size - len(rows), *a.shape[1:]), a.dtype)]) for a in batch))
  batch.vision_BT[len(rows):] = -1
  last_BQ = np.full((size, round_up(max(len(row.last_Q) for row in rows), 1)), -1, np.int32)
  for b, row in enumerate(rows):
    last_BQ[b, :len(row.last_Q)] = row.last_Q
  return Group(batch, last_BQ, tuple(q for row in rows for q in row.questions))


def question(row: sources.Row, branch: int) -> Question:
  """What branch `branch` of a row asks (0 when the row does not fork).

  In a row that forks, "type", "answer", "interval" and "others" are lists with an item for each branch. "answer": what
  counts of a message that gives reasons before it, "7 2.0, 3 4.5: before"."""
  turns = row.branches[branch] if row.branches else row.trunk
  text = lambda role: next((''.join(v for kind, v in t.parts if kind == 'text') for t in reversed(turns)
                            if t.role == role), '').strip()
  own = {key: row.extra.get(key) for key in ('type', 'answer', 'interval', 'others')}
  if row.branches:
    for key, value in own.items():
      if value is not None and (not isinstance(value, list) or len(value) != len(row.branches)):
        raise InputError(f'{row.source}: "{key}" must be a list with an item for each of {len(row.branches)} branches')
    own = {key: value and value[branch] for key, value in own.items()}
  pair = lambda v: (float(v[0]), float(v[1]))
  try:
    interval = pair(own['interval']) if own['interval'] else None
    others = tuple(map(pair, own['others'] or ()))
    seconds = float(row.extra.get('seconds', 0))
  except (TypeError, ValueError, IndexError) as e:
    raise InputError(f'{row.source}: "interval" is [start, end], "others" a list of such, "seconds" a number ({e})'
                     ) from None
  if interval and not interval[0] < interval[1]:
    raise InputError(f'{row.source}: the interval {list(interval)} has no length')
  clip = str(row.extra.get('clip', row.extra.get('id', row.source)))
  message = text('assistant')
  expected = own['answer'] if verdict(message) == own['answer'] else message
  return Question(clip, own['type'] or 'answer', re.sub(r'\s+', ' ', text('user')), expected, interval, others, seconds)
