"""Low-rank adapters (LoRA, arXiv 2106.09685): h = x W + alpha / rank * (x A) B, with W frozen.

A pair is applied where its weight is used (`layers.project`, `experts.moe`), not added into it. A sum would be a second
copy of a layer's weights (1.2 GB in bfloat16 for the published model, of which 48 layers without recomputation would be
57 GB), its backward pass would form the gradient of the whole layer in float32 (2.4 GB) with a third of the step's
products, and bfloat16 would round away updates smaller than 1/256 of a weight. Applied, a layer costs [tokens, rank]
values a weight, and gradients and optimizer state exist for A and B alone.

Pairs lie beside their weights in the tree: 'layers/attn/q_lora' holds {'a': [L, in..., rank], 'b': [L, rank, out...]},
float32; those of experts lead with [L, E], a pair an expert. On a mesh in... and out... lie as they do in the weight,
which has its place from `sharding.LAYOUTS`; rank is whole.

L layers, E experts; of one weight: I, J axes that it contracts, O, P axes that it makes.
"""
import fnmatch
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines.errors import InputError
from keye_jax import sharding
from keye_jax.config import LoraConfig, ModelConfig, RunConfig
from keye_jax.nn import int8
from keye_jax.sharding import ADAPTER, SCALE


def weights(model: ModelConfig) -> dict[str, tuple[int, int]]:
  """{path: (leading axes, axes that are contracted)} of the weights that can have an adapter."""
  stack = 2 if model.text.experts else 1
  text = {'attn/q': (1, 1), 'attn/k': (1, 1), 'attn/v': (1, 1), 'attn/o': (1, 2), 'mlp/gate_up': (stack, 1),
          'mlp/down': (stack, 1)}
  vision = {'q': (1, 1), 'k': (1, 1), 'v': (1, 1), 'o': (1, 2), 'fc1': (1, 1), 'fc2': (1, 1)}
  return {f'layers/{k}': n for k, n in text.items()} | (
      {f'vision/layers/{k}': n for k, n in vision.items()} if model.vision.layers else {})


def targets(config: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, int]]:
  """The part of `weights` that a pattern of the config matches ('*' stands for any characters, '/' too).

  Raises InputError for a pattern that matches nothing.
  """
  known = weights(model)
  for pattern in config.targets:
    if not fnmatch.filter(known, pattern):
      raise InputError(f'lora.targets: {pattern!r} matches no weight that can have an adapter; there are '
                       f'{", ".join(known)}')
  return {path: axes for path, axes in known.items() if any(fnmatch.fnmatchcase(path, p) for p in config.targets)}


def in_int8(config: RunConfig) -> dict[str, tuple[int, int]]:
  """The part of `weights` that a run has in 8 bits (`int8.py`): with lora.base = 'int8' all of it, with a pair or
  without, that `train.freeze` does not thaw."""
  if config.lora.base != 'int8':
    return {}
  thawed = [entry[1:] for entry in config.train.freeze if entry.startswith('!')]
  below = lambda path, entry: not entry or (path + '/').startswith(entry + '/')
  return {path: axes for path, axes in weights(config.model).items() if not any(below(path, e) for e in thawed)}


def freeze(config: RunConfig) -> tuple[str, ...]:
  """Entries for `steps.state.split`: beside adapters the whole base is frozen, but for what '!...' of train.freeze
  thaws. Adapters themselves are never frozen."""
  return ('', *config.train.freeze) if config.lora.targets else config.train.freeze


def init(config: LoraConfig, model: ModelConfig, params: Any, key: jax.Array) -> dict[str, Any]:
  """New pairs for `params`, as a tree of their own: A normal with variance 1 / inputs, B zero, so that the model begins
  as its base (section 4.1). params: nested dict of arrays or traced values; only shapes and shardings are read."""
  found: dict[str, Any] = {}
  for i, (path, (stack, inner)) in enumerate(targets(config, model).items()):
    *above, name = path.split('/')
    w, tree = functools.reduce(lambda t, k: t[k], path.split('/'), params), found
    for group in above:
      tree = tree.setdefault(group, {})
    lead, into, out = w.shape[:stack], w.shape[stack:stack + inner], w.shape[stack + inner:]
    a = jax.random.normal(jax.random.fold_in(key, i), (*lead, *into, config.rank)) * math.prod(into) ** -0.5
    tree[name + ADAPTER] = {'a': _beside(a, w, (*range(stack + inner), None)),
                            'b': _beside(jnp.zeros((*lead, config.rank, *out)), w,
                                         (*range(stack), None, *range(stack + inner, w.ndim)))}
  return found


def _beside(x: jax.Array, w: jax.Array, axes: tuple[int | None, ...]) -> jax.Array:
  """`x` sharded as those axes of `w` that its own are."""
  if not sharding.has_mesh():
    return x
  spec = jax.typeof(w).sharding.spec
  return jax.sharding.reshard(x, jax.P(*(None if i is None or i >= len(spec) else spec[i] for i in axes)))


def scaled(config: LoraConfig, params: Any) -> Any:
  """`params` with alpha / rank multiplied into every B: what the forward pass takes."""
  def one(path, x):
    return x * (config.alpha / config.rank) if len(path) > 1 and path[-2].key.endswith(ADAPTER) and (
        path[-1].key == 'b') else x
  return jax.tree_util.tree_map_with_path(one, params)


def merged(config: LoraConfig, model: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
  """Plain parameters with every pair added into its weight, which is given up; the sums are formed in float32, a layer
  at a time and in place. A weight in 8 bits (`int8.py`) becomes one in model.param_dtype."""
  axes, factor = weights(model), config.alpha / config.rank

  def walk(tree, path=()):
    out = {}
    for name, value in tree.items():
      if name.endswith((ADAPTER, SCALE)):
        continue
      pair, scale = tree.get(name + ADAPTER), tree.get(name + SCALE)
      if isinstance(value, dict):
        out[name] = walk(value, (*path, name))
      elif scale is not None:
        out[name] = _summed(value, scale, pair, factor, *axes['/'.join((*path, name))], model.param_dtype)
        int8.give_up(value)
      else:
        out[name] = value if pair is None else _add(value, None, pair, factor, *axes['/'.join((*path, name))],
                                                    value.dtype)
    return out
  return walk(params)


def _sum(w, scale, pair, factor: float, stack: int, inner: int, dtype) -> jax.Array:
  """w, or w * scale, + factor A B."""
  lead, into, out = 'E' * (stack - 1), 'IJ'[:inner], 'OP'[:w.ndim - stack - inner]
  equation = f'{lead}{into}r,{lead}r{out}->{lead}{into}{out}'
  where = jax.P(*jax.typeof(w).sharding.spec[1:]) if sharding.has_mesh() else None

  def one(i, found):
    at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    layer = at(found).astype(jnp.float32) if scale is None else int8.dequantised(at(w), at(scale), stack - 1)
    if pair is not None:
      a, b = (at(pair[side]).astype(jnp.float32) for side in 'ab')
      layer += factor * jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST, out_sharding=where)
    return jax.lax.dynamic_update_index_in_dim(found, layer.astype(dtype), i, 0)
  return jax.lax.fori_loop(0, w.shape[0], one, w.astype(dtype))


_summed = jax.jit(_sum, static_argnums=(3, 4, 5, 6))
_add = jax.jit(_sum, static_argnums=(3, 4, 5, 6), donate_argnums=0)
