"""What a run is made of before its first step: its programs and its state, random or from a folder."""
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines import mixture
from data_pipelines.errors import InputError
from keye_jax import api, checkpoint, run_folder
from keye_jax.config import ModelConfig, RunConfig, TextConfig
from keye_jax.hf import siglip
from keye_jax.nn import contrast, counts, int8, keye, lora
from keye_jax.nn.model import init_params, param_shapes
from keye_jax.objectives.common import Objective
from keye_jax.objectives.policy import gspo
from keye_jax.objectives.sft import sft
from keye_jax.objectives.siglip import siglip as siglip_loss
from keye_jax.steps import state as state_lib
from keye_jax.steps.even_rows import even_rows
from keye_jax.steps.optimizer import make_optimizer, rates
from keye_jax.steps.state import State
from keye_jax.steps.update import make_measure, make_update

# Parts of the config that say nothing about the weights, so a folder to start from may differ in them.
_NOT_WEIGHTS = ('text.max_position', 'text.dense_ffn', 'attention', 'dtype', 'param_dtype', 'remat',
                'experts_transport', 'experts_capacity', 'vision_balance', 'layout', 'contrast', 'text.indexer.topk')


class Programs(NamedTuple):
  """Pure functions of one run config."""
  fresh: Callable[[jax.Array], State]              # key -> state with random parameters
  around: Callable[[Any, jax.Array], State]        # (parameters, key) -> state; the parameters are donated
  update: Callable[..., tuple[State, Any]]         # (state, batch, rates, limit), see steps/update.py
  rates: Callable[[int], dict[str, float]]         # step -> learning rate of each optimizer group
  measure: Callable[[Any, Any, Any], Any]          # (trained, frozen parameters, batch) -> metrics
  even: Callable[[Any, jax.Array], Any]            # (batch, cost of its rows) -> batch, see steps/even_rows.py


def programs(config: RunConfig) -> Programs:
  model, train = config.model, config.train
  if model.contrast:
    objective = siglip_loss(model.layout)
    return _programs(config, functools.partial(contrast.apply, model, config.data.samples), objective, objective)
  objective = functools.partial(sft, model.layout, train.balance_weight, train.indexer_weight)
  apply = lambda params, batch: keye.apply(model, lora.scaled(config.lora, params), batch)
  mixed = [source.name for source in mixture.listed(config.data)] if config.data.sources else []
  return _programs(config, apply, objective(sources=mixed), objective())


def policy_programs(config: RunConfig) -> Programs:
  """Those of learning from a policy's own responses, by GSPO: each batch is a `PolicyBatch`."""
  model, train = config.model, config.train
  objective = gspo(model.layout, train.balance_weight, train.indexer_weight)
  apply = lambda params, rows: keye.apply(model, lora.scaled(config.lora, params), rows.batch)
  return _programs(config, apply, objective, objective)


def _programs(config: RunConfig, apply: Callable[[Any, Any], Any], objective: Objective, judge: Objective) -> Programs:
  """objective: what is trained. judge: the same for held-out rows, which are one file."""
  model, train = config.model, config.train
  tx = make_optimizer(config.optimizer)
  update = make_update(apply, objective, tx, train.accumulate)

  def around(params, key):
    params = int8.quantised(lora.in_int8(config), params)
    if config.lora.targets:
      params = state_lib.merge(params, lora.init(config.lora, model, params, jax.random.fold_in(key, 1)))
    return state_lib.create(params, tx, lora.freeze(config), model.dtype, key)

  def fresh(key):
    init_key, key = jax.random.split(key)
    return around(init_params(model, init_key), key)

  even = functools.partial(even_rows, model.layout, train.accumulate)
  return Programs(jax.jit(fresh), jax.jit(around, donate_argnums=0), update, rates(config.optimizer, train.steps),
                  make_measure(apply, judge), jax.jit(even))


def first_state(config: RunConfig, made: Programs, say: Callable[[str], None]) -> State:
  """State of step 0: random parameters, or those of `train.init`. Says what is trained when that is not all of it."""
  key, init = jax.random.key(config.train.seed), config.train.init
  if init:
    eight = lora.in_int8(config)
    params = initial_params(config.model, init, key, say, bool(config.lora.targets), int8.placing(eight, api.placed))
    state = made.around(int8.quantised(eight, params), key)
  else:
    state = made.fresh(key)
  if state.frozen:
    named = lambda params: ', '.join(f'{part} {n:,}' for part, n in counts.parts(params).items() if n)
    say(f'{init or "new parameters"}: trains {named(state.train)}; frozen are {named(state.frozen)}')
  return state


def initial_params(model: ModelConfig, folder: str, key: jax.Array, say: Callable[[str], None],
                   whole: bool = False, place: api.Placing = api.placed) -> Any:
  """Parameters of a run folder, a Hugging Face folder or a GGUF file, for `model`.

  Also of a SigLIP folder. A part that the folder lacks (see PARTS) is made new, and one that the model lacks is left
  out; both are said. whole: nothing may be lacking, as a part that is new and frozen is of no use. place: as of
  `api.load`. Raises InputError naming the first difference when anything else does not fit.
  """
  found, params = read(folder, model, place)
  if differ := architecture_differences(found, model):
    name, (theirs, ours) = next(iter(differ.items()))
    raise InputError(f'train.init: {folder} has model.{name} = {theirs!r}, this run {ours!r}'
                     + (f' (and {len(differ) - 1} more keys differ)' if len(differ) > 1 else ''))
  lacking = []
  for part in PARTS:
    theirs, ours = part.there(found), part.there(model)
    if theirs and not ours:
      say(f'{folder}: its {part.name} is left out, this model has none')
      params = state_lib.pick(params, lambda path: not part.holds(path))
    if ours and not theirs and whole:
      raise InputError(f'train.init: {folder} has no {part.name}, and beside adapters a new one would stay random; '
                       'train it first')
    if ours and not theirs:
      say(f'{folder}: has no {part.name}; a new one is initialised')
      lacking.append(part)
  if not lacking:
    return params
  norm_LD = params['layers']['attn_norm'] if 'layers' in params else None
  keep = lambda path: any(part.holds(path) for part in lacking)
  return state_lib.merge(params, new_params(model, key, keep, norm_LD))


def read(folder: str, model: ModelConfig, place: api.Placing) -> tuple[ModelConfig, Any]:
  """(what a folder holds, its parameters in the dtype and on the mesh of `model`)."""
  if checkpoint.is_run(folder) and (towers := run_folder.read_config(folder).model).contrast:
    towers = dataclasses.replace(towers, param_dtype=model.param_dtype, layout=model.layout)
    return towers, checkpoint.load_params(folder, param_shapes(towers), warnings.warn).params
  if siglip.is_folder(folder):
    vision, tower = siglip.load_tower(folder, model.param_dtype, api.placed(model))
    return ModelConfig(TextConfig(layers=0), vision, contrast=True), {'vision': tower}
  found, params = api.load(folder, model.param_dtype, place=place)
  return found.config, params


class Part(NamedTuple):
  """What a model to start from may lack or have too much."""
  name: str
  there: Callable[[ModelConfig], int]
  holds: Callable[[tuple[str, ...]], bool]        # path of a parameter


PARTS = (Part('indexer', lambda model: model.text.indexer.heads, lambda path: 'indexer' in path),
         Part('language model', lambda model: not model.contrast,
              lambda path: path[0] in ('embed', 'layers', 'norm', 'head') and 'indexer' not in path),
         Part('vision encoder', lambda model: model.vision.layers, lambda path: path[0] == 'vision'),
         Part('projector', lambda model: model.vision.layers and not model.contrast,
              lambda path: path[0] == 'projector'),
         Part('text tower', lambda model: model.contrast and model.text.layers,
              lambda path: path[0] in ('text', 'log_scale', 'bias')))


def new_params(model: ModelConfig, key: jax.Array, keep: Callable[[tuple[str, ...]], bool],
               attn_norm_LD: jax.Array | None) -> dict[str, Any]:
  """Random parameters of the paths that satisfy `keep`, for a model whose others exist already. attn_norm_LD: None
  when the layers are among the new ones."""
  new = jax.jit(lambda key: state_lib.pick(init_params(model, key), keep))(key)
  return new if attn_norm_LD is None else jax.jit(even_gates)(new, attn_norm_LD)


def even_gates(new: Any, norm_LD: jax.Array) -> Any:
  """`new` parameters with the gate of each layer's indexer divided by the rms of the norm that scales its input.

  Index queries and keys are normalised, so the gate alone sets the size of the first scores. A trained model's norms
  differ from layer to layer by an order of magnitude: without this some indexers start saturated and others flat.
  """
  rms_L = jnp.sqrt(jnp.mean(jnp.square(norm_LD.astype(jnp.float32)), -1))
  even = lambda path, x: (x / jnp.maximum(rms_L, 1e-6)[:, None, None]).astype(x.dtype) if path[-1].key == 'gate' else x
  return jax.tree_util.tree_map_with_path(even, new)


def architecture_differences(theirs: ModelConfig, ours: ModelConfig) -> dict[str, tuple[Any, Any]]:
  """{'text.layers': (theirs, ours)} for what decides shapes or what the weights mean. Indexer and vision may be absent
  on one side, and a text tower is no language model."""
  if not (theirs.text.indexer.heads and ours.text.indexer.heads):
    theirs = dataclasses.replace(theirs, text=dataclasses.replace(theirs.text, indexer=ours.text.indexer))
  if theirs.contrast != ours.contrast or not theirs.text.layers:
    theirs = dataclasses.replace(theirs, text=ours.text)
  if not (theirs.vision.layers and ours.vision.layers):
    theirs = dataclasses.replace(theirs, vision=ours.vision)
  return {k: v for k, v in run_folder.differences(theirs, ours).items() if k not in _NOT_WEIGHTS}
