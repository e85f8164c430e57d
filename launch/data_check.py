"""Every row and medium of a file read as training would read it, in several processes: what is there, what is bad."""
import collections
import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines import packing, pipeline, sources
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig

_load: pipeline.Load | None = None        # of a worker process


class Found(NamedTuple):
  """What one row holds."""
  reason: str = ''                     # class of fault, '' when the row can be used
  message: str = ''
  tokens: int = 0
  patches: int = 0
  images: int = 0
  seconds: tuple[float, ...] = ()      # of each video
  kinds: tuple[str, ...] = ()          # of each question: "type", else "data_source"


def check(path: str, config, workers: int = 1) -> dict[str, Any]:
  """Reads every row of `path`, as training would with `config` (a RunConfig; None: no limits of shape).

  Returns counts, {'rows', 'usable', 'images', 'videos', 'reasons', 'kinds'}; spreads of the usable rows, 'tokens' and
  'patches' a row and 'seconds' a video, as {'least', 'median', 'mean', 'most', 'total', 'histogram': [[from, below,
  count]]} with powers of two for bounds; and 'unusable', a message a bad row that names file, row and reason.
  Raises InputError when the file cannot be read or a worker process dies.
  """
  data, patch, merge = DataConfig(path=path, tokens=1 << 40, vision_rows=1, vision_patches=1 << 40), 14, 2
  if config:
    vision = config.model.vision
    data, patch, merge = dataclasses.replace(config.data, path=path, sources=(), cache_mb=0), vision.patch, vision.merge
  rows = len(sources.Rows(path))
  found = list(tqdm(_each(rows, (data, patch, merge), min(workers, rows)), 'rows', rows, unit='row', leave=False))
  good = [f for f in found if not f.reason]
  seconds = [s for f in good for s in f.seconds]
  return {'rows': rows, 'usable': len(good), 'images': sum(f.images for f in good), 'videos': len(seconds),
          'seconds': spread(seconds), 'tokens': spread([f.tokens for f in good]),
          'patches': spread([f.patches for f in good]),
          'kinds': dict(collections.Counter(k for f in good for k in f.kinds).most_common()),
          'reasons': dict(collections.Counter(f.reason for f in found if f.reason).most_common()),
          'unusable': [f.message for f in found if f.reason]}


def spread(values: Sequence[float]) -> dict[str, Any]:
  """Least, median, mean, most, total and a histogram between powers of two; {} of nothing."""
  if not values:
    return {}
  value_N = np.asarray(values, np.float64)
  bounds = np.array([0, *2.0 ** np.arange(0, max(np.ceil(np.log2(value_N.max() + 1)), 1) + 1)])
  counts, _ = np.histogram(value_N, bounds)
  histogram = [[int(a), int(b), int(n)] for a, b, n in zip(bounds, bounds[1:], counts)]
  while len(histogram) > 1 and not histogram[-1][2]:
    histogram.pop()
  while len(histogram) > 1 and not histogram[0][2]:
    histogram.pop(0)
  number = {'least': value_N.min(), 'median': np.median(value_N), 'mean': value_N.mean(), 'most': value_N.max(),
            'total': value_N.sum()}
  return {name: round(float(v), 2) for name, v in number.items()} | {'histogram': histogram}


def lines(made: dict[str, Any]) -> list[str]:
  """The report as text."""
  out = [f'rows: {made["rows"]}', f'usable: {made["usable"]}', f'images: {made["images"]}', f'videos: {made["videos"]}']
  for name, unit in (('tokens', 'a row'), ('patches', 'a row'), ('seconds', 'a video')):
    if found := made[name]:
      shown = ', '.join(f'{key} {found[key]:g}' for key in ('least', 'median', 'mean', 'most'))
      out.append(f'{name} {unit}: {shown}; {found["total"]:g} in all')
      if name != 'patches':
        most = max(n for *_, n in found['histogram'])
        out += [f'  {f"{a} - {b}":>17} {n:>8} {"#" * -(-n * 40 // most)}' for a, b, n in found['histogram']]
  for name in ('kinds', 'reasons'):
    out += [f'{name}: ' + ', '.join(f'{key} {n}' for key, n in made[name].items())] if made[name] else []
  return out


def _each(rows: int, args: tuple, workers: int) -> Iterator[Found]:
  if workers < 2:
    load = pipeline.Load(*args, strict=True)
    yield from (measure(load, i) for i in range(rows))
    return
  done = 0
  # Spawned, not forked: the caller may have threads of jax running.
  with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), _start, args) as pool:
    try:
      for found in pool.map(_measure, range(rows), chunksize=max(1, min(16, rows // (4 * workers)))):
        yield found
        done += 1
    except BrokenProcessPool:
      raise InputError(f'{args[0].path}: a process died soon after row {done}, out of memory or by a crash in a '
                       'decoder; --workers 1 shows where') from None


def _start(*args) -> None:
  global _load
  _load = pipeline.Load(*args, strict=True)


def _measure(i: int) -> Found:
  return measure(_load, i)


def measure(load: pipeline.Load, i: int) -> Found:
  """What row i holds, or why it cannot be used."""
  try:
    example, turns = load.read(i)
    if why := packing.misfit(example, load.shape):
      return Found('too long', f'{example.source}: {why}')
    extra = load.rows[i].extra
  except sources.BadRow as e:
    return Found(e.reason, str(e))
  media = [part for turn in turns for part in turn.parts]
  kinds = extra.get('type') or extra.get('data_source') or ()
  return Found(tokens=len(example.token_T), patches=len(example.patch_PC), images=sum(k == 'image' for k, _ in media),
               seconds=tuple(clip.duration for kind, clip in media if kind == 'video'),
               kinds=tuple(map(str, kinds)) if isinstance(kinds, list) else (str(kinds),) if kinds else ())
