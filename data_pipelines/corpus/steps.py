"""The steps of a build as functions of one item: what `flow.py` strings together and a runner spreads over processes.

Rows come in parts, a shard each. `measure` reads a part, writes its samples aside and says what is to be known of each
row; `near` names rows that look alike among those that share a key; `choose` keeps one of them; `write` makes the shard
of what is kept. Every step that takes long leaves a note in FOLDER/work when it is done, so a build that was stopped
goes on; the notes are also what the report is made of. The same input gives the same bytes, whoever does which step.

`job` is a `Job` everywhere; a row number counts through all files.
"""
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from data_pipelines import packing, pipeline, sources
from data_pipelines.corpus import looks, shards, vectors, words
from data_pipelines.errors import InputError

WORK = 'work'
LIKE = 'like.'              # begins the keys under which rows are compared by their vectors


@dataclasses.dataclass(frozen=True)
class Job:
  """A build. `data` is a keye_jax.config.DataConfig whose `tokenizer` is a folder and whose `path` is not used."""
  out: str
  rows: tuple[tuple[str, int], ...]          # files and how many rows each has
  against: tuple[tuple[str, int], ...]       # evaluation sets
  data: Any
  patch: int
  merge: int
  shard_rows: int
  gram: int                                  # words
  same: Literal['row', 'medium', 'nothing']  # what two rows must share for one of them to be dropped
  embed: vectors.Embed | None = None         # hashable, picklable
  similar: float = 1.0                       # cosine from which on two media are one


class Part(NamedTuple):
  """Rows [start, stop) of a file; `first` is the number of its row 0."""
  number: int
  file: str
  first: int
  start: int
  stop: int


class Measured(NamedTuple):
  """What is known of a row. Plain values, so that it goes through JSON."""
  row: int
  where: str                    # file:row
  reason: str = ''              # why it is dropped, as a class to count by; '' while it is kept
  message: str = ''
  exact: str = ''               # hash of the whole sample
  text: str = ''                # see words.key
  media: tuple[looks.Look, ...] = ()
  tokens: int = 0
  vectors: tuple[str, ...] = ()           # of its media, when there is a model to make them; see vectors.py


class Seen(NamedTuple):
  """What is known of a row of an evaluation set."""
  where: str
  grams: tuple[tuple[int, ...], ...]      # hashes of each turn's
  media: tuple[looks.Look, ...]
  vectors: tuple[str, ...] = ()


class Index(NamedTuple):
  """The evaluation sets, to look rows up in."""
  grams: dict[int, str]                    # file:row by hash
  templates: int                           # runs of words that were left out because too many turns have them
  bands: dict[str, list[int]]              # see looks.bands
  media: list[tuple[str, looks.Look]]
  vectors: dict[str, tuple[list[str], np.ndarray]]      # file:row and direction of each medium, by its kind


def parts(files: tuple[tuple[str, int], ...], size: int) -> list[Part]:
  out, first = [], 0
  for file, count in files:
    out += [Part(len(out) + n, file, first, at, min(at + size, count)) for n, at in enumerate(range(0, count, size))]
    first += count
  return out


def total(job: Job) -> int:
  """Shards of a build."""
  return len(parts(job.rows, job.shard_rows))


def work(job: Job, name: str) -> pathlib.Path:
  return pathlib.Path(job.out) / WORK / name


def shard_path(job: Job, number: int) -> pathlib.Path:
  return pathlib.Path(job.out) / f'shard-{number:05d}-of-{total(job):05d}.arrayrecord'


def remembered(job: Job, name: str, make: Callable[[], Any]) -> Any:
  """The note of that name, made and written when it is not there."""
  path = work(job, name)
  if not path.is_file():
    shards.write_text(path, json.dumps(make(), ensure_ascii=True), path.parent)
  return json.loads(path.read_text())


# ---- evaluation sets

def see(part: Part, job: Job) -> Iterator[Seen]:
  """The rows of a part of an evaluation set. Raises InputError at one that cannot be read: what it holds could not be
  kept out."""
  for where, grams, found, like in remembered(job, f'against-{part.number:05d}.json', lambda: list(_see(part, job))):
    yield Seen(where, tuple(map(tuple, grams)), tuple(itertools.starmap(looks.Look, found)), tuple(like))


def _see(part, job):
  load, known = _load(job, part.file), {}
  for i in range(part.start, part.stop):
    try:
      row = load.rows[i]
      turns = [turn for said in (row.trunk, *row.branches)
               for turn in pipeline.load_media(said, job.data, job.patch, job.merge)]
    except InputError as e:
      raise InputError(f'--against {load.rows.where(i)}: {e}; without this row the set cannot be kept out') from None
    grams, media = [sorted({h for h, _ in words.grams(turn, job.gram)}) for turn in turns], _looks(turns)
    yield load.rows.where(i), grams, media, _vectors(turns, media, job, known)


def index(seen: Iterable[Seen]) -> Index:
  """All evaluation sets together; of several rows that have something, the first by name is named for it."""
  seen = sorted(seen, key=lambda s: s.where)
  count: dict[int, int] = {}
  for h in itertools.chain.from_iterable(g for s in seen for g in s.grams):
    count[h] = count.get(h, 0) + 1
  grams: dict[int, str] = {}
  for s in seen:
    for h in itertools.chain.from_iterable(s.grams):
      if count[h] <= words.TEMPLATE:
        grams.setdefault(h, s.where)
  held, bands, like = [], {}, {}
  for s in seen:
    for one in s.media:
      if one.pixels not in bands:
        for band in looks.bands(one):
          bands.setdefault(band, []).append(len(held))
        held.append((s.where, one))
    for one in s.vectors:
      like.setdefault(vectors.kinds([one]), {}).setdefault(one, s.where)
  found = {kind: (list(each.values()), vectors.directions(list(each))) for kind, each in like.items()}
  return Index(grams, sum(n > words.TEMPLATE for n in count.values()), bands, held, found)


def contaminated(turns, media: Iterable[looks.Look], held: Index, n: int, like: Iterable[str] = (),
                 similar: float = 1.0) -> tuple[str, str] | None:
  """(reason, what is shared with which row) of a row that an evaluation set has, else None."""
  for one in media:
    near = sorted({i for band in looks.bands(one) for i in held.bands.get(band, ())})
    for where, other in (held.media[i] for i in near):
      if looks.alike(one, other):
        return 'medium of an evaluation set', f'its {"video" if one.seconds else "picture"} is that of {where}'
  for one in like:
    kind = vectors.kinds([one])
    if kind in held.vectors:
      where, directions = held.vectors[kind]
      i, cosine = vectors.nearest(directions, one)
      if cosine >= similar:
        return 'medium of an evaluation set', (f'its {"video" if kind == "video" else "picture"} is like that of '
                                               f'{where[i]} to the model (cosine {cosine:.3f})')
  for turn in turns:
    for h, run in words.grams(turn, n):
      if h in held.grams:
        return 'text of an evaluation set', f'shares {n} words with {held.grams[h]}: {run!r}'
  return None


# ---- rows

def measure(part: Part, held: Index, job: Job) -> Iterator[Measured]:
  """What is known of every row of a part; samples that can be used are written to work/part-N.arrayrecord."""
  aside = work(job, f'part-{part.number:05d}.arrayrecord')

  def make():
    found: list[Measured] = []
    shards.write(aside, _samples(part, held, job, found), aside.parent)
    return found

  for row in remembered(job, f'part-{part.number:05d}.json', make):
    yield _measured(row)


def _samples(part, held, job, found: list[Measured]) -> Iterator[bytes]:
  load, known = _load(job, part.file), {}
  for i in range(part.start, part.stop):
    row, where = part.first + i, load.rows.where(i)
    try:
      example, turns = load.read(i)
      if why := packing.misfit(example, load.shape):
        raise sources.BadRow('too long', f'{where}: {why}')
    except sources.BadRow as e:
      found.append(Measured(row, where, e.reason, str(e)))
      continue
    media = _looks(turns)
    like = _vectors(turns, media, job, known)
    if shared := contaminated(turns, media, held, job.gram, like, job.similar):
      found.append(Measured(row, where, shared[0], f'{where}: {shared[1]}'))
      continue
    record = shards.pack(example)
    conversation = load.rows[i]
    found.append(Measured(row, where, exact=xxhash.xxh3_128_hexdigest(record), media=media, tokens=len(example.token_T),
                          text=words.key(conversation.trunk, conversation.branches), vectors=like))
    yield record


def keys(row: Measured, job: Job) -> Iterator[tuple[str, Measured]]:
  """Keys of which rows that are one share at least one."""
  if row.reason or job.same == 'nothing':
    return
  if not row.media:
    if job.same == 'row':
      yield f'{row.text}.', row
    return
  text = row.text if job.same == 'row' else ''
  for band in looks.bands(row.media[0]):
    yield f'{text}.{len(row.media)}.{band}', row._replace(vectors=())
  if row.vectors:
    yield f'{LIKE}{text}.{vectors.kinds(row.vectors)}', row._replace(media=())


def near(group: tuple[str, Iterable[Measured]], job: Job) -> Iterator[tuple[int, str, int, str, str]]:
  """(earlier row, where, later row, where, how) of rows under one key that are one."""
  rows = sorted(group[1])
  if group[0].startswith(LIKE):
    found_NMW = np.stack([vectors.directions(row.vectors) for row in rows])
    for a, b in vectors.repeated(found_NMW, job.similar):
      yield rows[a].row, rows[a].where, rows[b].row, rows[b].where, 'similar'
    return
  leader: dict[str, Measured] = {}
  for row in rows:
    first = leader.setdefault(row.exact, row)
    if first is not row:
      yield first.row, first.where, row.row, row.where, 'exact'
  for a, b in itertools.combinations(leader.values(), 2):
    if all(map(looks.alike, a.media, b.media)):
      yield a.row, a.where, b.row, b.where, 'near'


def choose(pairs: Iterable[tuple[int, str, int, str, str]]) -> dict[int, tuple[str, str]]:
  """{row that is dropped: (where the row lies that is kept for it, how they are one)}: the earliest is kept, and what
  is like a row that was dropped, but not like the one that was kept for it, stays."""
  kept_for: dict[int, tuple[int, str, str]] = {}
  for a, where, b, _, how in sorted(pairs, key=lambda p: (p[2], p[4], p[0])):
    if b in kept_for:
      continue
    if a not in kept_for:
      kept_for[b] = a, where, how
    elif how == 'exact':              # whatever held for its twin holds for it
      kept_for[b] = *kept_for[a][:2], how
  return {b: (where, how) for b, (_, where, how) in kept_for.items()}


def write(part: Part, dropped: dict[int, tuple[str, str]], job: Job) -> Iterator[dict]:
  """The shard of a part, without what is dropped: a note with its records, bytes and digest."""
  aside, shard = work(job, f'part-{part.number:05d}.arrayrecord'), shard_path(job, part.number)

  def make():
    rows = [m for m in map(_measured, _notes(job, f'part-{part.number:05d}.json')) if not m.reason]
    keep = [m.row not in dropped for m in rows]
    if any(keep) and not shard.exists():
      if all(keep):
        shards.settle(aside, shard)
      else:
        shards.write(shard, itertools.compress(shards.read(aside), keep), aside.parent)
    whole = any(keep)
    return {'file': shard.name, 'records': sum(keep), 'bytes': shard.stat().st_size if whole else 0,
            'digest': shards.digest(shard) if whole else '', 'tokens': sum(m.tokens for m, k in zip(rows, keep) if k),
            'dropped': [[m.row, m.where, *_why(m, *dropped[m.row], job)] for m in rows if m.row in dropped]}

  note = remembered(job, f'shard-{part.number:05d}.json', make)
  aside.unlink(missing_ok=True)
  yield note


def _why(row: Measured, kept: str, how: str, job: Job) -> tuple[str, str]:
  """(reason, message)"""
  if how == 'exact':
    return 'duplicate', f'{row.where}: the same as {kept}'
  if how == 'similar':
    return 'duplicate by embedding', f'{row.where}: like {kept} to the model'
  return 'near duplicate', f'{row.where}: {"looks" if job.same == "medium" else "looks and reads"} like {kept}'


def _notes(job: Job, name: str) -> list:
  return json.loads(work(job, name).read_text())


def _measured(row: list) -> Measured:
  return Measured(*row)._replace(media=tuple(itertools.starmap(looks.Look, row[6])), vectors=tuple(row[8]))


def _looks(turns) -> tuple[looks.Look, ...]:
  return tuple(looks.look(kind, value) for turn in turns for kind, value in turn.parts if kind != 'text')


def _vectors(turns, media: Sequence[looks.Look], job: Job, known: dict[str, str]) -> tuple[str, ...]:
  """Of the media of a row. known: those made before, by the hash of their pixels."""
  if not job.embed:
    return ()
  parts = (part for turn in turns for part in turn.parts if part[0] != 'text')
  for one, (kind, value) in zip(media, parts, strict=True):
    if one.pixels not in known:
      known[one.pixels] = vectors.vector(job.embed, kind, value)
  return tuple(known[one.pixels] for one in media)


@functools.lru_cache(4)
def _load(job: Job, file: str) -> pipeline.Load:
  data = dataclasses.replace(job.data, path=file, sources=(), cache_mb=0)
  return pipeline.Load(data, job.patch, job.merge, strict=True)
