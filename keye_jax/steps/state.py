"""What a training step carries: trained and frozen parameters, optimizer state, step and random key."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from data_pipelines.errors import InputError
from keye_jax.nn import int8
from keye_jax.sharding import ADAPTER
from keye_jax.steps import rounding


class State(NamedTuple):
  step: jax.Array      # int32: batches consumed, skipped ones included
  train: Any           # nested dict: differentiated, has optimizer state, donated to the step
  frozen: Any          # nested dict in the compute dtype, or 8 bits: neither
  opt: Any             # float32
  rng: jax.Array       # typed key; a step that needs noise folds `step` into it


def create(params: Any, tx: optax.GradientTransformation, freeze: tuple[str, ...], dtype: str,
           key: jax.Array) -> State:
  """State at step 0. Shardings follow the parameters.

  freeze: see `split`. dtype: of frozen parameters, the model's compute dtype.
  """
  train, frozen = split(params, freeze)
  frozen = int8.cast(frozen, dtype)
  opt = jax.jit(lambda train: tx.init(rounding.float32(train)))(train)
  return State(jnp.zeros((), jnp.int32), train, frozen, opt, key)


def split(params: Any, freeze: tuple[str, ...]) -> tuple[Any, Any]:
  """Parameters -> (trained, frozen), two nested dicts without common leaves.

  A parameter is frozen when an entry of `freeze` is a prefix of its path, by whole names ('vision', 'layers/attn'; ''
  is a prefix of everything), unless an entry that starts with '!' is one too: ('', '!layers/attn/indexer') trains the
  indexer alone. Adapters (`nn/lora.py`) are never frozen. Raises InputError for an entry that matches nothing, when
  nothing is left to train, and when a weight with an adapter beside it would be trained itself.
  """
  paths = [_names(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  for entry in freeze:
    if not any(_matches(entry.removeprefix('!'), path) for path in paths):
      parts = sorted({'/'.join(p[:depth]) for p in paths for depth in (1, 2)})
      raise InputError(f'train.freeze: {entry!r} matches no parameter; there are {", ".join(parts)}')
  cold = {path for path in paths
          if any(_matches(e, path) for e in freeze if not e.startswith('!'))
          and not any(_matches(e[1:], path) for e in freeze if e.startswith('!')) and not is_adapter(path)}
  for path in sorted(set(paths) - cold):
    if (*path[:-1], path[-1] + ADAPTER, 'a') in paths:
      raise InputError(f'train.freeze: {"/".join(path)} has an adapter beside it and cannot be trained itself')
  if len(cold) == len(paths):
    raise InputError(f'train.freeze = {freeze} leaves nothing to train')
  return pick(params, lambda path: path not in cold), pick(params, lambda path: path in cold)


def is_adapter(path: tuple[str, ...]) -> bool:
  return len(path) > 1 and path[-2].endswith(ADAPTER)


def merge(train: Any, frozen: Any) -> Any:
  """The inverse of `split`: one parameter tree."""
  if not (isinstance(train, dict) and isinstance(frozen, dict)):
    raise ValueError('a parameter is both trained and frozen')
  both = train.keys() & frozen.keys()
  return {**train, **frozen, **{k: merge(train[k], frozen[k]) for k in both}}


def _names(path) -> tuple[str, ...]:
  return tuple(p.key for p in path)


def _matches(prefix: str, path: tuple[str, ...]) -> bool:
  parts = tuple(prefix.split('/')) if prefix else ()
  return path[:len(parts)] == parts


def pick(tree: Any, keep: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()) -> Any:
  """The part of a nested dict whose leaves' paths satisfy `keep`; dicts left empty are left out."""
  out = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      if below := pick(value, keep, path + (name,)):
        out[name] = below
    elif keep(path + (name,)):
      out[name] = value
  return out
