"""From a file of rows to training batches and evaluation prompts, on grain (which imports jax; nothing here uses it).

rows -> shuffle, a new order each epoch -> a stream's slice -> mix the sources (mixture.py) -> load media and tokenise
(threads, worker processes or actors of Ray; of a built corpus, read the sample) -> pack a window of samples into rows
-> batch -> read ahead (streams.py).

The order depends on the seed, the number of streams and the shapes, on nothing else: not on the number of processes or
workers or the cache. A row that cannot be used stays in the stream as a `Skip`, so positions, and with them exact
resume, do not depend on what was skipped; it is counted and the packer drops it.

`data` is a keye_jax.config.DataConfig everywhere (not imported: this package is below keye_jax).
"""
import collections
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain.python import SharedMemoryArray

from data_pipelines import chat, images, memory, mixture, packing, ray_readers, sources, streams, tokenizer, video
from data_pipelines.errors import InputError
from data_pipelines.schema import Batch, Example

WINDOW_ROWS = 32                # rows filled together by first-fit-decreasing: at 2-5 samples a row, 1-3% padding
WINDOW_BYTES = 1 << 29          # of pixels; a window closes earlier than WINDOW_ROWS when samples are long videos
GREY = 128                      # uint8; within 1/255 of the middle of the range


class Skip(NamedTuple):
  reason: str        # short class of fault
  message: str       # file:row and what is wrong
  where: str         # file:row


class Question(NamedTuple):
  """One prompt of an evaluation set."""
  prompt: Example              # ends where the assistant begins to answer
  answer: str                  # what the row's assistant said
  row: int                     # index of the row: questions of one clip share it
  branch: int                  # index of the branch in the row, 0 when it does not fork
  extra: dict[str, Any]        # the row's other keys; a list as long as the branches is narrowed to this branch's item
  source: str                  # file:line


def train_batches(data, batch: int, seed: int, process_index: int = 0, process_count: int = 1, patch: int = 14,
                  merge: int = 2, strict: bool = False, report: Callable[[str], None] = print) -> streams.Batches:
  """Endless iterator of `Batch`, each with batch / process_count rows: part `process_index` of `process_count`.

  The rows come from `data.streams` streams, or as many as parts when it is 0; a checkpoint of the run overrides that.
  `strict` raises at the first unusable row where training skips and counts it. `report` is told when workers are
  started again. Raises InputError when the file or tokenizer is missing, when shapes are inconsistent, or when a whole
  epoch holds no usable row.
  """
  if batch % process_count:
    raise InputError(f'train.batch={batch} rows are not divisible by {process_count} processes')
  load = Load(data, patch, merge, strict)
  readers = READERS[data.readers](load, report)

  def opened(stream: int, of: int):
    if batch % of:
      raise InputError(f'train.batch={batch} rows cannot come in equal shares from data.streams={of} streams')
    here = of // process_count             # streams of this process share its readers; order does not depend on them
    read = lambda samples: readers.read(samples, here)
    samples = mixture.stream(load.rows, seed, stream, of).map(readers.load)
    return iter(Packed(samples, load, batch // of, read, mixture.epoch(load.rows, of)))

  reading = streams.Reading(data.max_wait_seconds, readers, report)
  return streams.Batches(opened, load.rows, (process_index, process_count), data.streams or process_count, reading)


def heldout_batches(load: 'Load', batch: int, process_index: int, process_count: int, together: bool
                    ) -> Iterator[Batch]:
  """Every row of a file once, in order: this process's share of batches of `batch` rows, the last filled up with empty
  ones. Every process reads the whole file, so that all of them have equally many batches.
  """
  mine, rows = batch // process_count, []
  empty = packing.collate([], load.shape)
  for start in range(0, len(load.rows), WINDOW_ROWS):
    examples = [load(i) for i in range(start, min(start + WINDOW_ROWS, len(load.rows)))]
    rows += [(bin_, examples) for bin_ in packing.plan(examples, load.shape, together)]
    last = start + WINDOW_ROWS >= len(load.rows)
    while len(rows) >= batch or (last and rows):
      part = packing.collate(rows[:batch][process_index * mine:(process_index + 1) * mine], load.shape)
      fill = Batch(*(np.zeros((mine - len(a), *e.shape[1:]), e.dtype) for a, e in zip(part, empty)))
      yield Batch(*map(np.concatenate, zip(part, fill._replace(vision_BT=fill.vision_BT - 1))))
      rows = rows[batch:]


def threaded(samples: grain.MapDataset) -> grain.IterDataset:
  """In order, read ahead by threads."""
  threads = min(4, os.cpu_count() or 1)
  return samples.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))


def local_readers(load: 'Load', report: Callable[[str], None]) -> streams.Readers:
  """Threads of this process, or of `data.workers` processes of grain's beside it."""
  def read(samples: grain.MapDataset, sharing: int) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()           # grain hands absl's flags, of which we use none, on to its workers
    workers = -(-load.data.workers // max(sharing, 1))
    one_by_one = samples.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return one_by_one.map(_handed_over).mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))

  if not load.data.workers:
    return streams.Readers(load, lambda samples, sharing: threaded(samples))
  return streams.Readers(load, read, streams.kill_children)


def _handed_over(sample: Example | Skip) -> Example | Skip:
  """With its pixels where grain would copy them to."""
  if isinstance(sample, Skip):
    return sample
  return sample._replace(patch_PC=memory.moved(sample.patch_PC, SharedMemoryArray))


READERS = {'local': local_readers, 'ray': ray_readers.readers}


def row_shape(data, patch: int = 14, merge: int = 2) -> packing.Shape:
  """The static shape that a DataConfig asks for. Raises InputError when a vision row cannot be cut into tokens."""
  if data.vision_patches % merge**2:
    raise InputError(f'data.vision_patches={data.vision_patches} is not a multiple of {merge**2} (patches a token)')
  return packing.Shape(data.tokens, data.vision_rows, data.vision_patches, merge, 3 * patch * patch, data.samples)


def open_tokenizer(data) -> tokenizer.Tokenizer:
  """data.tokenizer's folder; without one, that of a built corpus or the folder of data.path if it has a tokenizer.json,
  else Keye's full one."""
  beside = pathlib.Path(data.path) if os.path.isdir(data.path) else mixture.folder(data)
  return tokenizer.load(data.tokenizer or (beside if data.path and (beside / 'tokenizer.json').is_file() else ''))


def load_media(turns: list[chat.Turn], data, patch: int = 14, merge: int = 2) -> list[chat.Turn]:
  """Replaces paths (or bytes, or arrays) in turns by resized images and clips. Raises InputError naming the file."""
  def resolve(kind, value):
    if kind == 'image':
      return kind, images.load_image(value, factor=patch * merge, min_tokens=data.image_tokens_min,
                                     max_tokens=data.image_tokens_max, max_pixels=data.max_pixels,
                                     max_mb=data.max_mb)
    if kind == 'video':
      return kind, video.load_video(value, data, factor=patch * merge)
    return kind, value
  return [chat.Turn(t.role, tuple(resolve(*p) for p in t.parts)) for t in turns]


def fingerprints(data) -> dict[str, str]:
  """What decides which samples a config reads, and is not in the config: {what to call it: hash}. A checkpoint keeps
  them: resuming on other data is an error, not a surprise."""
  return mixture.fingerprints(data) | {'tokenizer of the dataset': open_tokenizer(data).fingerprint()}


def eval_examples(data, patch: int = 14, merge: int = 2, think: bool = False) -> Iterator[Question]:
  """The prompts of data.path in file order, one a question: a row without branches is one, each branch is one.

  The prompt of a question stops before its last assistant message. Media are decoded once a row. Raises InputError at
  the first row that cannot be used: an evaluation must not shrink unseen.
  """
  load = Load(data, patch, merge, strict=True)
  for i in range(len(load.rows)):
    row = load.rows[i]
    trunk = load_media(row.trunk, data, patch, merge)
    for b, branch in enumerate(row.branches or [[]]):
      turns = chat.fork(trunk, load_media(branch, data, patch, merge))
      last = max((n for n, t in enumerate(turns) if t.role == 'assistant'), default=None)
      if last is None:
        raise InputError(f'{row.source}: branch {b} has no assistant message to compare an answer with')
      answer = ''.join(value for _, value in turns[last].parts)
      prompt = chat.prompt(turns[:last], load.tokenizer, think, patch, merge, row.source)
      n = len(row.branches)
      extra = {k: v[b] if n and isinstance(v, list) and len(v) == n else v for k, v in row.extra.items()}
      yield Question(_grey(prompt) if data.grey else prompt, answer, i, b, extra, row.source)


class Load:
  """Row number of mixture.Rows -> Example, or a Skip when the row cannot be used. Picklable; keeps finished samples.

  Decoding and tokenising are deterministic, so epochs after the first are served from an LRU cache of
  `data.cache_mb`, shared out among the worker processes.
  """

  def __init__(self, data, patch: int, merge: int, strict: bool):
    self.data, self.patch, self.merge, self.strict = data, patch, merge, strict
    self.rows, self.tokenizer, self.shape = mixture.Rows(data), open_tokenizer(data), row_shape(data, patch, merge)
    self.rows.check(data, patch, merge, self.tokenizer.fingerprint())
    self._cache = Cache((data.cache_mb << 20) // max(data.workers, 1))

  def __call__(self, i: int) -> Example | Skip:
    if (found := self._cache.get(i)) is not None:
      return found
    try:
      example = self.example(i)
      if why := packing.misfit(example, self.shape):
        raise sources.BadRow('too long', f'{example.source}: {why}')
    except sources.BadRow as e:
      if self.strict:
        raise
      return Skip(e.reason, str(e), self.rows.where(i))
    self._cache.put(i, example)
    return example

  def example(self, i: int) -> Example:
    """The training sample of row i. Raises BadRow."""
    if (built := self.rows.sample(i)) is not None:
      return _grey(built) if self.data.grey else built
    return self.read(i, in_place=True)[0]

  def read(self, i: int, in_place: bool = False) -> tuple[Example, list[chat.Turn]]:
    """The training sample of row i, and its turns with their media. in_place: clips become patches where their frames
    are, which are lost. Raises BadRow that names file and row."""
    args, where = (self.data, self.patch, self.merge), self.rows.where(i)
    try:
      row = self.rows[i]
      trunk, *branches = [load_media(turns, *args) for turns in (row.trunk, *row.branches)]
      example = chat.tokenize(trunk, self.tokenizer, branches, self.patch, self.merge, row.source, in_place)
    except InputError as e:
      message = str(e) if str(e).startswith(where.rpartition(':')[0]) else f'{where}: {e}'
      raise sources.BadRow(getattr(e, 'reason', 'media'), message) from None
    return _grey(example) if self.data.grey else example, [turn for turns in (trunk, *branches) for turn in turns]


class Packed(grain.IterDataset):
  """Samples to (Batch, the skips met on the way, (file:row, tokens) of the batch's samples). State: first sample of the
  window, rows of it already given out."""

  def __init__(self, stream: grain.MapDataset, load: Load, rows: int,
               read: Callable[[grain.MapDataset], grain.IterDataset], epoch: int):
    super().__init__()
    self.stream, self.rows, self.read, self.epoch = stream, rows, read, epoch
    self.shape, self.together, self.mixed = load.shape, load.data.pack, load.rows

  def __iter__(self):
    return PackedIterator(self)

  def samples(self, start: int):
    """Iterator over the stream from sample `start`, in order whoever reads."""
    return iter(self.read(self.stream[start:]))


class PackedIterator(grain.DatasetIterator):

  def __init__(self, packed: Packed):
    super().__init__()
    self._packed, self._samples = packed, None
    self._restart(0, 0)

  def _restart(self, start, row):
    self._close_samples()
    # Samples of the window are [start, next); rows of it before `row` are given out.
    self._start, self._next, self._row, self._bins, self._examples, self._carried = start, start, row, None, [], None

  def get_state(self):
    return {'sample': self._start, 'row': self._row}

  def set_state(self, state):
    self._restart(int(state['sample']), int(state['row']))

  def _close_samples(self):
    if self._samples is not None:
      self._samples.close()
      self._samples = None

  def close(self):
    self._close_samples()
    super().close()

  def __next__(self):
    rows, skips = [], []
    while len(rows) < self._packed.rows:
      if self._bins is not None and self._row == len(self._bins):
        self._start, self._row, self._bins = self._next, 0, None
      if self._bins is None:
        met = self._fill()
        skips += met if not self._row else []     # a window that was begun before a restart was counted then
      take = self._bins[self._row:self._row + self._packed.rows - len(rows)]
      rows += [(b, self._examples) for b in take]
      self._row += len(take)
    taken = [examples[item] for bin_, examples in rows for item, _ in bin_.items]
    batch = packing.collate(rows, self._packed.shape, lambda e: self._packed.mixed.origin(e.source))
    return batch, skips, [(e.source, len(e.token_T)) for e in taken]

  def _fill(self) -> list[Skip]:
    """Reads the next window of samples and packs it."""
    shape, skips, self._examples = self._packed.shape, [], []
    if self._samples is None:
      self._samples = self._packed.samples(self._start)
    patches = max(shape.vision_rows * shape.vision_patches, 1)
    full = pixels = 0
    while full < WINDOW_ROWS and pixels < WINDOW_BYTES:
      sample = next(self._samples)
      self._next += 1
      if isinstance(sample, Skip):
        skips.append(sample)
        if not self._examples and len(skips) >= self._packed.epoch:
          raise InputError(f'no row of the dataset can be used; the last: {sample.message}')
        continue
      self._examples.append(sample)
      share = max(len(sample.token_T) / shape.tokens, len(sample.patch_PC) / patches)
      full, pixels = full + (share if self._packed.together else 1), pixels + sample.patch_PC.nbytes
    self._bins = packing.plan(self._examples, shape, self._packed.together)
    return skips


class Cache:
  """Least recently used samples within a number of bytes; safe between threads, empty after pickling."""

  def __init__(self, limit: int):
    self._limit, self._used, self._items, self._lock = limit, 0, collections.OrderedDict(), threading.Lock()

  def __reduce__(self):
    return Cache, (self._limit,)

  def get(self, key: int) -> Example | None:
    with self._lock:
      if key in self._items:
        self._items.move_to_end(key)
      return self._items.get(key)

  def put(self, key: int, example: Example) -> None:
    """Keeps it, and makes its pixels read-only, unless it is larger than all that may be kept."""
    size = sum(a.nbytes for a in example if isinstance(a, np.ndarray))
    with self._lock:
      if size > self._limit or key in self._items:
        return
      example.patch_PC.flags.writeable = False
      self._items[key], self._used = example, self._used + size
      while self._used > self._limit:
        _, old = self._items.popitem(last=False)
        self._used -= sum(a.nbytes for a in old if isinstance(a, np.ndarray))


def _grey(example: Example) -> Example:
  return example._replace(patch_PC=np.full_like(example.patch_PC, GREY))
