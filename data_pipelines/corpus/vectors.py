"""What a medium is like, in a vector of some model: media whose directions nearly agree are taken for one.

A medium becomes PLACES frames at fixed shares of its length (a picture one), a function that is handed in makes a
vector of them, and its direction is kept in whole numbers, as a vector LENGTH long. Products of two, and all parts of
their sums, are then whole numbers below 2**24, which float32 adds exactly: which rows are dropped depends neither on
the order of a sum nor on how rows are cut into blocks.

Letters: F frames, W width of a vector, M media of a row, N rows, K rows that are kept.
"""
import base64
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.corpus import looks

PLACES = looks.PLACES
LENGTH = 4000            # of a direction in whole numbers; a product of two is at most its square, 1.6e7 < 2**24
BLOCK = 1024             # rows compared at a time

# uint8 frames [F, H, W, 3] of one medium -> float [W]. Must be picklable, and the same everywhere.
Embed = Callable[[np.ndarray], np.ndarray]


def vector(embed: Embed, kind: str, medium: Any) -> str:
  """'image' or 'video', a space, and the direction in base64. kind, medium: as of `looks.look`."""
  frames_FHW3 = medium[None] if kind == 'image' else medium.frames_FHW3
  if kind != 'image':
    place_A = (np.arange(PLACES) + 0.5) * (medium.duration / PLACES)
    frames_FHW3 = frames_FHW3[np.abs(medium.seconds_F[:, None] - medium.seconds_F[0] - place_A).argmin(0)]
  found_W = np.asarray(embed(frames_FHW3), np.float64)
  length = np.linalg.norm(found_W)
  whole_W = np.round(found_W * (LENGTH / length if length > 0 else 0)).astype('<i2')
  return f'{kind} {base64.b64encode(whole_W).decode()}'


def kinds(vectors: Sequence[str]) -> str:
  return '.'.join(v.partition(' ')[0] for v in vectors)


def directions(vectors: Sequence[str]) -> np.ndarray:
  """float32 [len(vectors), W] of whole numbers. All of one width."""
  return np.stack([np.frombuffer(base64.b64decode(v.partition(' ')[2]), '<i2') for v in vectors]).astype(np.float32)


def likeness(a_NW: np.ndarray, b_KW: np.ndarray) -> np.ndarray:
  """Cosines, float64 [N, K]; 0 with a vector of zeros."""
  size = lambda x: np.maximum(np.linalg.norm(x.astype(np.float64), axis=1), 1)
  return (a_NW @ b_KW.T) / size(a_NW)[:, None] / size(b_KW)


def nearest(held_KW: np.ndarray, vector: str) -> tuple[int, float]:
  """(row, cosine) of what is most like one vector."""
  found_K = likeness(directions([vector]), held_KW)[0]
  return int(found_K.argmax()), float(found_K.max())


def repeated(rows_NMW: np.ndarray, least: float) -> Iterator[tuple[int, int]]:
  """(earlier row, row) where all media of a row are at least so like those of an earlier one that repeats none itself.

  A row that repeats is compared with, but none is dropped for it. Costs N K M W multiplications, and memory for BLOCK^2
  cosines at a time beside the rows.
  """
  kept: list[int] = []

  def like(a_NMW, b_KMW):
    found = [likeness(a_NMW[:, m], b_KMW[:, m]) for m in range(rows_NMW.shape[1])]
    return np.min(found, 0) >= least

  for start in range(0, len(rows_NMW), BLOCK):
    block = rows_NMW[start:start + BLOCK]
    earlier: dict[int, list[int]] = {i: [] for i in range(len(block))}
    for at in range(0, len(kept), BLOCK):
      some = kept[at:at + BLOCK]
      for i, k in zip(*np.nonzero(like(block, rows_NMW[some]))):
        earlier[int(i)].append(some[k])
    within = like(block, block)
    new: list[int] = []
    for i, found in earlier.items():
      found += [start + j for j in new if within[i, j]]
      if not found:
        new.append(i)
      yield from ((a, start + i) for a in found)
    kept += [start + j for j in new]
