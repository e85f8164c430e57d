"""What this device can do at most, measured: floating-point operations and bytes a second, and the share of either that
a program reached. A measured roof, not the maker's: it is the one that code on this machine can touch.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from launch import bench_model


class Roofline(NamedTuple):
  flops: float         # a second, of float32 matrix products (as jax multiplies them by default)
  bandwidth: float     # bytes a second, read and written


def measure(side: int = 2048, numbers: int = 1 << 26, tries: int = 5) -> Roofline:
  """Best of `tries` of a product of two square matrices, and of adding 1 to an array that no cache holds."""
  def best(fn, x):
    jax.block_until_ready(fn(x))
    return min(bench_model.timed(fn, x)[0] for _ in range(tries))

  product, step = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
  return Roofline(2 * side ** 3 / best(product, jnp.ones((side, side))),
                  2 * 4 * numbers / best(step, jnp.ones(numbers)))


def fraction(roof: Roofline, flops: float, size: float, seconds: float) -> float | None:
  """The least time that `flops` and `size` bytes take under the roof, over the time taken; None when that is 0."""
  return max(flops / roof.flops, size / roof.bandwidth) / seconds if seconds > 0 else None
