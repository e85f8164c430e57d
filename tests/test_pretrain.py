"""The stages of configs/pretrain.py: valid configs that train what they promise, each begun from the one before."""
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import layouts, pretrain
from data_pipelines import tokenizer
from data_pipelines.errors import InputError
from data_pipelines.frameforge import render
from keye_jax import api, begin, checkpoint, feed, loop, metrics, sharding
from keye_jax.config import VisionConfig, to_dict
from keye_jax.hf import writer
from keye_jax.nn import contrast
from keye_jax.nn.model import init_params, param_shapes
from keye_jax.steps import state as state_lib
from keye_jax.steps.optimizer import rates
from launch.run_config import load

ALL = [(size, stage) for size, stages in pretrain.STAGES.items() for stage in stages]
INDEXER = lambda path: '/indexer/' in path
TOWER = lambda path: path.startswith(('vision/', 'projector/'))
TRAINED = {                     # stage -> which parameters it promises to move
    'vit': lambda path: True, 'text': lambda path: not INDEXER(path) and not TOWER(path),
    '0': lambda path: path.startswith('projector/'),
    '1': lambda path: not INDEXER(path), '2': lambda path: not INDEXER(path), '3-warmup': INDEXER,
    '3': lambda path: True}
TOKENS = {'vit': 500e9, '0': 4e9, '1': 1e12, '2': 2e12, '3-warmup': 2e9, '3': 500e9}       # arXiv 2606.10651
LENGTH = {'vit': 4096, '0': 8192, '1': 32768, '2': 65536, '3-warmup': 262144, '3': 262144}


@pytest.mark.parametrize('size, stage', ALL)
def test_every_stage_is_a_valid_config_that_trains_what_it_says(size, stage):
  config = load(f'configs/pretrain.py:{size},stage={stage}')
  assert load(f'configs/pretrain.py:{size},stage={stage}', ['--config.train.init=x']).train.init == 'x'
  train, frozen = state_lib.split(param_shapes(config.model), config.train.freeze)
  assert all(map(TRAINED[stage], writer.flatten(train))) and not any(map(TRAINED[stage], writer.flatten(frozen)))
  assert config.model.attention == {'3-warmup': 'warmup', '3': 'sparse'}.get(stage, 'dense')
  rates(config.optimizer, config.train.steps)
  data, mesh, rows = config.data, config.mesh, config.train.batch // config.train.accumulate
  shape = dict(data=mesh.data, context=mesh.context, expert=mesh.expert)
  assert rows % math.prod(shape[axis] for axis in np.ravel(sharding.LAYOUTS[config.model.layout]['batch'])) == 0
  assert sum(s.weight for s in data.sources) == pytest.approx(1)
  if data.vision_rows:
    room = data.vision_rows * data.vision_patches // 4
    assert room >= min(data.tokens, data.video_tokens) - data.frame_tokens_max
    assert data.vision_patches >= 4 * max(data.image_tokens_max, data.frame_tokens_max)


@pytest.mark.parametrize('stage', pretrain.STAGES['30b'])
def test_the_published_stages_have_the_published_sizes(stage):
  config = load(f'configs/pretrain.py:30b,stage={stage}')
  assert config.data.tokens == LENGTH[stage]
  assert config.train.steps * config.train.batch * config.data.tokens == pytest.approx(TOKENS[stage], rel=0.06)
  long = sum(s.weight for s in config.data.sources if s.name != 'short')
  assert stage[0] != '3' or long == pytest.approx(0.5)
  assert (config.data.max_seconds, config.data.video_tokens) == {
      '1': (16.0, 24576), '2': (900.0, 61440), '3': (7200.0, 184320)}.get(stage[0], (14400.0, 184320))


@pytest.mark.parametrize('config', [*(f'configs/pretrain.py:30b,stage={stage}' for stage in pretrain.STAGES['30b']),
                                    *(f'configs/layouts.py:{s}_{m}' for s, stage in layouts.STAGES.items()
                                      for m, meshes in layouts.MESHES.items() if stage.like in meshes)])
def test_the_rows_of_a_large_run_divide_over_its_mesh(config):
  config = load(config)
  mesh = jax.sharding.AbstractMesh(dataclasses.astuple(config.mesh), sharding.AXES)
  with jax.sharding.use_abstract_mesh(mesh):
    feed.check(config.model.layout, config.data.tokens, config.data.vision_rows)
    assert config.train.batch // config.train.accumulate % sharding.extent(config.model.layout, 'batch') == 0


@pytest.mark.parametrize('variant', ['', 'tiny', 'tiny,stage=4', '30b,stage=text', 'huge,stage=1'])
def test_an_unknown_stage_gives_one_line_with_those_there_are(variant):
  with pytest.raises(InputError) as caught:
    load(f'configs/pretrain.py:{variant}')
  assert str(caught.value) == (f'configs/pretrain.py: no variant {variant!r}; there are tiny,stage= vit, text, 0, 1, '
                               '2, 3-warmup, 3; 30b,stage= vit, 0, 1, 2, 3-warmup, 3')


@pytest.mark.parametrize('override, message', [
    ('data.samples=0', 'model.contrast needs data.samples, the most pictures with their captions in a row'),
    ('train.accumulate=2', "micro-batches would not see each other's captions; model.contrast needs 1"),
    ('model.vision_balance=0.5', 'model.vision_balance = 0.5 must be 0 to 1, and 0 with model.contrast'),
    ('model.text.experts=4', 'a text tower without experts')])
def test_what_two_towers_need_is_said(override, message):
  with pytest.raises(InputError, match=message):
    load('configs/pretrain.py:tiny,stage=vit', [f'--config.{override}', '--config.model.text.experts_per_token=1'])


# ---- really run, small -------------------------------------------------------------------------------------------

def small(stage: str, folder, init: str = '') -> pretrain.RunConfig:
  """The tiny stage, three steps of two shorter rows."""
  config = pretrain.tiny(stage)
  vision_rows = 8 if config.data.vision_rows else 0
  model = config.model
  if model.text.indexer.heads:
    topk = dataclasses.replace(model.text.indexer, topk=8)
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, indexer=topk))
  return dataclasses.replace(
      config, model=model,
      optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
      data=dataclasses.replace(config.data, path=str(folder), tokens=96, vision_rows=vision_rows),
      train=dataclasses.replace(config.train, steps=3, batch=2, log_every=1, init=init, heldout='',
                                eval_every=0))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """text.jsonl, images.jsonl and train.jsonl with 12 rows each, as the tiny stages read them."""
  path, rng, words = tmp_path_factory.mktemp('data'), np.random.default_rng(0), 'red green blue one two three'.split()
  rows = {'text': [], 'images': [], 'train': []}
  for i in range(12):
    Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(path / f'{i}.png')
    render.write_mp4(path / f'{i}.mp4', rng.integers(0, 256, (8, 56, 56, 3), np.uint8), fps=4)
    for kind, tag, media in (('text', '', {}), ('images', '<image>', {'images': [f'{i}.png']}),
                             ('train', '<video>', {'videos': [f'{i}.mp4']})):
      said = ' '.join(rng.choice(words, 6))
      rows[kind].append(media | {'messages': [{'role': 'user', 'content': f'{tag}{said[:8]}'},
                                              {'role': 'assistant', 'content': said}]})
  for kind, each in rows.items():
    (path / f'{kind}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in each))
  tokenizer.train_bpe([' '.join(words)] * 9, 400).save(path)
  return path


def params_of(run, config):
  return checkpoint.load_params(run, param_shapes(config.model), print).params


def moved(before, after) -> set[str]:
  a, b = writer.flatten(before), writer.flatten(after)
  assert a.keys() == b.keys()
  return {path for path in a if (np.asarray(a[path]) != np.asarray(b[path])).any()}


@pytest.mark.slow
def test_each_stage_starts_from_the_one_before_and_moves_what_it_promises(folder, tmp_path, capsys):
  """Six runs of three steps; the table that nothing reads stays, whatever is trained."""
  last = ''
  for stage in ('vit', 'text', '0', '1', '3-warmup', '3'):
    config, said = small(stage, folder, last), []
    key = jax.random.key(config.train.seed)
    before = begin.initial_params(config.model, last, key, said.append) if last else None
    out = tmp_path / stage
    capsys.readouterr()
    assert loop.train(config, out).step == 3
    shown, after = capsys.readouterr().err, params_of(out, config)
    if last:
      expected = {path for path in writer.flatten(after) if TRAINED[stage](path)} - {'vision/packing_position'}
      assert moved(before, after) == expected
    assert len(said) == (4 if stage == 'text' else 0) and all(line in shown for line in said)
    assert ('trains projector 25,024' in shown) == (stage == '0')
    assert ('trains indexers ' in shown) == (stage == '3-warmup')
    assert ('frozen are' in shown) == (stage not in ('vit', '3'))
    record = metrics.read(out)[-1]
    assert math.isfinite(record['loss']) and ('indexer_kl' in record) == (stage[0] == '3')
    last = str(out)


def test_a_language_model_gets_a_new_vision_encoder_and_says_so(folder, tmp_path):
  text, seen = small('0', folder), small('0', folder)
  text = dataclasses.replace(text, model=dataclasses.replace(text.model, vision=VisionConfig()),
                             train=dataclasses.replace(text.train, freeze=()))
  theirs = begin.programs(text).fresh(jax.random.key(3))
  saved(tmp_path / 'text', text, theirs)
  said = []
  params = begin.initial_params(seen.model, str(tmp_path / 'text'), jax.random.key(0), said.append)
  assert said == [f'{tmp_path / "text"}: has no {part}; a new one is initialised'
                  for part in ('vision encoder', 'projector')]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, param_shapes(seen.model))
  old, new = writer.flatten(state_lib.merge(theirs.train, theirs.frozen)), writer.flatten(params)
  assert not [path for path in old if (old[path] != new[path]).any()]
  assert {path.split('/')[0] for path in new.keys() - old.keys()} == {'vision', 'projector'}
  assert not seen.train.init and to_dict(seen).train.freeze == pretrain.ONLY_PROJECTOR


@pytest.mark.slow
def test_a_vision_tower_gets_a_language_model_and_leaves_its_text_tower(folder, tmp_path):
  towers, seen = small('vit', folder), small('text', folder)
  theirs = begin.programs(towers).fresh(jax.random.key(3))
  saved(tmp_path / 'vit', towers, theirs)
  said = []
  params = begin.initial_params(seen.model, str(tmp_path / 'vit'), jax.random.key(0), said.append)
  assert said == [f'{tmp_path / "vit"}: {what}' for what in (
      'has no indexer; a new one is initialised', 'has no language model; a new one is initialised',
      'has no projector; a new one is initialised', 'its text tower is left out, this model has none')]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, param_shapes(seen.model))
  jax.tree.map(np.testing.assert_array_equal, params['vision'], theirs.train['vision'])
  new = init_params(seen.model, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, params['layers'], new['layers'])
  # and the other way: the tower of a language model goes on with a new text tower
  saved(tmp_path / 'text', seen, begin.programs(seen).around(params, jax.random.key(0)))
  back = begin.initial_params(towers.model, str(tmp_path / 'text'), jax.random.key(0), print)
  assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, contrast.param_shapes(towers.model))
  jax.tree.map(np.testing.assert_array_equal, back['vision'], theirs.train['vision'])
  with pytest.raises(InputError, match='vit: holds a vision tower and its text tower, which answer nothing'):
    api.load_pretrained(tmp_path / 'vit')


def test_gates_of_new_indexers_make_up_for_the_norm_before_them():
  """A norm of 5 in layer 1 makes its gates 5 times smaller: the scores begin alike in both layers."""
  model = pretrain.tiny('3').model
  norm_LD, ones_LD = jnp.array([[1.0], [5.0]]) * jnp.ones((2, 64)), jnp.ones((2, 64))
  made, plain = (begin.new_params(model, jax.random.key(0), begin.PARTS[0].holds, x) for x in (norm_LD, ones_LD))
  made, plain = (x['layers']['attn']['indexer'] for x in (made, plain))
  np.testing.assert_allclose(made['gate'] * np.array([1, 5])[:, None, None], plain['gate'], rtol=1e-6)
  np.testing.assert_array_equal(made['q'], plain['q'])


def saved(run, config, state):
  from keye_jax import run_folder
  run.mkdir()
  run_folder.write_config(run, config)
  tokenizer.load(config.data.path).save(run)
  checkpoints = checkpoint.Checkpoints(run, 1, print)
  checkpoints.save(0, state, {})
  checkpoints.wait()
