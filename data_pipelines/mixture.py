"""Several files of rows as one dataset, mixed by weight.

Which source a place in the stream reads, and which of its samples, is a pure function of the seed and that place, so a
run resumes exactly from a number. Each source goes through its own rows epoch after epoch, each epoch in a new order;
one that runs out before the others repeats.

`data` is a keye_jax.config.DataConfig everywhere (not imported: this package is below keye_jax). S sources, K places of
a block.
"""
import bisect
import functools
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
import xxhash

from data_pipelines import sources
from data_pipelines.corpus import shards
from data_pipelines.errors import InputError
from data_pipelines.schema import Example

BLOCK = 1000       # so many places in a row hold every source's share exactly


class Source(NamedTuple):
  name: str        # '' of a dataset that is one file
  path: pathlib.Path
  weight: float    # share of the samples, relative to the other sources' weights


def folder(data) -> pathlib.Path:
  """Where the training data lie."""
  return pathlib.Path(data.path) if data.sources else pathlib.Path(data.path).parent


def listed(data) -> list[Source]:
  """The sources of a config by name: `data.sources`, their paths relative to the folder `data.path`, or the one file
  `data.path`. Raises InputError when two of them are one file: it would be counted under one name."""
  if not data.sources:
    return [Source('', pathlib.Path(data.path) if data.path else '', 1.0)]
  by_name = sorted(data.sources, key=lambda s: s.name)
  found = [Source(s.name, pathlib.Path(data.path) / s.path, s.weight) for s in by_name]
  for a, b in itertools.combinations(found, 2):
    if a.path == b.path:
      raise InputError(f'data.sources: {a.name!r} and {b.name!r} are the same file {a.path}; name it once')
  return found


class Rows:
  """The rows of all sources, one after another: `len(rows)`, `rows[i]`. Picklable, safe to share between threads. A
  source that is a folder is a built corpus, whose rows are samples already: `rows.sample(i)`."""

  def __init__(self, data):
    self.sources = listed(data)
    self.files = [shards.Corpus(s.path) if os.path.isdir(s.path) else sources.Rows(s.path) for s in self.sources]
    self.starts = [0, *itertools.accumulate(map(len, self.files))]      # of each source, then the end
    self._numbers = {str(s.path): i for i, s in enumerate(self.sources)}

  def __len__(self) -> int:
    return self.starts[-1]

  def __getitem__(self, i: int) -> sources.Row:
    rows, i = self._find(i)
    return rows[i]

  def sample(self, i: int) -> Example | None:
    """Row i when it is a sample already, of a built corpus. Raises BadRow."""
    rows, i = self._find(i)
    return rows.example(i) if isinstance(rows, shards.Corpus) else None

  def check(self, data, patch: int, merge: int, words: str) -> None:
    """Raises InputError when a source was built with other sampling than a run has; see shards.Corpus.check."""
    for rows in self.files:
      if isinstance(rows, shards.Corpus):
        rows.check(data, patch, merge, words)

  def where(self, i: int) -> str:
    """'file:number' of row i."""
    rows, i = self._find(i)
    return rows.where(i)

  def origin(self, where: str) -> int:
    """Number of the source that 'file:number' belongs to."""
    return self._numbers[where.rpartition(':')[0]]

  def name(self, where: str) -> str:
    return self.sources[self.origin(where)].name

  def _find(self, i):
    s = bisect.bisect_right(self.starts, i) - 1
    return self.files[s], i - self.starts[s]


class Order(grain.transforms.DatasetSelectionMap):
  """Place in the mixture -> (source, place in that source's own stream). Endless."""

  def __init__(self, counts: Sequence[int], seed: int):
    self.counts, self.seed = tuple(counts), seed % 2**32

  def __len__(self) -> int:
    return 2**62

  def __getitem__(self, place: int) -> tuple[int, int]:
    number, k = divmod(place, BLOCK)
    source_K, before_K = block(self.counts, self.seed, number)
    s = int(source_K[k])
    return s, number * self.counts[s] + int(before_K[k])


@functools.lru_cache(8)
def block(counts: tuple[int, ...], seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
  """(source of each place, how many places before it have the same source) of one block, shuffled.

  By raw words of Philox, which every release of numpy gives alike.
  """
  dice_K = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(BLOCK)
  source_K = np.repeat(np.arange(len(counts)), counts)[np.argsort(dice_K, kind='stable')]
  hit_KS = source_K[:, None] == np.arange(len(counts))
  return source_K, (np.cumsum(hit_KS, 0) - 1)[np.arange(BLOCK), source_K]


def shares(mixed: Sequence[Source]) -> list[int]:
  """How many of BLOCK places each source gets, by largest remainders. Raises InputError for one that gets none."""
  total = sum(s.weight for s in mixed)
  exact = [BLOCK * s.weight / total for s in mixed]
  counts = [int(x) for x in exact]
  for s in sorted(range(len(mixed)), key=lambda s: counts[s] - exact[s])[:BLOCK - sum(counts)]:
    counts[s] += 1
  for s, count in zip(mixed, counts):
    if not count:
      raise InputError(f'data.sources: {s.name!r} with weight {s.weight} of {total} together is less than one sample '
                       f'in {BLOCK}; leave it out or give it more')
  return counts


def stream(rows: Rows, seed: int, index: int, of: int) -> grain.MapDataset:
  """The endless row numbers of stream `index` of `of`.

  Each source is shuffled anew each epoch and dealt out to the streams in turn; every stream mixes its part by the same
  weights, in the same order of sources.
  """
  def one(start: int, stop: int, seed: int) -> grain.MapDataset:
    return grain.MapDataset.range(start, stop).seed(seed % 2**32).shuffle().repeat()[index::of]

  spans = list(itertools.pairwise(rows.starts))
  if len(spans) == 1:
    return one(*spans[0], seed)
  parts = [one(*span, seed + xxhash.xxh32_intdigest(s.name.encode())) for span, s in zip(spans, rows.sources)]
  return grain.MapDataset.select_from_datasets(parts, Order(shares(rows.sources), seed))


def epoch(rows: Rows, of: int) -> int:
  """Places of one of `of` streams after which every row of every source was met."""
  sizes = [-(-len(file) // of) for file in rows.files]
  if len(sizes) == 1:
    return sizes[0]
  return max(BLOCK * -(-size // count) for size, count in zip(sizes, shares(rows.sources)))


def fingerprints(data) -> dict[str, str]:
  """What must not change under a run, by the name to call it by: the rows and media of each source, and how the
  sources are mixed."""
  mixed = listed(data)
  if not data.sources:
    return {'rows or media of the dataset': _fingerprint(mixed[0].path)}
  weights = '\n'.join(f'{s.name}\0{count}' for s, count in zip(mixed, shares(mixed)))
  return {f'rows or media of the source {s.name!r}': _fingerprint(s.path) for s in mixed} | {
      'weights of the mixture': xxhash.xxh3_128_hexdigest(weights.encode())}


def _fingerprint(path) -> str:
  return shards.fingerprint(path) if os.path.isdir(path) else sources.fingerprint(path)
