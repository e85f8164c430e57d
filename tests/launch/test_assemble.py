"""A language model and a vision tower become one Keye: what is copied is copied, what is new is said."""
import argparse
import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from data_pipelines import tokenizer
from data_pipelines.errors import InputError
from keye_jax import api, begin, checkpoint, run_folder
from keye_jax.config import DataConfig, IndexerConfig, ModelConfig, RunConfig, TextConfig, VisionConfig
from keye_jax.hf import names, reader, siglip, writer
from keye_jax.nn import contrast, counts
from launch import assemble
from launch.run_config import load
from tests.hf.models import MODELS, TEXT, random_params, tiny_tokenizer
from tests.tolerances import assert_close

VISION = VisionConfig(layers=2, embed=16, heads=2, ffn=28, image=56)
INDEXER = ['--indexer-heads', '3', '--indexer-dim', '8', '--topk', '8']


def command(lm, vit, out, *words: str) -> int:
  parser = argparse.ArgumentParser()
  assemble.add_arguments(parser)
  return assemble.run(parser.parse_args(['--lm', str(lm), '--vit', str(vit), '--out', str(out), *INDEXER, *words]), [])


def without_specials(size: int) -> tokenizer.Tokenizer:
  """Bytes and the two tokens that end something, as a language model has them."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.train_from_iterator([], tokenizers.trainers.BpeTrainer(
      vocab_size=size, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  backend.add_tokens([tokenizers.AddedToken(t, special=True) for t in ('<|endoftext|>', '<|im_end|>')])
  return tokenizer.Tokenizer(backend, {}, '', 'bytes')


def write_siglip(folder, **change) -> dict[str, np.ndarray]:
  """A SigLIP folder as the hub has it: tower, pooling head, text model and the loss's two numbers."""
  folder.mkdir()
  rng, v = np.random.default_rng(1), VISION
  shapes = {t.name.removeprefix('visual.'): t.shape for t in siglip.table(ModelConfig(TEXT, VISION))}
  shapes |= {'vision_model.head.probe': (1, 1, v.embed), 'text_model.embeddings.token_embedding.weight': (9, v.embed),
             'logit_scale': (1,), 'logit_bias': (1,)}
  tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
  save_file(tensors, folder / 'model.safetensors')
  keys = {'hidden_size': v.embed, 'intermediate_size': v.ffn, 'num_hidden_layers': v.layers,
          'num_attention_heads': v.heads, 'patch_size': v.patch, 'image_size': v.image}
  (folder / 'config.json').write_text(json.dumps({'model_type': 'siglip', 'vision_config': keys | change}))
  return tensors


def write_lm(folder, model='qwen3_moe', words=None, **change) -> dict:
  cfg = dataclasses.replace(MODELS[model], text=dataclasses.replace(MODELS[model].text, **change))
  params = random_params(cfg, model)
  params['layers']['attn_norm'][1] *= 20          # a deep layer whose norm has grown
  writer.export(str(folder), cfg, params, words or tiny_tokenizer(), model, dtype='float32')
  return writer.flatten(params)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(folder, parameters of the language model, tensors of the tower, report); small shards, so that there are many."""
  path = tmp_path_factory.mktemp('assemble')
  lm, tower = write_lm(path / 'lm'), write_siglip(path / 'vit')
  halves = assemble.open_halves(str(path / 'lm'), str(path / 'vit'), MODELS['keye'].text.indexer)
  assert command(path / 'lm', path / 'vit', path / 'out', '--dtype', 'float32', '--shard-bytes', '30000') == 0
  return path / 'out', lm, tower, assemble.report('out', halves, assemble.new_params(halves, 0))


def test_what_the_folders_hold_is_copied(made):
  out, lm, tower, _ = made
  back = reader.load_folder(str(out))
  ours = writer.flatten(back.params)
  for path, value in lm.items():
    np.testing.assert_array_equal(ours[path], value, err_msg=path)
  assert sum(file.endswith('.safetensors') for file in os.listdir(out)) > 5
  source, seen = reader.open_folder(str(out)), 0
  for name, value in tower.items():
    if f'visual.{name}' in source.shapes:
      np.testing.assert_array_equal(source.read(f'visual.{name}', ()), value, err_msg=name)
      seen += 1
  assert seen == len(tower) - 4
  assert (back.format, back.config.text.mrope_section, back.config.attention) == ('keye', (2, 1, 1), 'sparse')
  assert back.config.vision == VISION


def test_what_is_new_is_random_and_listed(made):
  out, lm, tower, facts = made
  back = reader.load_folder(str(out))
  ours, indexer = writer.flatten(back.params), back.params['layers']['attn']['indexer']
  assert facts['parameters'] == sum(x.size for x in ours.values()) == counts.describe(back.config)['parameters']
  assert facts['copied'] == sum(x.size for x in lm.values()) + sum(
      x.size for name, x in tower.items() if f'visual.{name}' in reader.open_folder(str(out)).shapes)
  new = {part: each['parameters'] for part, each in facts['new'].items()}
  assert new == {'projector': sum(x.size for path, x in ours.items() if path.startswith('projector')),
                 'indexers': sum(x.size for path, x in ours.items() if '/indexer/' in path),
                 'packing positions': 32768 * 16, 'vocabulary': 0}
  assert '320 rows have room for all' in facts['new']['vocabulary']['how'] and not facts['new tokens']
  assert sorted(facts['left out']) == ['logit_bias', 'logit_scale', 'text_model.embeddings.token_embedding.weight',
                                       'vision_model.head.probe']
  shown = assemble.text(facts)
  assert 'projector' in shown and f'{facts["parameters"]:,} parameters' in shown and 'left out: 4 tensors' in shown
  rms_L = np.sqrt((lm['layers/attn_norm'] ** 2).mean(-1))
  spread_L = indexer['gate'].std((1, 2)) * rms_L                # 24^-0.5, whatever the norm before it
  np.testing.assert_allclose(spread_L, 24 ** -0.5, rtol=0.25)
  assert rms_L[1] > 10 * rms_L[0] and 0.1 < indexer['q'].std() < 0.4
  assert (indexer['q_norm'] == 1).all() and ours['projector/fc1'].std() > 0


def test_it_is_the_language_model_until_it_is_trained(made, tmp_path):
  """Text has equal positions on the three axes, so with dense attention nothing has changed."""
  out, _, _, _ = made
  tokens_BT = np.random.default_rng(0).integers(0, 300, (1, 20))
  ours = api.logits(*api.load_pretrained(out, attention='dense'), tokens_BT)
  assert_close(ours, api.logits(*api.load_pretrained(out.parent / 'lm'), tokens_BT))


def test_stage_0_begins_with_it(made):
  import jax
  out, lm, _, _ = made
  model, said = dataclasses.replace(api.load_pretrained(out)[0].config, attention='dense'), []
  params = begin.initial_params(model, str(out), jax.random.key(0), said.append)
  assert not said and (params['norm'] == lm['norm']).all()
  assert load('configs/pretrain.py:30b,stage=0').train.freeze == ('', '!projector')


@pytest.mark.parametrize('model', ['qwen3_moe', 'qwen3'])
def test_a_vocabulary_without_room_grows_by_the_mean(tmp_path, capsys, model):
  """A model whose 258 rows are all used gets rows for Keye's other special tokens; the dense one ties its head."""
  words = without_specials(256)
  lm = write_lm(tmp_path / 'lm', model, words, vocab=words.size)
  write_siglip(tmp_path / 'vit')
  assert command(tmp_path / 'lm', tmp_path / 'vit', tmp_path / 'out', '--dtype', 'float32', '--json') == 0
  facts = json.loads(capsys.readouterr().out)
  new = [t for t in tokenizer.SPECIALS if t not in ('<|endoftext|>', '<|im_end|>')]
  assert facts['new tokens'] == new and f'258 rows became {258 + len(new)}' in facts['new']['vocabulary']['how']
  assert facts['new']['vocabulary']['parameters'] == len(new) * 24 * (1 if model == 'qwen3' else 2)
  loaded, params = api.load_pretrained(tmp_path / 'out')
  assert loaded.config.text.vocab == loaded.tokenizer.size == 258 + len(new)
  assert loaded.tokenizer.id('<|im_end|>') == 257 and loaded.tokenizer.id('<|video_pad|>') > 257
  np.testing.assert_array_equal(params['embed'][:258], lm['embed'])
  assert_close(params['embed'][258:], np.repeat(lm['embed'].mean(0, keepdims=True), len(new), 0))
  assert ('head' in params) == (model == 'qwen3_moe')
  if model == 'qwen3_moe':
    assert_close(params['head'][:, 258:], np.repeat(lm['head'].mean(1, keepdims=True), len(new), 1))


def test_qwen3s_tokenizer_gets_the_ids_of_keye():
  """Qwen3 has Keye's special tokens up to </think>."""
  whole = tokenizer.keye()
  small = json.loads(whole._full.to_str())
  small['added_tokens'] = [t for t in small['added_tokens'] if t['id'] <= whole.id('</think>')]
  lm = tokenizer.Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(small)), {}, '', 'qwen3')
  words, new = tokenizer.with_specials(lm)
  assert lm.size == 151669 and new[-1] == '<|fast_video_pad|>' and words.id(new[-1]) == 151678
  assert all(words.id(t) == whole.id(t) for t in tokenizer.SPECIALS) and words.size == whole.size


def test_what_does_not_fit_is_named(made, tmp_path):
  out, *_ = made
  lm, vit = out.parent / 'lm', out.parent / 'vit'

  def refused(*args) -> str:
    with pytest.raises(InputError) as caught:
      command(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)

  assert 'already exists' in refused(lm, vit, out)
  assert "is no SigLIP; supported are siglip, siglip_vision_model" in refused(lm, lm, tmp_path / 'x')
  assert 'holds a keye model; a Keye is made from a qwen3_moe or qwen3' in refused(out, vit, tmp_path / 'x')
  write_siglip(tmp_path / 'deep', num_hidden_layers=3)
  assert "encoder.layers.2" in refused(lm, tmp_path / 'deep', tmp_path / 'x')
  write_siglip(tmp_path / 'relu', hidden_act='relu')
  assert "hidden_act 'relu' is not supported" in refused(lm, tmp_path / 'relu', tmp_path / 'x')
  assert not (tmp_path / 'x').exists()


def test_the_published_parts_make_the_published_model():
  """Shapes only: a Qwen3-30B-A3B and a so400m tower have every tensor of Keye-VL-2.0 but the new ones."""
  from configs import keye_vl_2_30b_a3b
  keye = keye_vl_2_30b_a3b.model()
  lm = ModelConfig(dataclasses.replace(keye.text, mrope_section=(), indexer=IndexerConfig()))
  whole = assemble.together(lm.text, keye.vision, keye.text.indexer, 151679)
  assert (whole.text, whole.vision) == (keye.text, keye.vision)
  have = names.leaves(names.table(lm, 'qwen3_moe')).keys() | names.leaves(siglip.table(whole)).keys()
  new = {path: leaf.shape for path, leaf in names.leaves(names.table(whole, 'keye')).items() if path not in have}
  total = lambda keep: sum(int(np.prod(shape)) for path, shape in new.items() if keep in path)
  assert (total('projector/'), total('/indexer/'), total('packing')) == (30_686_720, 108_536_832, 32768 * 1152)
  assert len(new) == 6 + 6 + 1


def test_the_tower_may_come_from_its_own_stage(tmp_path, capsys):
  """The tower of a run of the stage vit, without its text tower and the numbers of its loss."""
  towers = RunConfig(ModelConfig(TextConfig(layers=1, embed=8, heads=1, kv_heads=1, head_dim=8), VISION, contrast=True),
                     data=DataConfig(samples=1))
  state = begin.programs(towers).fresh(jax.random.key(5))
  params = state.train
  run = tmp_path / 'vit'
  run.mkdir()
  run_folder.write_config(run, towers)
  checkpoints = checkpoint.Checkpoints(run, 1, print)
  checkpoints.save(0, state, {})
  checkpoints.wait()
  write_lm(tmp_path / 'lm')
  assert command(tmp_path / 'lm', run, tmp_path / 'out', '--dtype', 'float32') == 0
  left = [path for path in writer.flatten(params) if not path.startswith('vision/')]
  assert f'left out: {len(left)} tensors' in capsys.readouterr().out
  made = api.load_pretrained(tmp_path / 'out')[1]
  jax.tree.map(np.testing.assert_array_equal, made['vision'], params['vision'])
  with pytest.raises(InputError, match='holds a language model; --vit takes the run of the stage vit, or a SigLIP'):
    run_folder.write_config(run, dataclasses.replace(towers, model=dataclasses.replace(towers.model, contrast=False)))
    command(tmp_path / 'lm', run, tmp_path / 'other')


def test_a_siglip_folder_begins_the_stage_vit(tmp_path):
  """The tower is copied, its unread packing positions are zeros, the text tower is new."""
  stored = write_siglip(tmp_path / 'vit')
  model = ModelConfig(TextConfig(layers=1, embed=8, heads=1, kv_heads=1, head_dim=8), VISION, contrast=True)
  said = []
  params = begin.initial_params(model, str(tmp_path / 'vit'), jax.random.key(0), said.append)
  assert said == [f'{tmp_path / "vit"}: has no text tower; a new one is initialised']
  shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), tree)
  assert shapes(params) == shapes(contrast.param_shapes(model))
  assert not params['vision']['packing_position'].any()
  position = stored['vision_model.embeddings.position_embedding.weight']
  np.testing.assert_array_equal(params['vision']['position'], position)
  assert_close(params['text']['embed'], contrast.init(model, jax.random.key(0))['text']['embed'])
