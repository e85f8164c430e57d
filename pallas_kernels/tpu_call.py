"""How the TPU kernels are called, and small forms that their vector units like.

T rows (sublanes), S columns (lanes).
"""
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
INTERPRET = False        # tests interpret the kernels; read while tracing, as tile sizes are


def call(kernel: Callable, grid: tuple, prefetch: Sequence[jax.Array], arrays: Sequence[jax.Array],
         in_specs: Sequence[pl.BlockSpec], outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
         scratch: Sequence, parallel: tuple[bool, ...], vmem: int, aliases: dict[int, int] | None = None):
  """A Pallas call; `prefetch` are the int32 arrays that block indices may depend on. Grid sizes may be traced.

  vmem: bytes that the kernel may take. aliases: {index in arrays: index in outputs} of buffers updated in place.
  """
  spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(prefetch), grid=grid, in_specs=in_specs,
                                      out_specs=[s for _, s in outputs], scratch_shapes=scratch)
  params = pltpu.CompilerParams(dimension_semantics=tuple('parallel' if p else 'arbitrary' for p in parallel),
                                vmem_limit_bytes=vmem)
  aliases = {len(prefetch) + i: o for i, o in (aliases or {}).items()}
  return pl.pallas_call(kernel, grid_spec=spec, out_shape=[shape for shape, _ in outputs], compiler_params=params,
                        input_output_aliases=aliases, interpret=INTERPRET)(*prefetch, *arrays)


def whole(x: jax.Array) -> pl.BlockSpec:
  """Of a kernel that goes over key tiles: a block that stays on the chip for all of them."""
  return pl.BlockSpec(x.shape, lambda n, tile: (0,) * x.ndim)


def tiled(x: jax.Array) -> pl.BlockSpec:
  """The tile at work, of an array that leads with the key tile."""
  return pl.BlockSpec((1, *x.shape[1:]), lambda n, tile: (tile[n], *[0] * (x.ndim - 1)))


def float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def column(x_1T: jax.Array) -> jax.Array:
  """[1, T] -> [T, 1], as a masked sum over a diagonal."""
  return jnp.where(_diagonal(x_1T.shape[1]), x_1T, jnp.zeros_like(x_1T)).sum(1, keepdims=True)


def row(x_T1: jax.Array) -> jax.Array:
  """[T, 1] -> [1, T]."""
  return jnp.where(_diagonal(x_T1.shape[0]), x_T1, jnp.zeros_like(x_T1)).sum(0, keepdims=True)


def _diagonal(T: int) -> jax.Array:
  iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (T, T), axis)
  return iota(0) == iota(1)
