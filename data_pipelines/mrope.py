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
  parts = [np.zeros((0, 3), np.int32)]
  for span in spans:
    if isinstance(span, tuple):
      parts.append(_grid(*span) + np.int32(base))
      base += max(span)
    else:
      parts.append(np.broadcast_to(np.arange(base, base + span, dtype=np.int32)[:, None], (span, 3)))
      base += span
  return np.concatenate(parts), base


@functools.lru_cache(maxsize=256)
def _grid(rows: int, columns: int) -> np.ndarray:
  """Offsets [rows * columns, 3] inside a grid, row-major."""
  out = np.zeros((rows, columns, 3), np.int32)
  out[..., 1] = np.arange(rows)[:, None]
  out[..., 2] = np.arange(columns)
  out = out.reshape(-1, 3)
  out.flags.writeable = False
  return out
