"""A tiny dense model through the whole retrofit, and what is made of the scores."""
import argparse
import dataclasses
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest

from configs import dsa_retrofit as recipe
from configs import keye_vl_2_30b_a3b
from data_pipelines.errors import InputError
from keye_jax.config import RunConfig, freeze
from keye_jax.evals import key_values
from keye_jax.hf import writer
from launch import import_, results, retrofit, retrofit_page, run_config
from tests.hf.models import DATA, MODELS, random_params, tiny_tokenizer

WORDS = 'when does the {} appear? at {}.5 to 3.0 seconds\n'


# ---- recipe ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('text', [keye_vl_2_30b_a3b.model().text, recipe.SMOLLM2.text, MODELS['llama'].text])
def test_indexer_keeps_the_proportions_of_keye(text):
  made = recipe.indexer(text)
  assert made.heads * made.head_dim * 4 == text.heads * text.head_dim and made.head_dim % 2 == 0
  if text.heads == 32:
    published = keye_vl_2_30b_a3b.model().text.indexer
    assert (made.heads, made.head_dim) == (published.heads, published.head_dim)


@pytest.mark.parametrize('name', recipe.STAGES)
def test_stages_are_configs(name):
  config = run_config.load(f'configs/dsa_retrofit.py:smollm2:{name}')
  assert config == freeze(RunConfig, recipe.get_config(f'smollm2:{name}'))
  assert config.model.attention == {'warmup': 'warmup', 'sparse': 'sparse', 'dense': 'dense'}[name]
  assert config.train.steps * config.train.batch >= 200


@pytest.mark.parametrize('name', recipe.STAGES)
def test_the_recipe_of_a_gpu_differs_in_rows_and_steps_only(name):
  there, here = (run_config.load(f'configs/dsa_retrofit.py:smollm2{gpu}:{name}') for gpu in (',gpu', ''))
  assert there.data.tokens == there.model.text.max_position and there.train.steps == recipe.GPU_STEPS[name]
  assert there.optimizer == here.optimizer and there.train.freeze == here.train.freeze
  assert dataclasses.replace(there.model, remat='') == dataclasses.replace(here.model, remat='')
  assert there.train.steps * there.train.batch * there.data.tokens >= 0.8 * (
      here.train.steps * here.train.batch * here.data.tokens)


def test_a_model_that_is_not_there_is_said(tmp_path):
  with pytest.raises(InputError, match='neither smollm2 nor a run folder'):
    run_config.load(f'configs/dsa_retrofit.py:{tmp_path}:sparse')


# ---- the whole command -------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(what to type, --out) for a tiny Llama on tiny texts."""
  root = tmp_path_factory.mktemp('retrofit')
  writer.export(str(root / 'hf'), MODELS['llama'], random_params(MODELS['llama'], 'llama'), tiny_tokenizer(), 'llama',
                DATA, 'float32')
  import_.write(str(root / 'hf'), str(root / 'model'), 'float32')
  for i in range(20):
    (root / 'texts').mkdir(exist_ok=True)
    (root / 'texts' / f'{i}.txt').write_text(''.join(WORDS.format(i, j) for j in range(40)))
  words = ['--config', f'configs/dsa_retrofit.py:{root}/model', '--out', str(root / 'out'), '--text',
           str(root / 'texts'), '--windows', '2', '--json']
  return words, root / 'out'


def command(words, *overrides) -> int:
  parser = argparse.ArgumentParser()
  retrofit.add_arguments(parser)
  small = ['--config.data.tokens=64', '--config.train.steps=6', '--config.model.text.indexer.topk=16']
  return retrofit.run(parser.parse_args(words), [*small, *overrides])


@pytest.mark.slow
def test_every_arm_is_measured_once_and_the_command_goes_on(made, capsys, monkeypatch):
  words, out = made
  words = [*words, '--length', '64', '128']
  monkeypatch.setattr(key_values, 'QUESTION', '\n{0[0]}')
  monkeypatch.setattr(key_values, 'PAIRS', 2)
  monkeypatch.setattr(retrofit, 'ARMS', [a if len(a.topks) == 1 else a._replace(topks=(16, 64)) for a in retrofit.ARMS])
  assert command([*words, '--until', 'source']) == 0
  said = json.loads(capsys.readouterr().out)['rows']['64']
  assert set(said) == {'dense', 'oracle', 'window + 4 sinks', 'untrained indexer'}
  first = json.loads((out / 'scores_64.json').read_text())['arms']
  assert command(words) == 0
  both = json.loads(capsys.readouterr().out)
  said = both['rows']['64']
  assert set(said) == {arm.name for arm in retrofit.ARMS} and said['after warm-up']['16']['step'] == 6
  for arm, ks in said.items():
    for k, x in ks.items():
      assert x['n'] == (1 if arm in ('window + 4 sinks', 'untrained indexer') else 2)
      assert x['low'] <= x['cost'] + 1e-9 and x['cost'] <= x['high'] + 1e-9
      if k == '64' and arm not in ('after sparse stage', 'dense, fine-tuned'):       # all keys: the dense model itself
        assert abs(x['cost']) < 1e-5 and min(x['mass']) > 1 - 1e-4 and x['overlap'] == [1, 1]
  assert said['oracle']['16']['mass'] >= said['window + 4 sinks']['16']['mass']
  assert {x['n'] for ks in both['rows']['128'].values() for x in ks.values()} == {1}       # as many tokens
  for n in ('64', '128'):
    asked = both['answers'][n]
    assert set(asked) == set(said)
    assert {x['n'] for ks in asked.values() for x in ks.values()} == ({2, 4} if n == '64' else {2})
    assert asked['oracle']['64']['nats'] == pytest.approx(asked['dense']['0']['nats'], rel=1e-5) or n == '128'
  after = json.loads((out / 'scores_64.json').read_text())['arms']
  assert {arm: after[arm] for arm in first} == first
  before = (out / 'scores_64.json').stat().st_mtime_ns
  assert command(words) == 0 and (out / 'scores_64.json').stat().st_mtime_ns == before      # nothing is left to do
  capsys.readouterr()
  with pytest.raises(InputError, match='was measured with'):
    command(words, '--config.model.text.indexer.heads=4')


@pytest.mark.slow
def test_the_control_needs_no_other_stage(made, capsys, tmp_path):
  words, _ = made
  words = [*words, '--out', str(tmp_path), '--arm', 'dense', '--arm', 'dense, fine-tuned']
  assert command(words) == 0
  said = json.loads(capsys.readouterr().out)
  assert set(said['rows']['64']) == {'dense', 'dense, fine-tuned'} and {'command', 'commit', 'hardware'} <= set(said)
  assert said['rows']['64']['dense, fine-tuned']['0']['cost'] != 0
  assert not (tmp_path / 'warmup').exists() and not (tmp_path / 'sparse').exists()
  with pytest.raises(InputError, match='--record is of all arms'):
    command([*words, '--record'])
  with pytest.raises(InputError, match='--until source comes before after warm-up'):
    command([*words[:-4], '--arm', 'after warm-up', '--until', 'source'])


# ---- what is made of the scores ----------------------------------------------------------------------------------

def scores(**costs) -> dict:
  """Two windows an arm; costs: {'after_warm_up_256': 0.02, ...} of perplexity over 10."""
  window = lambda cost, tokens: {'nll': tokens * math.log(10 * (1 + cost)), 'tokens': tokens, 'mass': [0.9, 0.8],
                                 'overlap': [0.7, 0.6]}
  arms = {'dense': {'step': 0, 'k': {'0': [window(0, 100), window(0, 300)]}}}
  names = {'oracle': 'oracle', 'warm': 'after warm-up', 'sparse': 'after sparse stage', 'control': 'dense, fine-tuned'}
  for key, cost in costs.items():
    arm, k = key.split('_')
    found = arms.setdefault(names[arm], {'step': 7, 'k': {}})
    found['k'][k] = [window(cost, 100), window(cost, 300)]
  return {'made with': {'indexer': {'heads': 2, 'head_dim': 4}, 'tokens': 64, 'text': 'texts'}, 'arms': arms}


def asked(**exact) -> dict:
  """One row with two questions, about its begin and its end; dense attention answers both."""
  row = lambda exact: {'logp': [-1.0, -3.0], 'exact': exact, 'depth': [0.1, 0.9]}
  arms = {'dense': {'step': 0, 'k': {'0': [row([1, 1])]}}} if exact else {}
  return {'made with': {}, 'arms': arms | {arm: {'step': 0, 'k': {'256': [row(x)]}} for arm, x in exact.items()}}


GOOD = dict(oracle_256=0.01, warm_256=0.02, warm_512=0.005, sparse_256=-0.001, control_0=-0.01)


def test_summary_is_relative_to_dense_on_the_same_windows():
  measured = scores(**GOOD)
  measured['arms']['oracle']['k']['256'].append({'nll': 1e9, 'tokens': 1, 'mass': [0, 0], 'overlap': [0, 0]})
  found = retrofit_page.summary(measured)
  x = found['oracle']['256']
  assert x['n'] == 2 and x['tokens'] == 400 and x['mass'] == [0.9, 0.8]
  assert x['cost'] == pytest.approx(0.01) and x['low'] == pytest.approx(0.01) and x['perplexity'] == pytest.approx(10.1)


def test_answers_are_beside_those_of_dense_attention():
  found = retrofit_page.answers(asked(oracle=[1, 0]))
  assert found['dense']['0']['exact'] == 1 and found['dense']['0']['less'] == 0
  x = found['oracle']['256']
  assert (x['exact'], x['less'], x['nats'], x['n'], x['by_depth']) == (0.5, 0.5, 2.0, 2, [1.0, None, None, 0.0])


@pytest.mark.parametrize('change, why', [
  ({}, ''),
  ({'warm_256': 0.031}, 'after warm-up at k = 256 costs 3.1% over dense, more than 3%'),
  ({'sparse_256': 0.001}, 'after sparse stage at k = 256 costs 1.1% over dense, fine-tuned, more than 1%'),
  ({'warm_512': None}, 'after warm-up at k = 512 was not run'),
  ({'control_0': None}, 'dense, fine-tuned was not run'),
])
def test_the_claim_needs_every_aim(change, why):
  """On the windows of both: dense attention was measured on one more."""
  measured = scores(**{k: v for k, v in (GOOD | change).items() if v is not None})
  measured['arms']['dense']['k']['0'].append({'nll': 9, 'tokens': 1, 'mass': [0, 0], 'overlap': [0, 0]})
  assert retrofit_page.lacks(retrofit_page.summary(measured)) == why


def test_page_and_plots_are_made_of_the_evidence_file(tmp_path, monkeypatch):
  monkeypatch.setattr(results, 'FOLDER', tmp_path / 'results')
  monkeypatch.setattr(retrofit_page, 'PAGE', tmp_path / 'lossless.md')
  (tmp_path / 'lossless.md').write_text(f'# a\n{results.START.format("lossless")}\nold\n{results.END}\nb\n')
  retrofit_page.record({128: (scores(warm_256=0.03), asked(oracle=[1, 0])),
                        64: (scores(warm_256=0.02, warm_512=0.005), asked())})
  said = json.loads((tmp_path / 'results' / 'lossless.json').read_text())
  assert said['verdict'] == 'not shown' and said['why'] == 'after sparse stage at k = 256 was not run'
  assert said['n'] == 2
  assert said['arms'] == {'after warm-up': {'0': {
      'perplexity k=256': 10.2, 'cost k=256': 0.02, 'perplexity k=512': 10.05, 'cost k=512': 0.005,
      'perplexity k=256 in rows of 128': 10.3, 'cost k=256 in rows of 128': 0.03}}}
  assert said['baselines']['oracle'] == {'answers right k=256 in rows of 128': 0.5}
  page = (tmp_path / 'lossless.md').read_text()
  assert page.startswith('# a\n') and page.endswith(f'{results.END}\nb\n') and 'old' not in page
  assert '| dense | 0 | 2 | 10.000 | 10.000 | 10.000 | 10.000 |' in page
  assert '| after warm-up | 7 | 2 | not run | not run | +2.00% (+2.0% to +2.0%) |' in page
  assert '| oracle | – | 0 | not run | not run | not run | not run |' in page
  assert '| after warm-up | 0.850 | 0.800, 1 | 0.650 | 0.600, 1 |' in page
  assert page.index('Rows of 64') < page.index('Rows of 128') < page.index('pairs hidden all over rows of 128')
  assert '| dense | 2 | 100% | 100% | 100% | 100% | 100%, –, –, 100% |' in page
  assert '| oracle | 2 | not run | not run | 50% (-50%, -50% to -50%) | not run | 100%, –, –, 0% |' in page
  for name in ('lossless_cost.svg', 'lossless_layers.svg'):
    assert ElementTree.fromstring((tmp_path / name).read_text()).tag.endswith('svg')


def test_every_arm_has_its_place_on_the_page():
  assert [a.name for a in retrofit.ARMS] == [*retrofit_page.BASELINES, *retrofit_page.TRAINED]
  assert tuple(map(str, retrofit.TOPKS)) == retrofit_page.TOPKS
  assert dataclasses.asdict(recipe.indexer(recipe.SMOLLM2.text)) == {'heads': 4, 'head_dim': 36, 'topk': 256}
