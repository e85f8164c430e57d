"""Who owns which page of a pool, kept on the host: pages are taken when a sequence needs room, and free again when the
last sequence that uses them has ended.

A page that a prompt fills is used by all sequences that begin with the very same tokens of a row (the questions of a
clip, the samples of a prompt) and never written again; each has the page it grows into for itself.
"""
import heapq

import numpy as np

from pallas_kernels.mask import visible


class Pool:
  """`total` pages exist; the device's pool must have as many. A sequence is a number."""

  def __init__(self, size: int):
    self.size, self.total = size, 0
    self.free: list[int] = []                    # a heap: low pages first
    self.users: dict[int, int] = {}              # page in use -> sequences that use it
    self.pages: dict[int, list[int]] = {}        # sequence -> its pages
    self.lengths: dict[int, int] = {}            # sequence -> its tokens

  def begin(self, sequences: dict[int, np.ndarray]) -> np.ndarray:
    """Takes pages for prompts: sequence -> int ids of its tokens, equal ids for tokens with the same keys.

    Returns the ids that each page holds, [total, size] with -1 for nothing.
    """
    full, held = {}, {}
    for sequence, ids in sequences.items():
      own = self.pages[sequence] = []
      self.lengths[sequence] = len(ids)
      for at in range(0, len(ids), self.size):
        part = tuple(ids[at:at + self.size].tolist())
        page = full.get(part)
        if page is None:
          page = self._take()
          held[page] = part
          if len(part) == self.size:
            full[part] = page
        else:
          self.users[page] += 1
        own.append(page)
    out = np.full((self.total, self.size), -1, np.int32)
    for page, part in held.items():
      out[page, :len(part)] = part
    return out

  def grow(self, sequence: int) -> None:
    """Room for one more token."""
    if self.lengths[sequence] % self.size == 0:
      self.pages[sequence].append(self._take())
    self.lengths[sequence] += 1

  def end(self, sequence: int) -> None:
    for page in self.pages.pop(sequence):
      self.users[page] -= 1
      if not self.users[page]:
        del self.users[page]
        heapq.heappush(self.free, page)
    del self.lengths[sequence]

  def table(self, sequences: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(pages [sequences, width], tokens [sequences]) of sequences 0, 1, ...; 0 tokens for one that has ended."""
    page_BN, length_B = np.zeros((sequences, width), np.int32), np.zeros(sequences, np.int32)
    for sequence, pages in self.pages.items():
      page_BN[sequence, :len(pages)], length_B[sequence] = pages, self.lengths[sequence]
    return page_BN, length_B

  def _take(self) -> int:
    if self.free:
      page = heapq.heappop(self.free)
    else:
      page, self.total = self.total, self.total + 1
    self.users[page] = 1
    return page


def prompts(segment_BT: np.ndarray, order_BT: np.ndarray, last_BQ: np.ndarray) -> dict[int, np.ndarray]:
  """Sequence b * Q + q -> the tokens that the last prompt token of branch q of row b sees, in order, as places of the
  rows laid end to end. Branches that do not exist (last -1) are left out."""
  T, Q = segment_BT.shape[1], last_BQ.shape[1]
  out = {}
  for b, q in zip(*np.nonzero(last_BQ >= 0)):
    segment_T, order_T, last = segment_BT[b], order_BT[b], last_BQ[b, q]
    seen = np.flatnonzero(visible(segment_T[last], segment_T, order_T[last], order_T, causal=True))
    out[int(b * Q + q)] = b * T + seen[np.argsort(order_T[seen], kind='stable')]
  return out
