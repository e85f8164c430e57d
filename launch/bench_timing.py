"""How long a program takes on the device that jax runs on."""
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def timed(fn: Callable, *args, calls: int = 1) -> tuple[float, object]:
  """(seconds of one call, the last result). A device works through several calls one after the other, so that what it
  costs to start one does not count."""
  start = time.perf_counter()
  for _ in range(calls):
    out = fn(*args)
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / calls, out


PROBE = 1024             # rows and columns of the fixed matrix product
PROBE_FLOPS = 2 * PROBE ** 3


def probe() -> Callable[[], float]:
  """Best of five of a fixed matrix product (seconds), which shows whether the machine keeps its speed."""
  a = jnp.ones((PROBE, PROBE))
  product = jax.jit(lambda a: a @ a)
  jax.block_until_ready(product(a))
  return lambda: min(timed(product, a)[0] for _ in range(5))
