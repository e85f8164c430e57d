"""Three-dimensional rotary positions (time, height, width) of text, images and frames.

Rule of Keye-VL-2.0's `get_rope_index_keye`: text advances all three axes by one a token. Each image and each frame
is a grid of its own, one step thick: time = base, height = base + row, width = base + column on the merged grid, with
base = largest position so far + 1; what follows starts at the new largest + 1. A frame therefore advances positions
by max(rows, columns), not by its number of tokens.
"""
import functools
from collections.abc import Iterable

import numpy as np


def positions(spans: Iterable[int | tuple[int, int]], base: int = 0) -> tuple[np.ndarray, int]:
  """Positions of a sequence of spans: an int is that many text tokens, a pair is a grid of (rows, columns) tokens.

  Returns (position_T3 int32, the position of whatever comes next).
  """
  runs, text = [np.zeros((0, 3), np.int32)], 0
  for span in spans:
    if isinstance(span, tuple):
      runs += [_text(base - text, base), _grid(*span) + np.int32(base)]
      base, text = base + max(span), 0
    else:
      base, text = base + span, text + span         # spans of text that follow each other are one run
  return np.concatenate([*runs, _text(base - text, base)]), base


def _text(start: int, stop: int) -> np.ndarray:
  """Positions [stop - start, 3] of tokens of text."""
  return np.arange(start, stop, dtype=np.int32).repeat(3).reshape(-1, 3)


@functools.lru_cache(maxsize=256)
def _grid(rows: int, columns: int) -> np.ndarray:
  """Offsets [rows * columns, 3] inside a grid, row-major."""
  out = np.zeros((rows, columns, 3), np.int32)
  out[..., 1] = np.arange(rows)[:, None]
  out[..., 2] = np.arange(columns)
  out = out.reshape(-1, 3)
  out.flags.writeable = False
  return out
