"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors, for models of transformers.

Linear layers follow PEFT's LoRA layer: lora_A [rank, in], lora_B [out, rank], their modules listed by full name. A
fused weight of ours gives both its halves the same A. Experts follow its wrapper of a parameter (`target_parameters`,
PEFT 0.17 and later): transformers 5 holds them fused [E, out, in], and lora_A is [E rank, in], lora_B [out, rank E].

E experts, r rank.
"""
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from data_pipelines.errors import InputError
from keye_jax.config import RunConfig
from keye_jax.hf import names, writer
from keye_jax.nn import lora
from keye_jax.sharding import ADAPTER
from keye_jax.steps.state import is_adapter

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
FUSED = {'gate_up': 'gate_up_proj', 'down': 'down_proj'}       # of an expert module, in the order that PEFT wraps them


def export(folder: str, config: RunConfig, trained: Mapping[str, Any], fmt: names.Format, base: str) -> str:
  """Writes `folder`, which must not exist, and returns its path.

  trained: nested dict of what a run with adapters trained. base: for the config's base_model_name_or_path. Raises
  InputError when the folder exists or the layout cannot hold what was trained: parts of the base, and experts of a
  format other than qwen3_moe, whose modules transformers does not have.
  """
  flat = writer.flatten(trained)
  if others := [path for path in flat if not is_adapter(tuple(path.split('/')))]:
    raise InputError(f'{others[0]} was trained itself beside the adapters, which the PEFT layout does not hold; leave '
                     'out --adapter for a merged model')
  host = {path: np.asarray(x, np.float32) for path, x in flat.items()}
  try:
    modules, parameters = list(linears(config, host, fmt)), list(experts(config, host, fmt))
  except ValueError as e:
    raise InputError(str(e)) from None
  tensors = {f'{PREFIX}{each.where}.lora_{side}.weight': np.ascontiguousarray(x)
             for each in modules + parameters for side, x in (('A', each.a), ('B', each.b))}
  with writer.renamed_when_whole(folder, sum(x.nbytes for x in tensors.values())) as part:
    writer.write_json(part, CONFIG, {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'r': config.lora.rank,
        'lora_alpha': config.lora.alpha, 'target_modules': [each.target for each in modules],
        'target_parameters': [each.target for each in parameters] or None, 'lora_dropout': 0.0, 'bias': 'none',
        'fan_in_fan_out': False, 'use_rslora': False, 'use_dora': False, 'modules_to_save': None,
        'inference_mode': True})
    save_file(tensors, f'{part}/{WEIGHTS}', {'format': 'pt'})
  return folder


class Pair(NamedTuple):
  target: str            # module or parameter of the base
  where: str             # module that holds lora_A and lora_B
  a: np.ndarray
  b: np.ndarray


def linears(config: RunConfig, host: Mapping[str, np.ndarray], fmt: names.Format) -> Iterator[Pair]:
  """Every linear layer with an adapter. Raises ValueError when the format cannot hold the model."""
  axes = lora.targets(config.lora, config.model)
  for tensor in names.table(config.model, fmt):
    piece = tensor.pieces[0]
    if piece.path not in axes or piece.rule != 'linear' or '.experts.' in tensor.name:
      continue
    stack, inner = axes[piece.path]
    a, b = (host[f'{piece.path}{ADAPTER}/{side}'][piece.index[:stack]] for side in 'ab')
    b = b[(slice(None), *piece.index[stack + inner:])]
    module = tensor.name.removesuffix('.weight')
    yield Pair(module, module, a.reshape(-1, config.lora.rank).T, b.reshape(config.lora.rank, -1).T)


def experts(config: RunConfig, host: Mapping[str, np.ndarray], fmt: names.Format) -> Iterator[Pair]:
  """Every fused expert parameter with an adapter. PEFT wraps the module once for each; the wrapper that comes first
  lies inside the other as `base_layer`. Raises ValueError when the format has no such modules."""
  found = [name for name in FUSED if config.model.text.experts and f'layers/mlp/{name}{ADAPTER}/a' in host]
  if found and fmt != 'qwen3_moe':
    raise ValueError(f'the PEFT layout has no place for adapters of experts in format {fmt!r}, whose modules '
                     'transformers does not have; leave out --adapter for a merged model')
  for layer in range(config.model.text.layers):
    for i, name in enumerate(found):
      a_EIr, b_ErO = (host[f'layers/mlp/{name}{ADAPTER}/{side}'][layer] for side in 'ab')
      module = f'model.layers.{layer}.mlp.experts'
      yield Pair(f'{module}.{FUSED[name]}', module + '.base_layer' * (len(found) - 1 - i),
                 a_EIr.swapaxes(1, 2).reshape(-1, a_EIr.shape[1]),
                 b_ErO.transpose(2, 1, 0).reshape(b_ErO.shape[2], -1))
