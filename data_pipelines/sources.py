"""Datasets on disk: one file, a row a conversation, media paths relative to the file.

    {"id": "a1", "videos": ["v/a1.mp4"], "images": [], "messages": [{"role": "user", "content": "<video>What ...?"},
     {"role": "assistant", "content": "..."}], ...}

`<video>` and `<image>` in user content take the next of "videos" and "images". With "branches": [[messages], ...] each
branch continues "messages" on its own (several questions about one clip); when the row has branches, "messages" comes
first in the order of media. Any other key rides along untouched for evaluation; in a row with branches, a list as long
as the branches holds one item for each. Rows in other forms (data_pipelines/forms.py) are turned into this one.
"""
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import xxhash

from data_pipelines import chat, forms, tables
from data_pipelines.errors import InputError


class BadRow(InputError):
  """A row that cannot be used. `reason` is a short class of fault to count by; the message names file and row."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason

  def __reduce__(self):
    return BadRow, (self.reason, str(self))


class Row(NamedTuple):
  """A validated row. Media in the turns are paths, or bytes of pictures that lie in the row."""
  source: str                             # file:number, see Rows.where
  trunk: list[chat.Turn]
  branches: list[list[chat.Turn]]         # empty when the row does not fork
  extra: dict[str, Any]                   # every key that is not part of the conversation


class Rows:
  """Random access to the rows of a file: `len(rows)`, `rows[i]`. JSONL, a JSON array, parquet or Arrow.

  Safe to share between threads, picklable. Raises InputError when the file is missing, is not of such a kind or holds
  no row; `rows[i]` raises BadRow.
  """

  def __init__(self, path: str | os.PathLike):
    if not str(path):
      raise InputError('data.path is empty: name a file with one conversation a row (JSONL, JSON, parquet or Arrow)')
    self.path = pathlib.Path(path)
    self._reader = tables.open_rows(self.path)

  def __len__(self) -> int:
    return len(self._reader)

  def where(self, i: int) -> str:
    """'file:number' of row i, the line of a JSONL file, else the number of the row, from 1."""
    return f'{self.path}:{self._reader.number(i)}'

  def raw(self, i: int) -> dict:
    """Row i as it stands in the file. Raises BadRow when it is no object."""
    try:
      value = self._reader.raw(i)
    except ValueError as e:
      raise BadRow('bad JSON', f'{self.where(i)}: not valid JSON or a damaged part of a table ({e})') from None
    if not isinstance(value, dict):
      raise BadRow('bad JSON', f'{self.where(i)}: a row must be a JSON object, not {type(value).__name__}')
    return value

  def __getitem__(self, i: int) -> Row:
    return parse(self.raw(i), self.where(i), self.path.parent)


def parse(raw: dict, where: str, folder: pathlib.Path) -> Row:
  """Checks a row of any form and resolves its media. Raises BadRow naming `where`."""
  try:
    row = forms.own(raw, where)
  except InputError as e:
    raise BadRow('bad row', str(e)) from None
  media = {kind: [_found(m, kind, where, folder) for m in row[f'{kind}s']] for kind in forms.MEDIA}
  branches = row.get('branches', [])
  for message in (m for messages in (row['messages'], *branches) for m in messages):
    for part in message['content'] if isinstance(message.get('content'), list) else []:
      if (kind := part['type']) in part and kind != 'text':
        part[kind] = _found(part[kind], kind, where, folder)
  iters = iter(media['image']), iter(media['video'])
  try:
    trunk = chat.turns(row['messages'], where=where, media=iters)
    forks = [chat.turns(b, where=f'{where}: branch {i}', media=iters) for i, b in enumerate(branches)]
    chat.check_used(*iters, where)
  except InputError as e:
    raise BadRow('bad messages', str(e)) from None
  said = [turn for turns in (trunk, *forks) for turn in turns]
  if not any(turn.role == 'assistant' for turn in said):
    raise BadRow('bad messages', f'{where}: no assistant message, nor "completion", "solution", "timestamp" or '
                                 '"reward_model.ground_truth" to make one of: nothing to learn or to compare with')
  if not all(forks):
    raise BadRow('bad messages', f'{where}: a branch is empty')
  for text in (value for turn in said for kind, value in turn.parts if kind == 'text'):
    if not text.isascii() and any('\ud800' <= c <= '\udfff' for c in text):
      raise BadRow('bad messages', f'{where}: {text[:40]!r} holds half a character (a lone surrogate); write it again')
  extra = {k: v for k, v in row.items() if k not in ('messages', 'branches', 'images', 'videos')}
  return Row(where, trunk, forks, extra)


def _found(medium: str | bytes, kind: str, where: str, folder: pathlib.Path) -> str | bytes:
  if isinstance(medium, bytes):
    return medium
  if '\0' in medium or not os.path.isfile(folder / medium):
    raise BadRow('missing media', f'{where}: {kind} {medium!r} does not exist in {folder}')
  return str(folder / medium)


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
  """Hash of the file's bytes and of the size of every medium that it names; no dates, no absolute paths, so a copy of
  the dataset has the same one."""
  rows, digest = Rows(path), xxhash.xxh3_128()
  for chunk in tables.read_chunks(path):
    digest.update(chunk)
  for i in range(len(rows)):
    try:
      row = forms.own(rows.raw(i), rows.where(i))
    except InputError:
      continue            # its bytes are in the hash already
    parts = [part for messages in (row['messages'], *row.get('branches', [])) for message in messages
             if isinstance(message.get('content'), list) for part in message['content']]
    for kind in forms.MEDIA:
      for name in [*row[f'{kind}s'], *(part[kind] for part in parts if part['type'] == kind and kind in part)]:
        if isinstance(name, str):
          file = rows.path.parent / name
          digest.update(f'{kind}s\0{name}\0{file.stat().st_size if file.is_file() else -1}\n'.encode(
              errors='surrogatepass'))
  return digest.hexdigest()
