"""Memory of clips, which is large: it changes hands without being there twice.

A worker process copies what it made into shared memory and frees its own afterwards. Here pages are given back while
they are copied.
"""
import math
import mmap
from collections.abc import Callable

import numpy as np

STEP = 1 << 24         # bytes copied between two returns of pages; a multiple of any page


def pages(shape: tuple[int, ...]) -> np.ndarray:
  """uint8 zeros, not of size 0, in pages of their own."""
  return np.ndarray(shape, np.uint8, mmap.mmap(-1, math.prod(shape), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def moved(array: np.ndarray, empty: Callable[[tuple[int, ...], np.dtype], np.ndarray]) -> np.ndarray:
  """The array in memory that `empty(shape, dtype)` makes, its own given back; as it is when it is not all of `pages`.

  The values of `array` are lost. One that somebody keeps has to be read-only: it stays where it is.
  """
  owner = array.base
  while isinstance(owner, np.ndarray):
    owner = owner.base
  if not (isinstance(owner, mmap.mmap) and array.flags.c_contiguous and array.flags.writeable
          and array.nbytes == len(owner)):
    return array
  new = empty(array.shape, array.dtype)
  source, target = array.reshape(-1), new.reshape(-1)
  for start in range(0, array.nbytes, STEP):
    part = slice(start, min(start + STEP, array.nbytes))
    target[part] = source[part]
    owner.madvise(mmap.MADV_DONTNEED, start, part.stop - start)
  return new
