"""How far a score can be trusted: intervals at 95% and paired comparisons.

Questions of one clip are not independent: they are resampled together.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054     # 97.5% quantile of the normal distribution


class Relative(NamedTuple):
  """Of two systems' losses on the same answers."""
  value: float              # sum of the first over the sum of the second, minus 1
  low: float                # 95% bootstrap interval over clips
  high: float


class Difference(NamedTuple):
  """Of two systems on the same questions."""
  value: float              # mean of first - second
  low: float                # 95% bootstrap interval over clips
  high: float
  first_better: int         # questions
  second_better: int
  p: float                  # exact two-sided sign test over clips with different totals


def wilson(hits: int, n: int) -> tuple[float, float]:
  """Wilson's score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001)."""
  if not 0 <= hits <= n or n == 0:
    raise ValueError(f'{hits} of {n} is no share')
  p, z2 = hits / n, Z * Z / n
  middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
  return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def bootstrap(values: Sequence[float], clips: Sequence[str], rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
  """Percentile interval of the mean of `values`, drawing whole clips with replacement."""
  sums, counts = _by_clip(values, clips)
  draws = np.random.default_rng(seed).integers(len(sums), size=(rounds, len(sums)))
  means = sums[draws].sum(1) / counts[draws].sum(1)
  low, high = np.quantile(means, (0.025, 0.975))
  return float(low), float(high)


def relative(first: Sequence[float], second: Sequence[float], clips: Sequence[str], rounds: int = 2000,
             seed: int = 0) -> Relative:
  """How much more the first loses, by the total over whole clips drawn with replacement."""
  if not len(first) == len(second) == len(clips) or not len(first):
    raise ValueError(f'relative loss of {len(first)} and {len(second)} values and {len(clips)} clips')
  (mine, _), (theirs, _) = (_by_clip(values, clips) for values in (first, second))
  draws = np.random.default_rng(seed).integers(len(mine), size=(rounds, len(mine)))
  low, high = np.quantile(mine[draws].sum(1) / theirs[draws].sum(1) - 1, (0.025, 0.975))
  return Relative(float(mine.sum() / theirs.sum() - 1), float(low), float(high))


def paired(first: Sequence[float], second: Sequence[float], clips: Sequence[str], rounds: int = 2000,
           seed: int = 0) -> Difference:
  """Compares what two systems earned on the same questions."""
  if not len(first) == len(second) == len(clips) or not len(first):
    raise ValueError(f'paired comparison of {len(first)}, {len(second)} values and {len(clips)} clips')
  delta = np.asarray(first, np.float64) - np.asarray(second, np.float64)
  low, high = bootstrap(delta, clips, rounds, seed)
  totals, _ = _by_clip(delta, clips)
  wins, losses = int((totals > 1e-12).sum()), int((totals < -1e-12).sum())
  return Difference(float(delta.mean()), low, high, int((delta > 0).sum()), int((delta < 0).sum()),
                    sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
  """Exact two-sided p of `wins` against `losses` under a fair coin."""
  n = wins + losses
  tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2 ** n
  return min(1.0, 2 * tail)


def _by_clip(values, clips):
  _, index = np.unique(np.asarray(clips), return_inverse=True)
  return (np.bincount(index, np.asarray(values, np.float64)), np.bincount(index))
