"""Live comparison with transformers: folders go there and come back. Needs the extra `parity`: pytest -m parity."""
import json

import jax
import numpy as np
import pytest

from data_pipelines.images import patchify
from keye_jax import api
from keye_jax.hf import names, reader, writer
from keye_jax.nn import head, keye
from tests.hf.models import DATA, MODELS, random_params, tiny_tokenizer
from tests.launch.test_assemble import command
from tests.parity.fixtures import text_batch
from tests.tolerances import assert_close

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TOKEN_BT = np.random.default_rng(0).integers(0, 320, (2, 24))


def their_logits(model) -> np.ndarray:
  with torch.no_grad():
    return model(torch.tensor(TOKEN_BT)).logits.numpy()


def our_logits(cfg, params) -> np.ndarray:
  out = jax.jit(keye.apply, static_argnums=0)(cfg, params, text_batch(TOKEN_BT))
  return np.asarray(head.logits(out.hidden_BTD, out.head_DV))


@pytest.mark.parametrize('fmt', ['qwen3_moe', 'qwen3', 'llama'])
def test_export_to_transformers_and_back_is_exact(tmp_path, fmt):
  cfg, params = MODELS[fmt], random_params(MODELS[fmt], fmt)
  writer.export(str(tmp_path / 'ours'), cfg, params, tiny_tokenizer(), fmt, dtype='float32', shard_bytes=50_000)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'ours', dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
  assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
  assert_close(our_logits(cfg, params), their_logits(model.eval()), what=fmt)
  model.save_pretrained(tmp_path / 'theirs')
  back = reader.load_folder(str(tmp_path / 'theirs'))
  assert (back.config, back.format) == (cfg, fmt)
  ours, theirs = writer.flatten(params), writer.flatten(back.params)
  assert ours.keys() == theirs.keys()
  for path, value in ours.items():
    np.testing.assert_array_equal(theirs[path], value, err_msg=path)


def test_experts_as_transformers_holds_them(tmp_path):
  """The fused layout of the modules, written as it is."""
  cfg, params = MODELS['qwen3_moe'], random_params(MODELS['qwen3_moe'], 'qwen3_moe')
  writer.export(str(tmp_path / 'ours'), cfg, params, tiny_tokenizer(), 'qwen3_moe', dtype='float32')
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', dtype=torch.float32)
  model.save_pretrained(tmp_path / 'theirs', save_original_format=False)
  source = reader.open_folder(str(tmp_path / 'theirs'))
  assert names.expert_layout(cfg, 'qwen3_moe', source.shapes) == 'module'
  theirs = writer.flatten(reader.load_folder(str(tmp_path / 'theirs')).params)
  assert all((theirs[k] == v).all() for k, v in writer.flatten(params).items())


def test_a_keye_from_models_of_transformers(tmp_path):
  """Both folders written by transformers; with dense attention the result is the language model."""
  torch.manual_seed(0)
  lm = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
      vocab_size=320, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
      num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20,
      norm_topk_prob=True, tie_word_embeddings=False, attn_implementation='eager')).float().eval()
  small = dict(hidden_size=16, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2)
  vit = transformers.SiglipModel(transformers.SiglipConfig(
      vision_config=dict(small, image_size=56, patch_size=14), text_config=dict(small, vocab_size=30)))
  for part, name in ((lm, 'lm'), (vit, 'vit'), (vit.vision_model, 'tower')):
    part.save_pretrained(tmp_path / name)
  tiny_tokenizer().save(tmp_path / 'lm')
  theirs = {name: value.numpy() for name, value in vit.state_dict().items() if name.startswith('vision_model.')}
  for name in ('vit', 'tower'):
    assert command(tmp_path / 'lm', tmp_path / name, tmp_path / f'with {name}', '--dtype', 'float32') == 0
    source = reader.open_folder(str(tmp_path / f'with {name}'))
    copied = {key: value for key, value in theirs.items() if f'visual.{key}' in source.shapes}
    assert len(copied) == 5 + 2 * 16
    for key, value in copied.items():
      np.testing.assert_array_equal(source.read(f'visual.{key}', ()), value, err_msg=key)
    model, params = api.load_pretrained(tmp_path / f'with {name}', attention='dense')
    assert_close(our_logits(model.config, params), their_logits(lm))


def test_tokenizer_and_processors_of_an_export(tmp_path):
  cfg = MODELS['keye']
  writer.export(str(tmp_path / 'x'), cfg, random_params(cfg, 'keye'), tiny_tokenizer(), 'keye', DATA)
  ours = tiny_tokenizer()
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'x')
  text = 'when does the 7 appear?'
  assert theirs(text).input_ids == ours.encode(text)
  assert theirs.convert_tokens_to_ids('<|video_pad|>') == ours.id('<|video_pad|>')
  rendered = theirs.apply_chat_template([{'role': 'user', 'content': text}], tokenize=False, add_generation_prompt=True)
  assert rendered == f'<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n'

  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'x', backend='pil')
  image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
  made = processor(images=[image], return_tensors='np', do_resize=False)
  assert made['image_grid_thw'].tolist() == [[1, 4, 6]]
  patch_PC, _, _ = patchify(image[None], 14, 2)
  assert_close(made['pixel_values'], (patch_PC / 255 - cfg.vision.mean) / cfg.vision.std)
  raw = json.loads((tmp_path / 'x' / 'preprocessor_config.json').read_text())
  assert (processor.size['shortest_edge'], processor.size['longest_edge']) == (raw['min_pixels'], raw['max_pixels'])
