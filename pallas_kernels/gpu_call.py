"""How the GPU kernels are called.

They are written in Pallas' Triton dialect, in which every array of a kernel has a power of two of elements. Arrays
arrive whole; a kernel reads and writes the parts that its program is for.
"""
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LOG2E = 1.4426950408889634
SMALLEST = 16            # features of a matrix product
INTERPRET = False        # tests interpret the kernels; read while tracing, as block sizes are


def call(kernel: Callable, grid: tuple[int, ...], arrays: Sequence[jax.Array], outputs: Sequence[jax.ShapeDtypeStruct],
         warps: int, stages: int, aliases: dict[int, int] | None = None) -> list[jax.Array]:
  """A Pallas call. aliases: {index in arrays: index in outputs} of buffers that are updated in place."""
  return pl.pallas_call(kernel, grid=grid, out_shape=list(outputs), input_output_aliases=aliases or {},
                        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
                        interpret=INTERPRET)(*arrays)


def ceil_pow2(n: int) -> int:
  """The smallest power of two that is at least n."""
  return 1 << max(n - 1, 0).bit_length()


def int32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def store(ref, place: tuple, value: jax.Array, mask: jax.Array) -> None:
  """ref[place] = value where mask is True. `place` has an index array, or a number, for each axis; all broadcast."""
  *front, last = place
  last = jnp.where(mask, last, ref.shape[-1])       # interpreted, what is masked is written too, but out of range
  triton.store(ref.at[*front, last], value, mask=mask)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """Matrix product with float32 accumulation; of float32 arrays in full precision."""
  return jnp.dot(a, b, precision='highest' if a.dtype == jnp.float32 else None, preferred_element_type=jnp.float32)
