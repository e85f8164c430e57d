"""The frozen base of a run with adapters in 8 bits: w is close to q * scale, q int8, one float32 scale a channel made.

Symmetric, by the largest magnitude: scale = max |w| / 127 over what a product contracts, of experts for each expert by
itself, so |w - q scale| <= scale / 2. Weights alone: a product takes q in the dtype of its rows and is then multiplied
by the scale (`layers.project`; tile by tile in `pallas_kernels/grouped_matmul/adapted.py`), so no float copy of a stack
of matrices exists. `lora.in_int8` says which weights; of the published model they are 30.3 of 31.1 billion parameters,
30 GB where bfloat16 has 61. The scales lie beside them in the tree, 'q_int8_scale'.

qwix (QLoRA for Linen) is not used. It finds weights by watching `einsum` and `dot_general` inside a module for operands
that are a parameter after reshapes and casts; here expert products are loops over tiles inside a custom gradient, which
read a matrix by a traced index, and it would see none of them.

L layers, E experts; of one weight: I, J axes that it contracts, O, P axes that it makes.
"""
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.sharding import SCALE

LARGEST = 127
Axes = dict[str, tuple[int, int]]       # {path: (leading axes, axes that are contracted)} of weights


class Eight(NamedTuple):
  """A weight in 8 bits, as one leaf of a tree that is being read."""
  q: jax.Array
  scale: jax.Array


def quantised(axes: Axes, params: dict[str, Any]) -> dict[str, Any]:
  """Parameters with those weights in 8 bits, made one after the other; each is given up for its own. What is in 8 bits
  already stays."""
  def walk(tree, path=()):
    out = {}
    for name, value in tree.items():
      at = (*path, name)
      if isinstance(value, dict):
        out[name] = walk(value, at)
        continue
      if '/'.join(at) in axes and not isinstance(value, Eight) and value.dtype != jnp.int8:
        value = exchanged(value, *axes['/'.join(at)])
      if isinstance(value, Eight):
        out[name], out[name + SCALE] = value
      else:
        out[name] = value
    return out
  return walk(params)


def exchanged(w: jax.Array, stack: int, inner: int) -> Eight:
  """`quantise`, for which w is given up."""
  found = quantise(w, stack, inner)
  give_up(w)
  return found


def give_up(x: jax.Array) -> None:
  """Frees the memory of an array, whoever still holds it. Nothing while tracing."""
  if not isinstance(x, jax.core.Tracer):
    x.delete()


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantise(w: jax.Array, stack: int, inner: int) -> Eight:
  """[stack..., in..., out...] -> q of its shape, scale float32 [stack..., out...]; a layer at a time. stack: leading
  axes that are not part of a product, layers first; inner: axes that a product contracts."""
  return Eight(*jax.lax.map(lambda w: one_layer(w, stack, inner), w))


def one_layer(w: jax.Array, stack: int, inner: int) -> tuple[jax.Array, jax.Array]:
  w = w.astype(jnp.float32)
  contracted = range(stack - 1, stack - 1 + inner)
  scale = jnp.abs(w).max(tuple(contracted)) * np.float32(1 / LARGEST)
  step = jnp.expand_dims(jnp.where(scale > 0, scale, 1), tuple(contracted))
  return jnp.clip(jnp.round(w / step), -LARGEST, LARGEST).astype(jnp.int8), scale


def dequantised(q: jax.Array, scale: jax.Array, stack: int) -> jax.Array:
  """q * scale in float32. q: [stack..., in..., out...]."""
  return q.astype(jnp.float32) * jnp.expand_dims(scale, tuple(range(stack, stack + q.ndim - scale.ndim)))


def cast(params: Any, dtype: str) -> Any:
  """`params` in `dtype`, but for weights in 8 bits and their scales."""
  def one(path, x):
    return x if x.dtype == jnp.int8 or path[-1].key.endswith(SCALE) else x.astype(dtype)
  return jax.tree_util.tree_map_with_path(one, params)


def placing(axes: Axes, place: Callable[[ModelConfig], Callable]) -> Callable[[ModelConfig], Callable]:
  """`place` of a folder's reader (`hf/reader.py`: Place) that puts those weights on the device as `Eight`: without a
  mesh never more than a layer of one in float, under a mesh one weight."""
  def at_work(model: ModelConfig):
    plain = place(model)

    def one(path, shape, dtype, fetch):
      if path not in axes:
        return plain(path, shape, dtype, fetch)
      stack, inner = axes[path]
      if sharding.has_mesh():
        return exchanged(plain(path, shape, dtype, fetch), stack, inner)
      whole = Eight(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:stack] + shape[stack + inner:], jnp.float32))
      for i in range(shape[0]):
        layer = fetch((slice(i, i + 1), *(slice(0, n) for n in shape[1:])))
        whole = _put(whole, jax.device_put(layer[0]), i, stack, inner)
      return whole
    return one
  return at_work


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _put(whole: Eight, w: jax.Array, layer: int, stack: int, inner: int) -> Eight:
  new = Eight(*one_layer(w, stack, inner))
  return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, layer, 0), whole, new)
