"""Files of rows with random access: JSONL, JSON arrays, parquet, Arrow. Rows come out as plain dicts.

A reader has `len(reader)`, `reader.raw(i)` and `reader.number(i)`: the line of a JSONL file, else the number of the
row, both from 1. Readers may be shared between threads and pickled; a copy opens the file again.
"""
import collections
import json
import os
import pathlib
import re
import threading

import numpy as np

from data_pipelines.errors import InputError

KEEP_BYTES = 512 << 20        # of decoded row groups of a parquet file that stay in memory
_BLANK = re.compile(r'[ \t\n\r]*')


def open_rows(path: pathlib.Path) -> 'Lines | Table':
  """The reader for a file. What it is, is told by its first bytes; `.json` is an array, other text is JSONL.

  Raises InputError naming the file when it is missing, not readable or holds no row.
  """
  if path.is_dir():
    raise InputError(f'{path}: a folder; name one file of rows: JSONL, JSON, parquet or Arrow')
  if not path.is_file():
    raise InputError(f'{path}: no such file; give a file with one conversation a row: JSONL, JSON, parquet or Arrow')
  with open(path, 'rb') as f:
    head = f.read(6)
  is_table = head.startswith((b'PAR1', b'ARROW1', b'\xff\xff\xff\xff'))       # the last begins an Arrow stream
  reader = Table(path, head.startswith(b'PAR1')) if is_table else Lines(path)
  if not len(reader):
    raise InputError(f'{path}: the file has no rows')
  return reader


class Lines:
  """Rows of JSON text, read by offset. The file is scanned once for where they are; blank lines are not rows."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    places = _items(path) if path.suffix == '.json' else _lines(path)
    self._start, self._end, self._number = np.array(places, np.int64).reshape(-1, 3).T
    self._open()

  def _open(self):
    self._file, self._lock = open(self._path, 'rb'), threading.Lock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('_file', '_lock')}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return len(self._start)

  def number(self, i: int) -> int:
    return int(self._number[i])

  def raw(self, i: int):
    """The JSON value of row i. Raises ValueError when it is none."""
    with self._lock:
      self._file.seek(self._start[i])
      text = self._file.read(self._end[i] - self._start[i])
    try:
      return json.loads(text)
    except RecursionError:
      raise ValueError('nested too deeply') from None


class Table:
  """Rows of a parquet or Arrow file. Arrow files are mapped into memory; of parquet, row groups are decoded as they
  are needed and the latest KEEP_BYTES of them kept: a file that is larger is read fastest with small row groups."""

  def __init__(self, path: pathlib.Path, parquet: bool):
    self._path, self._parquet = path, parquet
    self._open()

  def _open(self):
    import pyarrow as pa
    import pyarrow.parquet
    self._lock, self._groups = threading.Lock(), collections.OrderedDict()
    try:
      if self._parquet:
        self._file = pa.parquet.ParquetFile(self._path)
        meta = self._file.metadata
        sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
      else:
        mapped = pa.memory_map(str(self._path))
        try:
          table = pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid:
          table = pa.ipc.open_stream(mapped).read_all()         # what `datasets` writes
        self._groups[0], sizes = table, [table.num_rows]
    except (pa.ArrowException, OSError) as e:
      raise InputError(f'{self._path}: not a readable {"parquet" if self._parquet else "Arrow"} file '
                       f'({_first_line(e)})') from None
    self._start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

  def __reduce__(self):
    return Table, (self._path, self._parquet)

  def __len__(self) -> int:
    return int(self._start[-1])

  def number(self, i: int) -> int:
    return i + 1

  def raw(self, i: int):
    """Row i as a dict. Raises ValueError when its part of the file cannot be decoded."""
    import pyarrow as pa
    group = int(np.searchsorted(self._start, i, 'right')) - 1
    try:
      with self._lock:
        return self._group(group).slice(i - self._start[group], 1).to_pylist()[0]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
      raise ValueError(_first_line(e)) from None

  def _group(self, group: int):
    if group in self._groups:
      self._groups.move_to_end(group)
    else:
      self._groups[group] = self._file.read_row_group(group)
      while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > KEEP_BYTES:
        self._groups.popitem(last=False)
    return self._groups[group]


def _lines(path: pathlib.Path) -> list[tuple[int, int, int]]:
  """(start, end, line) of every line that is not blank, in bytes."""
  places, at = [], 0
  with open(path, 'rb') as f:
    for number, line in enumerate(f, 1):
      if line.strip():
        places.append((at, at + len(line), number))
      at += len(line)
  return places


def _items(path: pathlib.Path) -> list[tuple[int, int, int]]:
  """(start, end, number) of every item of a JSON array, in bytes."""
  # Latin-1 has one character a byte and leaves the structure of JSON as it is.
  text, scan, places = path.read_bytes().decode('latin-1'), json.JSONDecoder().raw_decode, []
  skip = lambda at: _BLANK.match(text, at).end()
  at = skip(3 if text.startswith('\xef\xbb\xbf') else 0)
  if text[at:at + 1] != '[':
    raise InputError(f'{path}: a .json file must be a list of rows; one row a line goes into a .jsonl file, '
                     'annotations of a public dataset through `keye data import`')
  at = skip(at + 1)
  while text[at:at + 1] != ']' or places:
    try:
      _, end = scan(text, at)
    except (ValueError, RecursionError) as e:
      raise InputError(f'{path}: item {len(places) + 1} is not valid JSON ({_first_line(e)})') from None
    places.append((at, end, len(places) + 1))
    at = skip(end)
    if text[at:at + 1] == ']':
      break
    if text[at:at + 1] != ',':
      raise InputError(f'{path}: after item {len(places)} there must be "," or "]"; the file may be cut off')
    at = skip(at + 1)
  return places


def _first_line(error: BaseException) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]


def read_chunks(path: str | os.PathLike, size: int = 1 << 24):
  """The bytes of a file, piece by piece."""
  with open(path, 'rb') as f:
    while chunk := f.read(size):
      yield chunk
