"""Shards of a built corpus: ArrayRecord files of tokenised samples, and dataset.json, written last, that names them.

A record is one Example: a line of JSON that gives name, dtype and shape of each array, then their bytes. A sample is
what a row of a file becomes before packing, so a corpus trains exactly as its rows do.
"""
import json
import os
import pathlib
import uuid
from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash

from data_pipelines import sources, tables
from data_pipelines.errors import InputError
from data_pipelines.schema import Example

MANIFEST, FORM = 'dataset.json', 1
OPTIONS = 'group_size:1,zstd:1'         # every record can be read by itself
# What the samples were made with; a run that reads them must say the same.
SAMPLING = ('fps', 'min_frames', 'frame_tokens_min', 'frame_tokens_max', 'video_tokens', 'image_tokens_min',
            'image_tokens_max', 'timestamps', 'adaptive')
_ARRAYS = Example._fields[:-1]


class Corpus:
  """Random access to the samples of a built folder: `len(corpus)`, `corpus.example(i)`. Picklable, safe to share
  between threads; needs no TensorFlow. Raises InputError when the build is not finished or a shard is missing or has
  another length than was written."""

  def __init__(self, folder: str | os.PathLike):
    import grain  # imports jax, which the writing of shards does without
    self.path, self.manifest = pathlib.Path(folder), manifest(folder)
    for shard in self.manifest['shards']:
      file = self.path / shard['file']
      size = file.stat().st_size if file.is_file() else -1
      if size != shard['bytes']:
        fault = 'is missing' if size < 0 else f'has {size} bytes, not {shard["bytes"]}'
        raise InputError(f'{file}: {fault}; copy the folder again, or build it anew in an empty one')
    self._records = grain.sources.ArrayRecordDataSource([str(self.path / s['file']) for s in self.manifest['shards']])

  def __len__(self) -> int:
    return self.manifest['rows']

  def where(self, i: int) -> str:
    return f'{self.path}:{i + 1}'

  def __getitem__(self, i: int):
    raise InputError(f'{self.path}: a built corpus holds samples, not conversations; name the file of rows instead')

  def example(self, i: int) -> Example:
    """Sample i. Raises BadRow when its record is damaged."""
    try:
      return unpack(self._records[i], self.where(i))
    except (ValueError, RuntimeError, OSError) as e:
      raise sources.BadRow('damaged shard', f'{self.where(i)}: the record cannot be read '
                                            f'({(str(e) or type(e).__name__).splitlines()[0]})') from None

  def check(self, data, patch: int, merge: int, words: str) -> None:
    """Raises InputError when a run samples otherwise than the corpus was built. words: the tokenizer's fingerprint."""
    made = self.manifest['made']
    for key, value in made_with(data, patch, merge, words).items():
      if made[key] != value:
        what = {'patch': 'model.vision.patch', 'merge': 'model.vision.merge', 'tokenizer': 'data.tokenizer'}
        raise InputError(f'{self.path}: built with {what.get(key, f"data.{key}")} = {made[key]!r}, not {value!r}; '
                         'train with that, or build it again')


def made_with(data, patch: int, merge: int, words: str) -> dict[str, Any]:
  """What decides the samples besides the rows."""
  return {key: getattr(data, key) for key in SAMPLING} | {'patch': patch, 'merge': merge, 'tokenizer': words}


def manifest(folder: str | os.PathLike) -> dict[str, Any]:
  """The content of dataset.json. Raises InputError when it is not there or of another form."""
  path = pathlib.Path(folder) / MANIFEST
  if not path.is_file():
    raise InputError(f'{folder}: no {MANIFEST}: not a built corpus, or its build was stopped; run `keye data build` '
                     'again with the same arguments and it goes on. For a file of rows, name the file')
  try:
    found = json.loads(path.read_text('utf-8'))
    if found['form'] != FORM:
      raise InputError(f'{path}: form {found["form"]}, this release reads form {FORM}; build it again')
    return found
  except (ValueError, KeyError, TypeError) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(f'{path}: not the manifest of a built corpus ({e})') from None


def fingerprint(folder: str | os.PathLike) -> str:
  """Hash of what the shards hold: their digests are in the manifest."""
  return xxhash.xxh3_128_hexdigest((pathlib.Path(folder) / MANIFEST).read_bytes())


def pack(example: Example) -> bytes:
  arrays = {name: np.ascontiguousarray(getattr(example, name)) for name in _ARRAYS}
  head = json.dumps({name: [a.dtype.str, a.shape] for name, a in arrays.items()}, separators=(',', ':'))
  return b''.join([head.encode(), b'\n', *(a.tobytes() for a in arrays.values())])


def unpack(record: bytes, source: str) -> Example:
  """Raises ValueError when the record is not one of `pack`."""
  end, arrays = record.find(b'\n'), {}
  head, at = json.loads(record[:end]), end + 1
  for name in _ARRAYS:
    dtype, shape = head[name]
    arrays[name] = np.frombuffer(record, dtype, int(np.prod(shape)), at).reshape(shape)
    at += arrays[name].nbytes
  if at != len(record):
    raise ValueError(f'{len(record)} bytes instead of {at}')
  return Example(**arrays, source=source)


def write(path: pathlib.Path, records: Iterable[bytes], scratch: pathlib.Path) -> int:
  """Writes an ArrayRecord file under a name of its own in `scratch`, then gives it its name at once. Returns how many
  records it has; with none there is no file."""
  from array_record.python.array_record_module import ArrayRecordWriter
  part, count, writer = scratch / f'{uuid.uuid4().hex}.tmp', 0, None
  for record in records:
    writer = writer or ArrayRecordWriter(str(part), OPTIONS)
    writer.write(record)
    count += 1
  if writer:
    writer.close()
    settle(part, path)
  return count


def write_text(path: pathlib.Path, text: str, scratch: pathlib.Path) -> None:
  part = scratch / f'{uuid.uuid4().hex}.tmp'
  part.write_text(text, 'utf-8')
  settle(part, path)


def settle(part: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a finished file its name, after its bytes are on the disk: under that name it is whole or not there."""
  with open(part, 'rb') as f:
    os.fsync(f.fileno())
  os.replace(part, path)


def read(path: pathlib.Path) -> Iterable[bytes]:
  """The records of one file, one after the other."""
  from array_record.python.array_record_module import ArrayRecordReader
  reader = ArrayRecordReader(str(path))
  try:
    for i in range(reader.num_records()):
      yield reader.read([i])[0]
  finally:
    reader.close()


def digest(path: pathlib.Path) -> str:
  found = xxhash.xxh3_128()
  for chunk in tables.read_chunks(path):
    found.update(chunk)
  return found.hexdigest()
