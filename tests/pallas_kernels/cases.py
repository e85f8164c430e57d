"""Inputs for the attention ops: every kind of row the pipeline or a cache can produce, small.

B batch, T query time, S key time, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim.
"""
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
  q: np.ndarray              # [B, T, H, K]
  k: np.ndarray              # [B, S, G, K]
  v: np.ndarray
  iq: np.ndarray             # [B, T, I, J]
  ik: np.ndarray             # [B, S, J]
  gate: np.ndarray           # [B, T, I]
  q_segment: np.ndarray      # [B, T]
  k_segment: np.ndarray      # [B, S]
  q_order: np.ndarray
  k_order: np.ndarray

  @property
  def dense(self):
    return self.q, self.k, self.v, *self[6:]

  @property
  def index(self):
    return self[3:]

  def cast(self, dtype):
    """Inputs of the model in `dtype`; gates are always float32."""
    arrays = [jnp.asarray(x, dtype) for x in self[:5]]
    return Case(*arrays, jnp.asarray(self.gate, jnp.float32), *map(jnp.asarray, self[6:]))


def segments(rng, length: int, layout: str) -> np.ndarray:
  """Segment ids of one row."""
  if layout == 'one':                       # one sample fills the row
    return np.full(length, 1 << 8)
  if layout == 'packed':                    # samples of random lengths, one of a single token, padding behind
    cuts = np.sort(rng.integers(0, length, 3))
    sample = np.searchsorted(cuts, np.arange(length), side='right') + 1
    sample[0] = 9
    return np.where(np.arange(length) < length - length // 8, sample << 8, 0)
  if layout == 'branches':                  # a trunk, three branches, a second sample
    branch = np.repeat([0, 1, 2, 3], [length // 3, length // 6, length // 6, length // 6])
    first = 1 << 8 | branch
    return np.concatenate([first, np.full(length - len(first), 2 << 8)])
  raise ValueError(layout)


def make(seed: int = 0, B: int = 2, T: int = 40, S: int | None = None, H: int = 4, G: int = 2, K: int = 8, I: int = 2,
         J: int = 8, layout: str = 'branches', shuffle: bool = False, index: str = 'integers') -> Case:
  """S keys of which the last T are queries. `shuffle` permutes the row's tokens; orders travel with them.

  index='integers': index queries, keys and gates are small integers. Scores are then exact in any order of summation,
  with many ties, zeros and negative zeros, so every implementation must choose the very same set.
  """
  rng = np.random.default_rng(seed)
  S = T if S is None else S
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  small = lambda *shape: rng.integers(-2, 3, shape).astype(np.float32)
  draw = {'integers': small, 'normal': normal}[index]
  q, k, v = normal(B, S, H, K), normal(B, S, G, K), normal(B, S, G, K)
  iq, ik, gate = draw(B, S, I, J), draw(B, S, J), draw(B, S, I) / 4
  segment = np.stack([segments(rng, S, layout) for _ in range(B)]).astype(np.int32)
  order = np.tile(np.arange(S, dtype=np.int32), (B, 1))
  if shuffle:
    place = rng.permutation(S)
    q, k, v, iq, ik, gate, segment, order = (x[:, place] for x in (q, k, v, iq, ik, gate, segment, order))
  last = slice(S - T, None)
  return Case(q[:, last], k, v, iq[:, last], ik, gate[:, last], segment[:, last], segment, order[:, last], order)
