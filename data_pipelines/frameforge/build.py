"""A FrameForge dataset on disk: media, four JSONL files, and frameforge.json with what was built."""
import collections
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.frameforge import render, script

FORM = 6                 # of the dataset: counted up when the same arguments make other clips
CHUNK = 50               # clips or pictures of one task for a worker process
# The first number of a clip's random seed keeps the streams of the files apart.
KINDS = {'train': 0, 'heldout': 1, 'images': 2, 'heldout_images': 3}


def build(folder: str | os.PathLike, n_train: int = 2000, n_heldout: int = 300, n_images: int = 4000, seed: int = 0,
          side: int = 56, fps: int = 4, processes: int = 2, progress: Callable[[int, int], None] | None = None) -> dict:
  """Writes clips and pictures with questions, all media side x side pixels and clips at `fps`:

  train.jsonl, heldout.jsonl: clips of 4 to 7 seconds, 4 to 6 questions each; in train.jsonl one more asks for all
  events.
  images.jsonl, heldout_images.jsonl: single pictures of the training split, to begin with, and `n_heldout` of the
  other.

  A row depends on seed, file and its number only, not on the counts nor on `processes`. A folder that holds the same
  build already is left as it is; the file frameforge.json is written last and marks a complete one. `progress` is
  called with (done, total) rows. Returns what frameforge.json holds: the arguments and, by file, counts and the scores
  that need no look at a clip (see `summary`). Raises InputError when the folder holds another build, when an argument
  does not fit, or when the packages with the pictures are missing.
  """
  if side % 28 or side < 28 or fps % 2 or fps < 2:
    raise InputError(f'frameforge: side={side} must be a multiple of 28 pixels and fps={fps} an even number')
  folder = pathlib.Path(folder)
  counts = {'train': n_train, 'heldout': n_heldout, 'images': n_images, 'heldout_images': n_heldout}
  made = {'form': FORM, 'train': n_train, 'heldout': n_heldout, 'images': n_images, 'seed': seed, 'side': side,
          'fps': fps}
  done = folder / 'frameforge.json'
  if done.is_file():
    report = json.loads(done.read_text())
    if report['made'] == made:
      return report
    raise InputError(f'{folder} holds a FrameForge set with other arguments {report["made"]}; remove it or name '
                     'another folder')
  tasks = []
  for kind, count in counts.items():
    (folder / kind).mkdir(parents=True, exist_ok=True)
    tasks += [(kind, range(at, min(at + CHUNK, count)), seed, side, fps, str(folder)) for at in range(0, count, CHUNK)]
  rows, total = collections.defaultdict(list), sum(counts.values())
  for (kind, *_), part in zip(tasks, _each(tasks, processes)):
    rows[kind] += part
    if progress:
      progress(sum(map(len, rows.values())), total)
  for kind in counts:
    _write(folder / f'{kind}.jsonl', ''.join(json.dumps(row) + '\n' for row in rows[kind]))
  report = json.dumps({'made': made, **{kind: summary(rows[kind]) for kind in counts}}, indent=2)
  _write(done, report + '\n')
  return json.loads(report)


def summary(rows: list[dict]) -> dict:
  """Counts of one file, the majority answer of every question type with its share, and the best constant interval for
  the grounding questions, (start, end, mean IoU), in seconds and as shares of the clip's duration."""
  answers = collections.defaultdict(collections.Counter)
  for row in rows:
    kinds, texts = (row['type'], row['answer']) if 'branches' in row else ([row['type']], [row['answer']])
    for kind, text in zip(kinds, texts):
      answers[kind][text] += 1
  questions = {kind: sum(found.values()) for kind, found in sorted(answers.items())}
  majority = {kind: [answer, n / questions[kind]] for kind, ((answer, n),) in
              ((kind, found.most_common(1)) for kind, found in sorted(answers.items())) if kind != 'ground'}
  out = {'rows': len(rows), 'questions': questions, 'majority': majority}
  asked = [(*at, row['seconds']) for row in rows if 'branches' in row for at in row['interval'] if at]
  if asked:
    start_N, end_N, seconds_N = np.array(asked).T
    out['constant_interval'] = _best_constant(start_N, end_N, seconds_N.max())
    out['constant_share'] = _best_constant(start_N / seconds_N, end_N / seconds_N, 1.0)
  return out


def _best_constant(start_N, end_N, last) -> tuple[float, float, float]:
  places, best = np.linspace(0, last, 33), (0.0, 0.0, 0.0)
  for i, a in enumerate(places):
    for b in places[i + 1:]:
      shared_N = np.clip(np.minimum(b, end_N) - np.maximum(a, start_N), 0, None)
      best = max(best, (float(a), float(b), float((shared_N / (b - a + end_N - start_N - shared_N)).mean())),
                 key=lambda found: found[2])
  return best


def _each(tasks, processes):
  if processes < 2:
    yield from map(_make, tasks)
    return
  # Spawned, not forked: the caller may have threads of jax running.
  with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context('spawn')) as pool:
    yield from pool.map(_make, tasks)


def _make(task) -> list[dict]:
  kind, numbers, seed, side, fps, folder = task
  media = side, fps, pathlib.Path(folder)
  one = _picture if kind.endswith('images') else _clip
  return [one(kind, i, np.random.default_rng([seed, KINDS[kind], i]), *media) for i in numbers]


def _clip(split, i, rng, side, fps, folder) -> dict:
  plot, name = script.write(rng, teach=split == 'train'), f'{split}/{i:05d}.mp4'
  frames_FHW3, background = render.draw(rng, split, plot.events, plot.length, side, fps)
  render.write_mp4(folder / name, frames_FHW3, fps)
  asked = plot.questions
  return {
      'id': f'{split}-{i:05d}', 'videos': [name], 'messages': [{'role': 'user', 'content': '<video>'}],
      'branches': [[{'role': 'user', 'content': q.text}, {'role': 'assistant', 'content': q.message}] for q in asked],
      'type': [q.type for q in asked], 'answer': [q.answer for q in asked], 'interval': [q.interval for q in asked],
      'others': [list(q.others) for q in asked], 'seconds': plot.length * script.HALF, 'background': background,
      'events': {'digit': [e.digit for e in plot.events], 'interval': [e.interval for e in plot.events]}}


def _picture(kind, i, rng, side, fps, folder) -> dict:
  plot, name = script.write_still(rng), f'{kind}/{i:05d}.png'
  split = 'heldout' if kind.startswith('heldout') else 'train'
  frames_FHW3, background = render.draw(rng, split, plot.events, plot.length, side, fps)
  Image.fromarray(frames_FHW3[0]).save(folder / name, compress_level=1)
  question, = plot.questions
  return {
      'id': f'{kind}-{i:05d}', 'images': [name], 'type': question.type, 'answer': question.answer,
      'background': background, 'messages': [{'role': 'user', 'content': f'<image>{question.text}'},
                                             {'role': 'assistant', 'content': question.answer}]}


def _write(path: pathlib.Path, text: str) -> None:
  part = path.with_name(path.name + '.part')
  part.write_text(text, encoding='utf-8')
  part.replace(path)
