"""Adapters against PEFT: numbers by tests/fixtures/make_lora.py, and live (extra `parity`, pytest -m parity)."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from keye_jax.config import LoraConfig, RunConfig
from keye_jax.hf import peft as layout
from keye_jax.hf import writer
from keye_jax.nn import head, keye, lora
from keye_jax.steps import state as state_lib
from tests.hf.models import FORMATS, MODELS, tiny_tokenizer
from tests.hf.test_peft import run_of
from tests.parity.fixtures import FOLDER, load, text_batch
from tests.tolerances import assert_close

BASE = 'base_model.model.model.layers'


def logits(config, params, token_BT):
  out = jax.jit(keye.apply, static_argnums=0)(config, params, text_batch(token_BT))
  return np.asarray(head.logits(out.hidden_BTD, out.head_DV))


def pairs_of(t, tensors, rank):
  """Our adapters from PEFT's tensors, written out apart from the exporter."""
  D, E, F = t.embed, t.experts, t.ffn
  def side(x, module):
    return np.stack([tensors[f'{BASE}.{i}.{module}.lora_{x}.weight'] for i in range(t.layers)])
  attn = {}
  for name, heads in (('q', t.heads), ('k', t.kv_heads), ('v', t.kv_heads)):
    a, b = (side(x, f'self_attn.{name}_proj') for x in 'AB')
    attn[f'{name}_lora'] = {'a': a.transpose(0, 2, 1), 'b': b.transpose(0, 2, 1).reshape(-1, rank, heads, t.head_dim)}
  a, b = (side(x, 'self_attn.o_proj') for x in 'AB')
  attn['o_lora'] = {'a': a.transpose(0, 2, 1).reshape(-1, t.heads, t.head_dim, rank), 'b': b.transpose(0, 2, 1)}
  mlp = {}
  for name, module, into, out in (('gate_up', 'mlp.experts.base_layer', D, 2 * F), ('down', 'mlp.experts', F, D)):
    a, b = (side(x, module) for x in 'AB')
    mlp[f'{name}_lora'] = {'a': a.reshape(-1, E, rank, into).swapaxes(2, 3),
                           'b': b.reshape(-1, out, rank, E).transpose(0, 3, 2, 1)}
  return {'layers': {'attn': attn, 'mlp': mlp}}


def test_logits_and_files_are_those_of_peft(tmp_path):
  model, params, _ = load('qwen3_moe_tiny.npz')
  with np.load(FOLDER / 'lora_tiny.npz') as f:
    data = {k: f[k] for k in f}
  said = json.loads(str(data['config']))
  config = RunConfig(model=model, lora=LoraConfig(('layers/attn/*', 'layers/mlp/*'), said['r'], said['lora_alpha']))
  theirs = {k[2:]: v for k, v in data.items() if k.startswith('a/')}
  own = jax.tree.map(jnp.asarray, pairs_of(model.text, theirs, said['r']))
  both = state_lib.merge(params, own)
  assert_close(logits(model, lora.scaled(config.lora, both), data['token_BT']), data['logits'], what='applied')
  assert_close(logits(model, lora.merged(config.lora, model, both), data['token_BT']), data['logits'], what='merged')
  layout.export(str(tmp_path / 'x'), config, own, 'qwen3_moe', 'base')
  ours = load_file(tmp_path / 'x' / layout.WEIGHTS)
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize('model', ['qwen3_moe', 'qwen3', 'llama'])
def test_peft_loads_an_export(tmp_path, model):
  torch, transformers, peft = (pytest.importorskip(name) for name in ('torch', 'transformers', 'peft'))
  token_BT = np.random.default_rng(0).integers(0, 320, (2, 24))
  config, base, own = run_of(model)
  own = jax.tree.map(lambda x: 0.3 * x, own)
  writer.export(str(tmp_path / 'base'), MODELS[model], base, tiny_tokenizer(), FORMATS[model], dtype='float32')
  layout.export(str(tmp_path / 'adapter'), config, own, FORMATS[model], str(tmp_path / 'base'))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base', dtype=torch.float32,
                                                             attn_implementation='eager')
  adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / 'adapter').eval()
  with torch.no_grad():
    expected = adapted(torch.tensor(token_BT)).logits.numpy()
    with adapted.disable_adapter():
      assert np.abs(adapted(torch.tensor(token_BT)).logits.numpy() - expected).max() > 0.1
  assert_close(logits(config.model, lora.scaled(config.lora, state_lib.merge(base, own)), token_BT), expected)
