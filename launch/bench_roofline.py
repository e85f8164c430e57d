"""What this device can do at most, measured: floating-point operations and bytes a second, and the share of either that
a program reached. A measured roof, not the maker's: it is the one that code on this machine can touch.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from launch.bench_timing import timed


class Roofline(NamedTuple):
  flops: float         # a second, of matrix products in one dtype (as jax multiplies it by default)
  bandwidth: float     # bytes a second, read and written


def measure(dtype: str = 'float32', side: int = 2048, numbers: int = 1 << 26, tries: int = 5,
            calls: int = 1) -> Roofline:
  """Best of `tries` of a product of two square matrices of random numbers (a device multiplies zeros and ones faster),
  and of adding 1 to an array that no cache holds."""
  def best(fn, x):
    jax.block_until_ready(fn(x))
    return min(timed(fn, x, calls=calls)[0] for _ in range(tries))

  product, step = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
  matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
  size = 2 * matrix.dtype.itemsize * numbers
  return Roofline(2 * side ** 3 / best(product, matrix), size / best(step, jnp.ones(numbers, dtype)))


def fraction(roof: Roofline, flops: float, size: float, seconds: float) -> float | None:
  """The least time that `flops` and `size` bytes take under the roof, over the time taken; None when that is 0."""
  return max(flops / roof.flops, size / roof.bandwidth) / seconds if seconds > 0 else None
