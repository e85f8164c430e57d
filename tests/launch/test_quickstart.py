"""The main job at a size that cannot learn anything: every stage runs, and says what it should."""
import dataclasses
import json

import pytest

from configs import quickstart as recipe
from data_pipelines.errors import InputError
from keye_jax.config import RunConfig, freeze
from keye_jax.evals.scores import Score
from launch import quickstart, results

CLIPS = dict(n_train=12, n_heldout=4, n_images=24, seed=0, processes=1)


def small(name: str, runs: str) -> RunConfig:
  run = recipe.stage(name, runs)
  text = dataclasses.replace(run.model.text, layers=1, embed=32, heads=2, kv_heads=1, ffn=32, experts=2)
  vision = dataclasses.replace(run.model.vision, layers=1, embed=32, heads=2, ffn=32)
  return dataclasses.replace(
    run, model=dataclasses.replace(run.model, text=text, vision=vision),
    optimizer=dataclasses.replace(run.optimizer, warmup_steps=1),
    train=dataclasses.replace(run.train, steps=3, batch=2, log_every=1, save_every=3))


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  out = tmp_path_factory.mktemp('quickstart')
  stages = {name: small(name, str(out)) for name in recipe.STAGES}
  clock, evaluated = quickstart.main(out, stages, CLIPS, 8, recipe.VOCAB)
  return out, clock, evaluated


@pytest.mark.slow
def test_every_arm_answers_every_question(done):
  out, _, evaluated = done
  asked = sum(len(json.loads(line)['branches']) for line in (out / 'data' / 'heldout.jsonl').open())
  assert {arm: len(found.answers) for arm, found in evaluated.found.items()} == dict.fromkeys(
    ('sparse', 'dense', quickstart.UNTRAINED_INDEXER, quickstart.UNTRAINED, quickstart.BLIND), asked)
  assert {arm.split(' (')[0] for arm in evaluated.arms} >= {'majority answer by type', 'best constant interval'}
  assert not all(check.ok for check in evaluated.checks)       # nothing can be learnt in three steps


@pytest.mark.slow
def test_report_shows_the_run(done):
  out, clock, _ = done
  page = (out / 'report.html').read_text()
  assert page.count('class="clip"') == 4 and page.count('<polyline') >= 5 and 'selected, layer 0' in page
  assert 'Not all requirements are met' in page
  assert [name for name, _ in clock.spent][-1] == 'Write the report'


@pytest.mark.slow
def test_evidence_file(done, tmp_path, monkeypatch):
  _, clock, evaluated = done
  monkeypatch.setattr(results, 'FOLDER', tmp_path / 'results')
  said = json.loads(quickstart.record(clock, evaluated, 3).read_text())
  assert said['verdict'] == 'not shown' and 'reading a digit' in said['why']
  assert set(said['arms']) == {'sparse', 'dense', quickstart.UNTRAINED_INDEXER}
  assert set(said['arms']['sparse']) == {'3'} and 'miou' in said['arms']['sparse']['3']
  assert 'majority answer by type' in said['baselines'] and said['n'] == len(evaluated.found['sparse'].answers)
  assert {'claim', 'command', 'commit', 'hardware', 'versions', 'intervals'} <= said.keys()
  (tmp_path / 'README.md').write_text(f'# a\n{results.START.format("quickstart")}\nold\n{results.END}\nb\n')
  monkeypatch.setattr(results, 'README', tmp_path / 'README.md')
  results.refresh_readme()
  text = (tmp_path / 'README.md').read_text()
  assert text.startswith('# a\n') and text.endswith(f'{results.END}\nb\n') and 'old' not in text
  assert f'| sparse | {said["arms"]["sparse"]["3"]["accuracy/count"]:.2f} |' in text and 'not shown' in text


def test_recorded_command_names_no_folder_of_this_machine():
  said = results.command(['train', '--out', '/home/me/run', '--config.data.path=/data/a.jsonl', '--config',
                          'configs/a.py'])
  assert said == 'keye train --out run --config.data.path=a.jsonl --config configs/a.py'
  assert results.command(['bench', 'model', '--task', 'train 2048']) == "keye bench model --task 'train 2048'"


@pytest.mark.parametrize('name', recipe.STAGES)
def test_stages_are_configs(name):
  config = freeze(RunConfig, recipe.get_config(name))
  assert config.model.text.indexer.topk * 4 <= 63      # tokens of the shortest clip with the shortest question
  assert config.data.grey == (name == 'blind')


@pytest.mark.parametrize('name', recipe.STAGES)
def test_a_seed_changes_nothing_else(name):
  config = recipe.stage(name, seed=5)
  assert config.train.seed == 5
  assert dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0)) == recipe.stage(name)


def test_unknown_stage_is_named():
  with pytest.raises(ValueError, match="no variant 'vidoe'"):
    recipe.get_config('vidoe')


def test_requirements_follow_the_baselines():
  score = lambda value: Score(value, 0, 1, 300)
  arms = {'sparse': {'accuracy': score(.8), 'accuracy/digit': score(.9), 'accuracy/count': score(.62),
                     'accuracy/order': score(.8), 'miou': score(.7), 'asked_over_other': score(.9)},
          quickstart.BLIND: {'miou': score(.2)}, quickstart.UNTRAINED: {'miou': score(.0)},
          'majority answer by type': {'accuracy/count': score(.4)},
          'best constant interval (1 - 2 s)': {'miou': score(.3)}}
  assert all(check.ok for check in quickstart.requirements(arms))
  arms['best constant interval (1 - 2 s)'] = {'miou': score(.5)}
  arms['majority answer by type'] = {'accuracy/count': score(.5)}
  missed = {check.name for check in quickstart.requirements(arms) if not check.ok}
  assert missed == {'counting, 0.2 above the majority answer', 'temporal mIoU, 0.25 above the best baseline'}


def test_only_its_own_folder_is_emptied(tmp_path):
  (tmp_path / 'video').mkdir()
  quickstart.clear(tmp_path)
  assert not list(tmp_path.iterdir())
  (tmp_path / 'thesis.tex').write_text('years of work')
  with pytest.raises(InputError, match='thesis.tex'):
    quickstart.clear(tmp_path)
  assert (tmp_path / 'thesis.tex').exists()
