"""A build: the steps strung together, once for every runner.

    evaluation sets -> see -> index ----.
    parts of the rows -> measure(index) -> keys -> [by key] near -> choose --.
    parts of the rows -> write(choose) -> shards

A runner has five verbs, in which Apache Beam and the processes of one machine are alike: `create(items)`,
`spread(items, step, *sides)` and `map(items, step, *sides)` for a step that gives any number of results an item, spread
over workers or not, `group(items)` of (key, value), and `gather(items, step)` for one result of all items, which later
steps take as a side.
"""
import contextlib
import dataclasses
import fcntl
import functools
import json
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash

from data_pipelines import pipeline, sources, tokenizer
from data_pipelines.corpus import shards, steps, vectors, words
from data_pipelines.errors import InputError

DROPPED, JOB = 'dropped.jsonl', 'job.json'
LIMITS = ('tokens', 'vision_rows', 'vision_patches', 'max_seconds', 'max_mb', 'max_pixels', 'max_decode_seconds')
SHARDS = 512             # that a build of many rows is cut into: training keeps every shard open
LEAST = 64               # rows of a shard
LOOK_EVERY = 0.5         # seconds


def build(rows: Sequence[str], out: str, data, patch: int, merge: int, runner: Callable[[Callable], None],
          against: Sequence[str] = (), same: str = 'row', gram: int = words.GRAM, shard_rows: int = 0,
          progress: Callable[[str, int, int], None] | None = None, embed: vectors.Embed | None = None,
          similar: float = 1.0, model: str = '') -> dict[str, Any]:
  """Builds the corpus `out` from files of rows; returns its manifest.

  data: the sampling and limits (DataConfig); its `path`, `sources` and `grey` are not used. runner: calls a function
  with something that has the five verbs, and returns when all is done. against: files whose media and runs of `gram`
  words are kept out. same: what two rows must share for the later one to be dropped: the 'row', media and text; the
  'medium'; or 'nothing', so that none is. shard_rows: rows that go into a shard; 0: LEAST, or as many as make SHARDS
  shards. progress: told (what, done, of). embed: see vectors.py; media of two rows, or of a row and an evaluation set,
  whose vectors have at least the cosine `similar` are taken for one. model: what tells it from other functions.

  A build that was stopped goes on; one that is finished is checked against its digests. Raises InputError when a file
  is missing, when `out` holds something else, or when nothing is left.
  """
  out = pathlib.Path(out)
  files = [[(str(p), len(sources.Rows(p))) for p in paths] for paths in (rows, against)]
  seen = set()
  for path, _ in (*files[0], *files[1]):
    if (real := pathlib.Path(path).resolve()) in seen:
      raise InputError(f'{path} is named twice; name it once')
    seen.add(real)
  count = sum(n for _, n in files[0])
  vocabulary = _tokenizer(data, rows)
  job = steps.Job(str(out), tuple(files[0]), tuple(files[1]),
                  dataclasses.replace(data, path='', sources=(), tokenizer=str(out), grey=False), patch, merge,
                  shard_rows or max(LEAST, -(-count // SHARDS)), gram, same, embed, similar)
  made = _made(job, vocabulary) | ({'embed': model, 'similar': similar} if embed else {})
  if (out / shards.MANIFEST).is_file():
    return _verified(out, made)
  (out / steps.WORK).mkdir(parents=True, exist_ok=True)
  with _alone(out):
    _begin(out, made, vocabulary)
    with _told(job, count, progress):
      runner(functools.partial(flow, job=job))
    return _finish(job, made)


def flow(run, job: steps.Job) -> Any:
  """The steps on a runner; its last items are the notes of the shards."""
  parts = steps.parts(job.rows, job.shard_rows)
  seen = run.spread(run.create(steps.parts(job.against, job.shard_rows)), functools.partial(steps.see, job=job))
  index = run.gather(seen, steps.index)
  measured = run.spread(run.create(parts), functools.partial(steps.measure, job=job), index)
  pairs = run.map(run.group(run.map(measured, functools.partial(steps.keys, job=job))),
                  functools.partial(steps.near, job=job))
  return run.spread(run.create(parts), functools.partial(steps.write, job=job), run.gather(pairs, steps.choose))


def _tokenizer(data, rows) -> tokenizer.Tokenizer:
  """The one that `keye train` would take for the first file. Raises InputError when another file has another."""
  found = [pipeline.open_tokenizer(dataclasses.replace(data, path=str(path), sources=())) for path in rows]
  for path, other in zip(rows[1:], found[1:]):
    if other.fingerprint() != found[0].fingerprint():
      raise InputError(f'{path}: has another tokenizer beside it than {rows[0]}; set --config.data.tokenizer')
  return found[0]


def _made(job: steps.Job, vocabulary: tokenizer.Tokenizer) -> dict[str, Any]:
  """What decides the bytes of a corpus."""
  limits = {key: getattr(job.data, key) for key in LIMITS}
  prints = [[file, sources.fingerprint(file)] for file, _ in (*job.rows, *job.against)]
  whole = [shards.FORM, prints, len(job.rows), limits, job.shard_rows]
  return shards.made_with(job.data, job.patch, job.merge, vocabulary.fingerprint()) | {
      'gram': job.gram, 'same': job.same, 'input': xxhash.xxh3_128_hexdigest(json.dumps(whole).encode())}


def _verified(out: pathlib.Path, made: dict[str, Any]) -> dict[str, Any]:
  found = shards.manifest(out)
  _same(out, found['made'], made)
  for shard in found['shards']:
    path = out / shard['file']
    if not path.is_file() or shards.digest(path) != shard['digest']:
      raise InputError(f'{path}: {"damaged" if path.is_file() else "missing"}; remove {out} and build it again')
  shutil.rmtree(out / steps.WORK, ignore_errors=True)         # when the build was stopped while it tidied up
  return found


def _same(out, before: dict[str, Any], made: dict[str, Any]) -> None:
  if changed := sorted(key for key in before.keys() | made if before.get(key) != made.get(key)):
    raise InputError(f'{out} holds a corpus made otherwise (differs in: {", ".join(changed)}); remove it or name '
                     'another folder')


def _begin(out: pathlib.Path, made: dict[str, Any], vocabulary: tokenizer.Tokenizer) -> None:
  """Marks a new folder as this build's, or checks that it is."""
  note, work = out / steps.WORK / JOB, out / steps.WORK
  for part in work.glob('*.tmp'):
    part.unlink(missing_ok=True)
  if note.is_file():
    _same(out, json.loads(note.read_text()), made)
  elif others := sorted(p.name for p in out.iterdir() if p.name != steps.WORK):
    raise InputError(f'{out} is not empty ({others[0]}); name another folder')
  else:
    shards.write_text(note, json.dumps(made), work)
  vocabulary.save(out)


@contextlib.contextmanager
def _alone(out: pathlib.Path) -> Iterator[None]:
  with open(out / steps.WORK / 'lock', 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise InputError(f'{out}: another build works on it') from None
    yield


@contextlib.contextmanager
def _told(job: steps.Job, count: int, progress) -> Iterator[None]:
  """Tells progress from the notes that are there, whoever wrote them and wherever."""
  if progress is None:
    yield
    return
  sizes, stop = {p.number: p.stop - p.start for p in steps.parts(job.rows, job.shard_rows)}, threading.Event()

  def tell():
    names = [p.stem.partition('-') for p in (pathlib.Path(job.out) / steps.WORK).glob('*-*.json')]
    progress('rows', sum(sizes[int(n)] for kind, _, n in names if kind == 'part'), count)
    progress('shards', sum(kind == 'shard' for kind, _, n in names), len(sizes))

  def watch():
    while not stop.wait(LOOK_EVERY):
      tell()

  thread = threading.Thread(target=watch, daemon=True, name='progress')
  thread.start()
  try:
    yield
    stop.set()
    thread.join()
    tell()
  finally:
    stop.set()


def _finish(job: steps.Job, made: dict[str, Any]) -> dict[str, Any]:
  """dropped.jsonl and the manifest, from the notes."""
  out, work = pathlib.Path(job.out), pathlib.Path(job.out) / steps.WORK
  notes, gone, tokens, records = [], [], 0, 0
  for n in range(steps.total(job)):
    note = json.loads((work / f'shard-{n:05d}.json').read_text())
    gone += sorted([m[:4] for m in json.loads((work / f'part-{n:05d}.json').read_text()) if m[2]]
                   + note['dropped'], key=lambda m: m[0])
    notes.append({key: note[key] for key in ('file', 'records', 'bytes', 'digest')})
    tokens, records = tokens + note['tokens'], records + note['records']
  lines = [json.dumps({'row': where, 'reason': reason, 'message': message}) for _, where, reason, message in gone]
  if not (out / DROPPED).exists():
    shards.write_text(out / DROPPED, ''.join(line + '\n' for line in lines), work)
  reasons: dict[str, int] = {}
  for _, _, reason, _ in gone:
    reasons[reason] = reasons.get(reason, 0) + 1
  if not records:
    raise InputError(f'{out}: no row is left ({", ".join(f"{n} {r}" for r, n in sorted(reasons.items()))}); '
                     f'{out / DROPPED} says why, row by row')
  manifest = {'form': shards.FORM, 'made': made, 'rows': records, 'tokens': tokens,
              'read': sum(n for _, n in job.rows), 'dropped': dict(sorted(reasons.items())),
              'shards': [note for note in notes if note['records']]}
  shards.write_text(out / shards.MANIFEST, json.dumps(manifest, indent=1) + '\n', work)
  shutil.rmtree(work)
  return manifest
