"""What a run is made of before its first step: its programs and its state, random or from a folder."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from data_pipelines.errors import InputError
from keye_jax import api, run_folder
from keye_jax.config import ModelConfig, RunConfig
from keye_jax.nn import keye
from keye_jax.objectives.sft import sft
from keye_jax.steps import state as state_lib
from keye_jax.steps.optimizer import make_optimizer, rates
from keye_jax.steps.state import State
from keye_jax.steps.update import make_update

# Parts of the config that say nothing about the weights, so a folder to start from may differ in them.
_NOT_WEIGHTS = ('text.max_position', 'text.dense_ffn', 'attention', 'dtype', 'param_dtype', 'remat',
                'experts_transport', 'layout', 'text.indexer.topk')


class Programs(NamedTuple):
  """Pure functions of one run config."""
  fresh: Callable[[jax.Array], State]              # key -> state with random parameters
  around: Callable[[Any, jax.Array], State]        # (parameters, key) -> state; the parameters are donated
  update: Callable[..., tuple[State, Any]]         # (state, batch, rates, limit), see steps/update.py
  rates: Callable[[int], dict[str, float]]         # step -> learning rate of each optimizer group


def programs(config: RunConfig) -> Programs:
  model, train = config.model, config.train
  tx = make_optimizer(config.optimizer)
  objective = sft(model.layout, train.balance_weight, train.indexer_weight)
  update = make_update(functools.partial(keye.apply, model), objective, tx, train.accumulate)

  def around(params, key):
    return state_lib.create(params, tx, train.freeze, model.dtype, key)

  def fresh(key):
    init_key, key = jax.random.split(key)
    return around(keye.init(model, init_key), key)

  return Programs(jax.jit(fresh), jax.jit(around, donate_argnums=0), update, rates(config.optimizer, train.steps))


def first_state(config: RunConfig, made: Programs, say: Callable[[str], None]) -> State:
  """State of step 0: random parameters, or those of `train.init`."""
  key = jax.random.key(config.train.seed)
  if not config.train.init:
    return made.fresh(key)
  return made.around(initial_params(config.model, config.train.init, key, say), key)


def initial_params(model: ModelConfig, folder: str, key: jax.Array, say: Callable[[str], None]) -> Any:
  """Parameters of a run folder, a Hugging Face folder or a GGUF file, for `model`.

  An indexer that the folder lacks is made new, and one that the model lacks is left out; both are said. Raises
  InputError naming the first difference when anything else does not fit.
  """
  found, params = api.load_pretrained(folder, dtype=model.param_dtype)
  if differ := architecture_differences(found.config, model):
    name, (theirs, ours) = next(iter(differ.items()))
    raise InputError(f'train.init: {folder} has model.{name} = {theirs!r}, this run {ours!r}'
                     + (f' (and {len(differ) - 1} more keys differ)' if len(differ) > 1 else ''))
  in_indexer = lambda path: 'indexer' in path
  if found.config.text.indexer.heads and not model.text.indexer.heads:
    say(f'{folder}: its indexer is left out, this model has none')
    params = state_lib.pick(params, lambda path: not in_indexer(path))
  if model.text.indexer.heads and not found.config.text.indexer.heads:
    say(f'{folder}: has no indexer; a new one is initialised')
    new = jax.jit(lambda key: state_lib.pick(keye.init(model, key), in_indexer))(key)
    params = state_lib.merge(params, new)
  return params


def architecture_differences(theirs: ModelConfig, ours: ModelConfig) -> dict[str, tuple[Any, Any]]:
  """{'text.layers': (theirs, ours)} for what decides shapes or what the weights mean. An indexer may be absent on one
  side."""
  if not (theirs.text.indexer.heads and ours.text.indexer.heads):
    theirs = dataclasses.replace(theirs, text=dataclasses.replace(theirs.text, indexer=ours.text.indexer))
  if not theirs.vision.layers and not ours.vision.layers:
    theirs = dataclasses.replace(theirs, vision=ours.vision)
  return {k: v for k, v in run_folder.differences(theirs, ours).items() if k not in _NOT_WEIGHTS}
