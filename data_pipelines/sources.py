"""Datasets on disk: one JSONL file, a row a conversation, media paths relative to the file.

    {"id": "a1", "videos": ["v/a1.mp4"], "images": [], "messages": [{"role": "user", "content": "<video>What ...?"},
     {"role": "assistant", "content": "..."}], ...}

`<video>` and `<image>` in user content take the next of "videos" and "images". With "branches": [[messages], ...] each
branch continues "messages" on its own (several questions about one clip); when the row has branches, "messages" comes
first in the order of media. Any other key rides along untouched for evaluation; in a row with branches, a list as long
as the branches holds one item for each.
"""
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipelines import chat
from data_pipelines.errors import InputError


class BadRow(InputError):
  """A row that cannot be used. `reason` is a short class of fault to count by; the message names file and row."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason

  def __reduce__(self):
    return BadRow, (self.reason, str(self))


class Row(NamedTuple):
  """A validated row. Media in the turns are absolute paths."""
  source: str                             # file:line, lines from 1
  trunk: list[chat.Turn]
  branches: list[list[chat.Turn]]         # empty when the row does not fork
  extra: dict[str, Any]                   # every key that is not part of the conversation


class Rows:
  """Random access to the rows of a JSONL file: `len(rows)`, `rows[i]`. Blank lines are not rows.

  The file is scanned for line starts once and read by offset afterwards; safe to share between threads, picklable.
  Raises InputError when the file is missing or holds no row; `rows[i]` raises BadRow.
  """

  def __init__(self, path: str | os.PathLike):
    if not str(path):
      raise InputError('data.path is empty: name a JSONL file with one conversation a row')
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise InputError(f'{self.path}: no such file; give a JSONL file with one conversation a row')
    self._open()
    starts, ends, lines, at = [], [], [], 0
    with open(self.path, 'rb') as f:
      for number, line in enumerate(f, 1):
        if line.strip():
          starts.append(at)
          ends.append(at + len(line))
          lines.append(number)
        at += len(line)
    if not starts:
      raise InputError(f'{self.path}: the file has no rows')
    self._start, self._end, self._line = (np.asarray(x, np.int64) for x in (starts, ends, lines))

  def _open(self):
    self._file = open(self.path, 'rb')
    self._lock = threading.Lock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('_file', '_lock')}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return len(self._start)

  def where(self, i: int) -> str:
    """'file:line' of row i."""
    return f'{self.path}:{self._line[i]}'

  def raw(self, i: int) -> dict:
    """The JSON object of row i. Raises BadRow when it is none."""
    with self._lock:
      self._file.seek(self._start[i])
      line = self._file.read(self._end[i] - self._start[i])
    try:
      value = json.loads(line)
    except ValueError as e:
      raise BadRow('bad JSON', f'{self.where(i)}: not valid JSON ({e})') from None
    if not isinstance(value, dict):
      raise BadRow('bad JSON', f'{self.where(i)}: a row must be a JSON object, not {type(value).__name__}')
    return value

  def __getitem__(self, i: int) -> Row:
    return parse(self.raw(i), self.where(i), self.path.parent)


def parse(row: dict, where: str, folder: pathlib.Path) -> Row:
  """Checks a row and resolves its media. Raises BadRow naming `where`."""
  media = {}
  for key in ('images', 'videos'):
    names = row.get(key, [])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
      raise BadRow('bad row', f'{where}: "{key}" must be a list of paths')
    media[key] = [str(folder / n) for n in names]
    for name, path in zip(names, media[key]):
      if not os.path.isfile(path):
        raise BadRow('missing media', f'{where}: {key[:-1]} {name!r} does not exist in {folder}')
  if 'messages' not in row:
    raise BadRow('bad row', f'{where}: no "messages"')
  branches = row.get('branches', [])
  if not isinstance(branches, list):
    raise BadRow('bad row', f'{where}: "branches" must be a list of lists of messages')
  iters = iter(media['images']), iter(media['videos'])
  try:
    trunk = chat.turns(row['messages'], where=where, media=iters)
    forks = [chat.turns(b, where=f'{where}: branch {i}', media=iters) for i, b in enumerate(branches)]
    chat.check_used(*iters, where)
  except InputError as e:
    raise BadRow('bad messages', str(e)) from None
  if not any(turn.role == 'assistant' for turns in [trunk, *forks] for turn in turns):
    raise BadRow('bad messages', f'{where}: no assistant message, so nothing to learn or to compare with')
  if not all(forks):
    raise BadRow('bad messages', f'{where}: a branch is empty')
  extra = {k: v for k, v in row.items() if k not in ('messages', 'branches', 'images', 'videos')}
  return Row(where, trunk, forks, extra)


def check(path: str | os.PathLike) -> int:
  """Reads every row; returns how many there are. Raises BadRow at the first that cannot be used."""
  rows = Rows(path)
  for i in range(len(rows)):
    rows[i]
  return len(rows)


def texts(path: str | os.PathLike) -> Iterator[str]:
  """Every text of the conversations of a file, for training a vocabulary. Raises BadRow as `rows[i]` does."""
  rows = Rows(path)
  for i in range(len(rows)):
    row = rows[i]
    for turn in [*row.trunk, *(turn for branch in row.branches for turn in branch)]:
      yield from (value for kind, value in turn.parts if kind == 'text')


def fingerprint(path: str | os.PathLike) -> str:
  """Hash of the JSONL file's bytes and of the size of every medium that it names; no dates, no absolute paths, so a
  copy of the dataset has the same one."""
  rows, digest = Rows(path), xxhash.xxh3_128(pathlib.Path(path).read_bytes())
  for i in range(len(rows)):
    try:
      row = rows.raw(i)
    except BadRow:
      continue            # its bytes are in the hash already
    for key in ('images', 'videos'):
      names = row.get(key)
      for name in names if isinstance(names, list) else []:
        file = rows.path.parent / str(name)
        digest.update(f'{key}\0{name}\0{file.stat().st_size if file.is_file() else -1}\n'.encode())
  return digest.hexdigest()
