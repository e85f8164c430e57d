"""The ladder at a size that cannot learn: every stage runs and is scored, once; and what its claim needs."""
import dataclasses
import json

import pytest

from configs import ladder as recipe
from configs import pretrain, quickstart, sft
from data_pipelines.errors import InputError
from data_pipelines.frameforge import captions, transcript
from keye_jax.config import RunConfig, check, freeze
from keye_jax.evals import events
from keye_jax.steps.optimizer import rates
from launch import ladder, ladder_page, results

CLIPS = dict(n_train=12, n_heldout=4, n_images=24, seed=0, processes=1)
MORE = dict(n_train=0, n_heldout=7, n_images=0, seed=1, processes=1)


def small(name: str, runs: str) -> RunConfig:
  run = recipe.stage(name, runs)
  text = dataclasses.replace(run.model.text, layers=1, embed=32, heads=2, kv_heads=1, ffn=32)
  if text.experts:
    text = dataclasses.replace(text, experts=2)
  vision = dataclasses.replace(run.model.vision, layers=1, embed=32, heads=2, ffn=32)
  return dataclasses.replace(
      run, model=dataclasses.replace(run.model, text=text, vision=vision),
      optimizer=dataclasses.replace(run.optimizer, warmup_steps=1),
      train=dataclasses.replace(run.train, steps=2, batch=2, log_every=1, save_every=2))


@pytest.mark.slow
def test_every_stage_runs_once_and_is_scored(tmp_path, capsys, monkeypatch):
  stages = {name: small(name, str(tmp_path)) for name in recipe.STAGES}
  first = {name: stages[name] for name in ('vit', 'text')}
  ladder.main(tmp_path, first, CLIPS, MORE, quickstart.VOCAB)
  before = {name: (tmp_path / name / 'metrics.jsonl').stat().st_mtime_ns for name in first}
  capsys.readouterr()
  measured = ladder.main(tmp_path, stages, CLIPS, MORE, quickstart.VOCAB)
  said = capsys.readouterr().out
  assert 'vit: trained and scored' in said and 'Train: 0 (2 steps)' in said and 'Train: text' not in said
  assert {name: (tmp_path / name / 'metrics.jsonl').stat().st_mtime_ns for name in first} == before
  assert json.loads((tmp_path / 'scores.json').read_text()) == measured and list(measured['stages']) == list(stages)
  asked, judged = (sum(len(json.loads(line)['branches']) for line in (tmp_path / folder / 'heldout.jsonl').open())
                   for folder in ('data', 'more'))
  assert {len(found['earned']) for name, found in measured['stages'].items() if name != 'vit'} == {asked}
  assert set(measured['stages']['vit']['scores']) == {'retrieval', 'chance', 'majority'}
  assert {arm.split(' (')[0] for arm in measured['baselines']} == {'majority answer by type', 'best constant interval'}

  monkeypatch.setattr(results, 'FOLDER', tmp_path / 'results')
  monkeypatch.setattr(ladder_page, 'PAGE', tmp_path / 'ladder.md')
  (tmp_path / 'ladder.md').write_text(f'# a\n{results.START.format("ladder")}\nold\n{results.END}\nb\n')
  said = json.loads(ladder_page.record(measured).read_text())
  assert said['verdict'] == 'not shown' and said['n'] == asked and set(said['baselines']) >= {'blind', '0-random-lm'}
  page = (tmp_path / 'ladder.md').read_text()
  assert page.startswith('# a\n') and page.endswith(f'{results.END}\nb\n') and 'old' not in page
  assert '| sft | 2, ' in page and '- 3 minus 2: ' in page
  assert 'event_recall' in measured['stages']['1']['scores'] and 'event recall' in page.replace('_', ' ')
  assert len(measured['stages']['3-dense']['losses']['nats']) == judged != asked and f'({judged} answers, ' in page
  with pytest.raises(InputError, match='stage 1 was measured with another recipe'):
    other = dataclasses.replace(stages['1'], train=dataclasses.replace(stages['1'].train, seed=1))
    ladder.main(tmp_path, stages | {'1': other}, CLIPS, MORE, quickstart.VOCAB)


@pytest.mark.parametrize('name', recipe.STAGES)
def test_a_stage_trains_and_reads_what_its_own_config_says(name):
  config = check(freeze(RunConfig, recipe.get_config(name)))
  base = sft.tiny() if name == 'sft' else pretrain.tiny(recipe.CONTROLS.get(name, name))
  freeze_, attention = base.train.freeze, base.model.attention
  if name == '3-dense':
    freeze_, attention = pretrain.INDEXERS_WAIT, 'dense'
  assert config.train.freeze == freeze_ and config.data.sources == base.data.sources
  assert config.model.attention == attention and config.model.contrast == base.model.contrast
  assert config.data.grey == (name == 'blind')
  rates(config.optimizer, config.train.steps)
  before = recipe.STAGES[name][0]
  assert config.train.init == (f'{recipe.RUNS}/{before}' if before else '')
  assert not before or list(recipe.STAGES).index(before) < list(recipe.STAGES).index(name)


def test_unknown_stage_is_named():
  with pytest.raises(ValueError, match="no stage '4'"):
    recipe.get_config('4')


def test_a_transcript_tells_what_is_on_screen():
  row = {'id': 'a', 'videos': ['a.mp4'], 'seconds': 2.0, 'type': ['count'], 'branches': [['asked']],
         'messages': [{'role': 'user', 'content': '<video>'}],
         'events': {'digit': [7, 3, 1], 'interval': [[0.5, 1.5], [1.0, 1.5], [1.5, 2.0]]}}
  made = transcript.transcribed(row)
  assert made['messages'] == [{'role': 'user', 'content': '0.0\n0.5 7\n1.0 7 3\n1.5 1\n'}]
  assert 'videos' not in made and {k: made[k] for k in ('id', 'type', 'branches')} == {
      'id': 'a', 'type': ['count'], 'branches': [['asked']]}


def measured(cost=0.005, **points):
  """A measurement of 40 questions of 20 clips where stage NAME earned that share of them; cost: of sparse attention."""
  clips = [str(i // 2) for i in range(40)]
  stage = lambda share: {'scores': {'accuracy': [share, share, share, 40]}, 'clips': clips, 'steps': 2,
                         'train seconds': 60.0, 'earned': [float(i < 40 * share) for i in range(40)]}
  vit = {'scores': {'retrieval': [0.5, 0.4, 0.6, 40], 'chance': [0.1] * 3 + [40], 'majority': [0.2, 0.1, 0.3, 40]},
         'steps': 3, 'train seconds': 30.0}
  losses = lambda scale: {'nats': [scale * (i + 1) for i in range(40)], 'tokens': [3] * 40, 'clips': clips}
  names = {'random': '0-random-lm', 'zero': '0', 'blind': 'blind', 'one': '1', 'two': '2', 'three': '3',
           'dense': '3-dense', 'sft': 'sft'}
  found = {'vit': vit} | {names[name]: stage(share) for name, share in points.items()}
  if 'dense' in points:
    found['3']['losses'], found['3-dense']['losses'] = losses(1 + cost), losses(1.0)
  return {'baselines': {'majority': {'accuracy': [0.3, 0.2, 0.4, 40]}}, 'stages': found}


GOOD = dict(random=0.1, zero=0.3, blind=0.3, one=0.6, two=0.9, three=0.9, dense=0.9, sft=0.9)


@pytest.mark.parametrize('change, why', [
    ({}, ''), ({'two': 0.6}, '2 minus 1 is +0.000'), ({'three': 0.7}, '3 minus 2 is -0.200'),
    ({'cost': 0.02}, 'sparse attention costs +2.00% (+2.00% to +2.00%) of the loss, not surely less than 1%'),
    ({'blind': 0.6}, '1 minus blind is +0.000'), ({'zero': 0.1}, '0 minus 0-random-lm is +0.000')])
def test_the_claim_needs_every_stage_to_add_what_it_should(change, why):
  said = ladder_page.lacks(measured(**GOOD | change))
  assert said.startswith(why) and bool(said) == bool(why)


def test_the_claim_needs_pictures_that_find_their_captions_and_every_stage():
  found = measured(**GOOD)
  found['stages']['vit']['scores']['retrieval'] = [0.3, 0.2, 0.4, 40]
  assert ladder_page.lacks(found).startswith('pictures do not find their captions')
  del found['stages']['sft'], found['stages']['vit'], found['stages']['3-dense']
  assert ladder_page.lacks(found) == ('vit was not run; sft and 3 were not both run; 3 and 3-dense were not both run')


def test_the_table_has_a_line_for_each_and_the_towers_below():
  lines = ladder_page.table(measured(**GOOD))
  assert lines[2] == '| majority | – | 0.30 (0.20–0.40) |' and '| 1 | 2, 1.0 min | 0.60 (0.60–0.60) |' in lines
  assert len(lines) == 2 + 1 + 8 + 2
  assert lines[-1].startswith('vit: 3 steps, 0.5 min') and '0.50 (0.40–0.60)' in lines[-1]


def test_a_clip_is_asked_for_all_of_its_events():
  row = {'id': 'a', 'videos': ['a.mp4'], 'seconds': 4.0, 'messages': [{'role': 'user', 'content': '<video>'}],
         'type': ['count'], 'branches': [['asked']],
         'events': {'digit': [7, 3, 7], 'interval': [[2.5, 3.0], [1.0, 1.5], [0.5, 2.0]]}}
  made = captions.asked(row)
  assert made['type'] == ['list'] and [t['content'] for t in made['branches'][0]] == [
      'When does each digit appear?', '3 1.0 - 1.5, 7 0.5 - 2.0, 7 2.5 - 3.0']
  assert events.score([made['branches'][0][1]['content']], [made['branches'][0][1]['content']], ['a']
                      )['event_recall'].value == 1
