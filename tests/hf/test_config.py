import dataclasses
import json

import pytest

from configs import keye_vl_2_30b_a3b
from data_pipelines.errors import InputError
from keye_jax.hf import config
from tests.hf.models import FORMATS, MODELS


@pytest.mark.parametrize('model', MODELS)
def test_round_trip(model):
  cfg = MODELS[model]
  raw = json.loads(json.dumps(config.to_hf(cfg, FORMATS[model])))
  back, fmt = config.from_hf(raw)
  if cfg.vision.layers:      # pixel normalisation is the business of preprocessor_config.json
    back = dataclasses.replace(back, vision=dataclasses.replace(back.vision, mean=cfg.vision.mean, std=cfg.vision.std))
  assert (back, fmt) == (cfg, FORMATS[model])


def test_published_keys():
  raw = config.to_hf(keye_vl_2_30b_a3b.model(), 'keye')
  expected = {
      'model_type': 'KeyeVL2', 'architectures': ['KeyeVL2MoeForConditionalGeneration'], 'hidden_size': 2048,
      'num_hidden_layers': 48, 'num_attention_heads': 32, 'num_key_value_heads': 4, 'head_dim': 128,
      'intermediate_size': 6144, 'moe_intermediate_size': 768, 'num_experts': 128, 'num_experts_per_tok': 8,
      'decoder_sparse_step': 1, 'mlp_only_layers': [], 'norm_topk_prob': True, 'vocab_size': 151936,
      'max_position_embeddings': 262144, 'rope_theta': 1e7, 'tie_word_embeddings': False, 'rms_norm_eps': 1e-6,
      'torch_dtype': 'bfloat16'}
  assert {k: raw[k] for k in expected} == expected
  assert raw['rope_scaling']['mrope_section'] == [16, 24, 24]
  assert raw['sa_config'] == {'indexer_head_dim': 64, 'indexer_num_heads': 16, 'indexer_num_kv_heads': 1,
                              'topk': 2048, 'q_chunk_size': 512, 'kv_chunk_size': 512}
  vision = raw['vision_config']
  assert (vision['hidden_size'], vision['num_hidden_layers'], vision['intermediate_size']) == (1152, 27, 4304)
  assert 'packing_positions' not in vision      # the published class has no such key


@pytest.mark.parametrize('rope', [
    {'rope_theta': 5e5, 'rope_scaling': {'type': 'mrope', 'mrope_section': [2, 1, 1]}},
    {'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'default', 'type': 'default', 'mrope_section': [2, 1, 1]}},
    {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5, 'mrope_section': [2, 1, 1]}}])
@pytest.mark.parametrize('interleaved', [False, True])
def test_rope_is_read_from_every_generation_of_files(rope, interleaved):
  raw = config.to_hf(MODELS['keye'], 'keye')
  del raw['rope_theta'], raw['rope_scaling']
  rope = json.loads(json.dumps(rope))
  if interleaved:
    (rope.get('rope_parameters') or rope['rope_scaling'])['mrope_interleaved'] = True
  text = config.from_hf(raw | rope)[0].text
  assert (text.rope_theta, text.mrope_section, text.mrope_interleaved) == (5e5, (2, 1, 1), interleaved)


def test_transformers_5_names_are_read():
  raw = config.to_hf(MODELS['qwen3_moe'], 'qwen3_moe')
  raw['num_local_experts'] = raw.pop('num_experts')
  raw['rope_parameters'] = {'rope_type': 'default', 'rope_theta': raw.pop('rope_theta')}
  del raw['head_dim']
  cfg, _ = config.from_hf(raw | {'hidden_size': 32})
  assert (cfg.text.experts, cfg.text.head_dim, cfg.text.rope_theta) == (4, 8, 1e4)


@pytest.mark.parametrize('model,change,message', [
    ('qwen3', {'model_type': 'gpt2'}, "'gpt2' is not supported; supported are KeyeVL2, llama, qwen3, qwen3_moe"),
    ('qwen3', {'model_type': None}, 'model_type None'),
    ('qwen3', {'attention_bias': True}, 'attention_bias = True'),
    ('qwen3', {'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
    ('qwen3', {'use_sliding_window': True}, 'use_sliding_window'),
    ('qwen3', {'num_hidden_layers': None}, "'num_hidden_layers' is missing"),
    ('qwen3', {'rope_theta': None}, "'rope_theta' is missing"),
    ('llama', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'llama3'),
    ('llama', {'quantization_config': {'bits': 4}}, 'quantization_config'),
    ('qwen3_moe', {'norm_topk_prob': False}, 'norm_topk_prob = False'),
    ('qwen3_moe', {'norm_topk_prob': None}, 'norm_topk_prob = None'),
    ('qwen3_moe', {'mlp_only_layers': [0]}, 'mlp_only_layers'),
    ('keye', {'sa_config': {'indexer_num_heads': 2, 'indexer_head_dim': 4}}, "'topk' is missing"),
    ('keye', {'vision_config': {'hidden_act': 'relu'}}, 'relu')])
def test_what_cannot_be_represented_is_refused_by_name(model, change, message):
  with pytest.raises(InputError) as e:
    config.from_hf(config.to_hf(MODELS[model], FORMATS[model]) | change, 'some/config.json')
  assert message in str(e.value) and 'some/config.json' in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('text,word', [('{', 'not valid JSON'), ('[]', 'JSON object'), (None, 'no such file')])
def test_broken_json(tmp_path, text, word):
  path = tmp_path / 'config.json'
  if text is not None:
    path.write_text(text)
  with pytest.raises(InputError, match=word) as e:
    config.read_json(str(path))
  assert str(path) in str(e.value)
