"""What a run of adapters keeps, and how a model is made of it again.

A checkpoint holds the adapters (and what else is trained) but not the base: for the published model that would be 62 GB
at every save, for adapters of a few dozen MB. It names the base by path and by a digest of its files, and whoever reads
the run again, to train on or to use it, refuses another base: adapters on other weights give a model that nobody
trained, without a sign of it.
"""
import concurrent.futures
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import xxhash

from data_pipelines.errors import InputError
from keye_jax import checkpoint
from keye_jax.config import ModelConfig, RunConfig
from keye_jax.nn import keye, lora
from keye_jax.sharding import SCALE
from keye_jax.steps import state as state_lib
from keye_jax.steps.state import State


def reference(config: RunConfig) -> dict[str, Any]:
  """{'base': {'path', 'digest'}} of a run with adapters, else {}: goes into its checkpoints. Reads the whole base.

  Raises InputError when there is no base or it cannot be read.
  """
  if not config.lora.targets:
    return {}
  if not config.train.init:
    raise InputError('lora.targets: there is no model to adapt; set train.init to a Hugging Face folder or a run')
  return {'base': {'path': os.path.abspath(config.train.init), 'digest': digest(config.train.init)}}


def digest(source: str) -> str:
  """xxh3 of what a model is loaded from: weights and config.json of a folder, one file, or the newest whole checkpoint
  of a run."""
  path = pathlib.Path(source)
  if checkpoint.is_run(path):
    return checkpoint.digest(path)
  files = [path] if path.is_file() else sorted([*path.glob('*.safetensors'), *path.glob('config.json')])
  if not files:
    raise InputError(f'{source}: no model is there; give a folder with config.json and *.safetensors, a run, or a GGUF '
                     'file')
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = zip(files, pool.map(checkpoint.hash_file, files))
    return xxhash.xxh3_128(repr([(file.name, each) for file, each in found]).encode()).hexdigest()


def check_base(run: str | os.PathLike, then: dict[str, str], now: dict[str, str]) -> None:
  """Raises InputError when the base that a run's checkpoint names is not the one that is there."""
  if then['digest'] != now['digest']:
    raise InputError(f'{run}: its adapters belong to another base: {then["path"]} had the digest {then["digest"][:8]}, '
                     f'{now["path"]} has {now["digest"][:8]}; bring that one back')


def without_base(config: RunConfig, state: State) -> State:
  """What is saved of a state."""
  return state._replace(frozen={}) if config.lora.targets else state


def trained(run: str | os.PathLike, config: RunConfig, model: ModelConfig) -> checkpoint.Params:
  """The adapters (float32) of a run's newest whole checkpoint and what else it trained. model: to load them for."""
  def pairs_too(params):
    return state_lib.merge(params, lora.init(config.lora, model, params, jax.random.key(0)))
  shapes = jax.eval_shape(pairs_too, keye.param_shapes(model))
  return checkpoint.load_params(run, state_lib.split(shapes, lora.freeze(config))[0], warnings.warn)


def load(run: str | os.PathLike, config: RunConfig, model: ModelConfig, load_base: Callable[[str], Any]) -> Any:
  """Parameters of a run with adapters, merged into its base.

  load_base: folder -> parameters, in 8 bits where the run has them so. Looks for the base where it was when the
  checkpoint was written, then at train.init of the run's config. Raises InputError when it is absent or another one.
  """
  own = trained(run, config, model)
  then = own.host['base']
  path = next((p for p in (then['path'], config.train.init) if os.path.exists(p)), None)
  if path is None:
    raise InputError(f'{run}: the base of its adapters is not at {then["path"]}; bring it back, or say in config.json '
                     'of the run, train.init, where it is')
  check_base(run, then, {'path': path, 'digest': digest(path)})
  names, here = _paths(keye.param_shapes(model)), _paths(own.params)
  wanted = lambda path: (path in names or path[-1].endswith(SCALE)) and path not in here
  base = state_lib.pick(load_base(path), wanted)
  return lora.merged(config.lora, model, state_lib.merge(own.params, base))


def _paths(tree: Any) -> set[tuple[str, ...]]:
  return {tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
