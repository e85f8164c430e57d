"""Adapters as PEFT stores them: names, shapes, and that they say the same as the merged weights."""
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipelines.errors import InputError
from keye_jax.config import LoraConfig, RunConfig
from keye_jax.hf import names, peft, writer
from keye_jax.nn import lora
from keye_jax.steps import state as state_lib
from tests.hf.models import FORMATS, MODELS, random_params
from tests.tolerances import assert_close


def run_of(model, targets=('layers/*',)):
  """(config, base, adapters with both halves random) of a tiny model."""
  config = RunConfig(model=MODELS[model], lora=LoraConfig(targets=targets, rank=3, alpha=6.0))
  base = jax.tree.map(jnp.asarray, random_params(config.model, FORMATS[model]))
  own = lora.init(config.lora, config.model, base, jax.random.key(0))
  return config, base, jax.tree.map(lambda x: x + np.random.default_rng(x.size).normal(size=x.shape), own)


def deltas(folder, E):
  """{base tensor: what PEFT adds to it}, by the formulas of its layers (tuners/lora/layer.py)."""
  tensors = load_file(folder / peft.WEIGHTS)
  config = json.loads((folder / peft.CONFIG).read_text())
  scale, found = config['lora_alpha'] / config['r'], {}
  side = lambda where, x: tensors.pop(f'base_model.model.{where}.lora_{x}.weight')
  for module in config['target_modules']:
    found[f'{module}.weight'] = scale * side(module, 'B') @ side(module, 'A')
  by_module = {}
  for name in config['target_parameters'] or []:
    by_module.setdefault(name.rpartition('.')[0], []).append(name)
  for module, parameters in by_module.items():
    for i, name in enumerate(parameters):
      where = module + '.base_layer' * (len(parameters) - 1 - i)
      a, b = side(where, 'A'), side(where, 'B')
      found[name] = scale * np.einsum('ore,eri->eoi', b.reshape(len(b), -1, E), a.reshape(E, -1, a.shape[1]))
  assert not tensors, tensors.keys()
  return found


@pytest.mark.parametrize('model', ['qwen3_moe', 'qwen3', 'llama'])
def test_what_peft_adds_is_the_difference_of_the_merged_weights(tmp_path, model):
  config, base, own = run_of(model)
  fmt = FORMATS[model]
  peft.export(str(tmp_path / 'x'), config, own, fmt, 'the/base')
  assert sorted(os.listdir(tmp_path / 'x')) == [peft.CONFIG, peft.WEIGHTS]
  table = names.table(config.model, fmt, 'module' if model == 'qwen3_moe' else None)
  tensors = lambda params: {t.name: writer.stored(t, writer.flatten(jax.tree.map(np.asarray, params)), 'float32')
                            for t in table}
  before = tensors(base)
  after = tensors(lora.merged(config.lora, config.model, state_lib.merge(base, own)))
  found = deltas(tmp_path / 'x', config.model.text.experts)
  assert found.keys() == {k for k in before if (before[k] != after[k]).any()}
  for name, delta in found.items():
    assert_close(before[name] + delta, after[name], what=name)


def test_vision_and_language_of_a_keye(tmp_path):
  config, _, own = run_of('keye', ('layers/attn/q', 'vision/layers/o'))
  peft.export(str(tmp_path / 'x'), config, own, 'keye', 'the/base')
  said = json.loads((tmp_path / 'x' / peft.CONFIG).read_text())
  assert said['target_modules'] == [f'model.layers.{i}.self_attn.q_proj' for i in (0, 1)] + [
      f'visual.vision_model.encoder.layers.{i}.self_attn.out_proj' for i in (0, 1)]
  assert (said['r'], said['lora_alpha'], said['base_model_name_or_path']) == (3, 6.0, 'the/base')
  got = load_file(tmp_path / 'x' / peft.WEIGHTS)['base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight']
  assert got.shape == (32, 3) and got[1 * 8 + 5, 2] == own['layers']['attn']['q_lora']['b'][1, 2, 1, 5]


def test_what_the_layout_cannot_hold_is_refused(tmp_path):
  def refused(model, *targets, **more):
    config, _, own = run_of(model, targets)
    with pytest.raises(InputError) as e:
      peft.export(str(tmp_path / 'x'), config, own | more, FORMATS[model], 'the/base')
    assert '\n' not in str(e.value) and not os.listdir(tmp_path)
    return str(e.value)

  assert "no place for adapters of experts in format 'keye'" in refused('keye', 'layers/mlp/down')
  assert 'norm was trained itself beside the adapters' in refused('qwen3', 'layers/attn/q', norm=np.zeros(24))
  config, _, own = run_of('keye', ('layers/attn/q',))
  with pytest.raises(InputError, match="format 'qwen3' cannot hold this model"):
    peft.export(str(tmp_path / 'x'), config, own, 'qwen3', 'the/base')
