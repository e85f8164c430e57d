"""Whole runs of a tiny model: resuming, stopping, and what ends a run with one line."""
import contextlib
import dataclasses
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from keye_jax import checkpoint, loop, meter, metrics, run_folder
from keye_jax.checkpoint import CUT_OFF
from keye_jax.config import SourceConfig
from tests import compiling, tiny_run

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return tiny_run.dataset(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory):
  """A run of 12 steps that was never stopped: (folder, result)."""
  out = tmp_path_factory.mktemp('finished')
  return out, loop.train(tiny_run.config(data), out)


def losses(out):
  return {r['step']: (r['loss'], r['grad_norm'], r['learning_rate']) for r in metrics.read(out)}


def test_a_run_learns_and_keeps_its_books(finished, data):
  out, result = finished
  assert (result.step, result.stopped_by) == (12, 0)
  seen = losses(out)
  assert list(seen) == [2, 4, 6, 8, 10, 12] and seen[12][0] < 0.8 * seen[2][0]
  assert checkpoint.whole(out / 'checkpoints') == [10, 12]
  assert run_folder.read_config(out) == tiny_run.config(data)
  assert (out / 'tokenizer.json').is_file() and list((out / 'tensorboard').iterdir())
  assert result.summary['rows skipped'] >= 1 and 'sums.jsonl:3: not valid JSON' in result.summary['last row skipped']
  assert result.summary['loss'] == seen[12][0] and result.summary['tokens'] > 12 * 4 * 20
  assert result.summary['compilations'] < 20


def test_running_again_does_nothing_and_says_so(finished, data, capsys):
  out, _ = finished
  before = (out / metrics.FILE).read_text()
  result = loop.train(tiny_run.config(data), out)
  assert (result.step, result.stopped_by) == (12, 0) and (out / metrics.FILE).read_text() == before
  assert f'{out}: already at step 12' in capsys.readouterr().err


def test_more_steps_go_on_from_the_checkpoint(finished, data, tmp_path, capsys):
  copy = tmp_path / 'run'
  subprocess.run(['cp', '-r', finished[0], copy], check=True)
  assert loop.train(tiny_run.config(data, steps=14), copy).step == 14
  assert list(losses(copy)) == [2, 4, 6, 8, 10, 12, 14]
  assert 'going on with another train.steps: 12 -> 14' in capsys.readouterr().err


@pytest.mark.parametrize('change, message', [
    (dict(batch=8), r'train.batch was 4, now 8'),
    (dict(seed=1, balance_weight=0.5), r'train.seed was 0, now 1; train.balance_weight was 0.001, now 0.5')])
def test_another_config_is_refused_by_key(finished, data, change, message):
  with pytest.raises(InputError, match=message):
    loop.train(tiny_run.config(data, steps=14, **change), finished[0])


def test_learning_from_responses_is_refused_not_done_as_something_else(data, tmp_path):
  with pytest.raises(InputError, match="train.objective = 'gspo' learns from a policy's responses"):
    loop.train(tiny_run.config(data, objective='gspo'), tmp_path)
  assert not any(tmp_path.iterdir())


def test_another_dataset_is_refused(finished, tmp_path):
  other = tiny_run.dataset(tmp_path, seed=1)
  with pytest.raises(InputError, match='the rows or media of the dataset changed since the checkpoint of step 12'):
    loop.train(tiny_run.config(other, steps=14), finished[0])


def documented(name: str) -> bool:
  """Whether docs/watching.md has a metric of this name."""
  page = (ROOT / 'docs' / 'watching.md').read_text()
  rows = [line.split('|')[1] for line in page.splitlines() if line.startswith('| `')]
  names = [name for row in rows for name in re.findall('`([^`]+)`', row)]
  known = [re.escape(name).replace('NAME', '[^/]+').replace('METRIC', '.+') for name in names]
  return any(re.fullmatch(k, name) for k in known)


def test_a_mixture_is_counted_and_a_changed_one_refused_by_name(data, tmp_path):
  tiny_run.dataset(tmp_path / 'more', rows=12, seed=1)
  sources = SourceConfig('first', str(data), 3.0), SourceConfig('second', 'sums.jsonl', 1.0)

  def mixed(*sources, **train):
    config = tiny_run.config(data, **train)
    where = dict(path=str(tmp_path / 'more'), tokenizer=str(data.parent))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources, **where))

  out = tmp_path / 'run'
  summary = loop.train(mixed(*sources, steps=4), out).summary
  last = metrics.read(out)[-1]
  assert last['data/first/samples'] > last['data/second/samples'] > 0
  assert last['data/second/epochs'] == (last['data/second/samples'] + last['data/second/skipped']) / 12
  assert all(map(documented, last.keys() - {'step'}))
  low, high = sorted(last[f'loss/{name}'] for name in ('first', 'second'))
  assert low < last['loss'] < high
  assert summary['source second'].startswith(f'{last["data/second/samples"]} samples, ')
  with pytest.raises(InputError, match=r'data.sources.second.weight was 1.0, now 2.0\. '):
    loop.train(mixed(sources[0], dataclasses.replace(sources[1], weight=2.0), steps=6), out)
  with pytest.raises(InputError, match='second.weight was 1.0, now 0.0; data.sources.third.weight was 0.0, now 1.0'):
    loop.train(mixed(sources[0], dataclasses.replace(sources[1], name='third'), steps=6), out)
  file = tmp_path / 'more' / 'sums.jsonl'
  moved = file.rename(tmp_path / 'moved.jsonl')
  there = sources[0], dataclasses.replace(sources[1], path=str(moved))
  assert loop.train(mixed(*there, steps=6), out).step == 6                     # where a file lies does not matter
  moved.write_text(moved.read_text() + '\n')
  with pytest.raises(InputError, match="rows or media of the source 'second' changed since the checkpoint of step 6"):
    loop.train(mixed(*there, steps=8), out)


def test_a_folder_has_one_trainer(finished, data):
  with contextlib.closing(run_folder.lock(finished[0])):
    with pytest.raises(InputError, match='another process is training in this folder'):
      loop.train(tiny_run.config(data), finished[0])


def test_a_tokenizer_too_big_for_the_model_is_refused(data, tmp_path):
  config = tiny_run.config(data)
  model = dataclasses.replace(config.model, text=dataclasses.replace(config.model.text, vocab=64))
  with pytest.raises(InputError, match='more than model.text.vocab = 64'):
    loop.train(dataclasses.replace(config, model=model), tmp_path)


def test_steps_that_stay_non_finite_end_the_run_and_name_their_rows(data, tmp_path):
  config = tiny_run.config(data, max_bad_steps=3, save_every=1)
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30))
  with pytest.raises(InputError, match=r'not finite in 3 steps in a row .*; the last batch held .*sums.jsonl:\d+, .*'
                                       'lower optimizer.learning_rate'):
    loop.train(config, tmp_path)
  assert checkpoint.whole(tmp_path / 'checkpoints')


def test_losses_that_stay_above_the_limit_end_the_run_and_name_their_rows(data, tmp_path, monkeypatch):
  monkeypatch.setattr(meter, 'SPIKE_AFTER', 4)
  config = tiny_run.config(data, steps=100, max_bad_steps=3, spike_factor=1.5)
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=3.0,
                                                                     warmup_steps=20))
  with pytest.raises(InputError, match=r'step \d+: the loss was above 1.5 times its median \(train.spike_factor\) in 3 '
                                       r'steps in a row .*; the last batch held .*sums.jsonl:\d+'):
    loop.train(config, tmp_path)


def test_skipped_spikes_are_the_same_after_a_restart(data, tmp_path, monkeypatch):
  """The limit is a median of the steps before, which a checkpoint carries. Here a batch a little above it is cut."""
  monkeypatch.setattr(meter, 'SPIKE_AFTER', 4)
  config = tiny_run.config(data, steps=30, log_every=1, save_every=14, spike_factor=1.001, max_bad_steps=100)
  config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-5))
  summary = loop.train(config, tmp_path / 'whole').summary
  assert 0 < summary['skipped steps'] < 28
  subprocess.run(['cp', '-r', tmp_path / 'whole', tmp_path / 'out'], check=True)
  subprocess.run(['rm', '-r', tmp_path / 'out' / 'checkpoints' / '30'], check=True)
  again = loop.train(config, tmp_path / 'out').summary
  assert again['skipped steps'] == summary['skipped steps']
  records = [[{k: r.get(k) for k in ('step', 'loss', 'skipped', 'spikes')} for r in metrics.read(tmp_path / name)]
             for name in ('whole', 'out')]
  assert records[0] == records[1]


def test_starting_from_another_run(finished, data, tmp_path, capsys):
  start = tiny_run.config(data, steps=1, init=str(finished[0]))
  start = dataclasses.replace(start, optimizer=dataclasses.replace(start.optimizer, warmup_steps=0))
  plain, fresh = loop.train(start, tmp_path / 'a'), losses(finished[0])[2][0]
  assert plain.summary['loss'] < 0.9 * fresh
  sparse = loop.train(tiny_run.with_indexer(start), tmp_path / 'b')
  assert sparse.summary['loss'] < 0.9 * fresh
  last, = metrics.read(tmp_path / 'b')
  assert 0.1 < last['indexer_recall'] < 1 and all(map(documented, last.keys() - {'step'}))
  assert 'has no indexer; a new one is initialised' in capsys.readouterr().err
  back = dataclasses.replace(start, train=dataclasses.replace(start.train, init=str(tmp_path / 'b')))
  assert loop.train(back, tmp_path / 'c').summary['loss'] < 0.9 * fresh
  assert 'its indexer is left out' in capsys.readouterr().err
  wide = dataclasses.replace(start.model, text=dataclasses.replace(start.model.text, ffn=32, rope_theta=5e5))
  with pytest.raises(InputError, match=r'has model.text.ffn = 16, this run 32 \(and 1 more keys differ\)'):
    loop.train(dataclasses.replace(start, model=wide), tmp_path / 'd')


# ---- other processes ---------------------------------------------------------------------------------------------

def command(data, out, tmp_path, **train):
  """(argv, environment) of `keye train` on the tiny config, one loss a step."""
  file = tmp_path / 'tiny.py'
  file.write_text(f'from keye_jax.config import to_dict\nfrom tests import tiny_run\n'
                  f'def get_config(variant=""):\n  return to_dict(tiny_run.config({str(data)!r}, **{train!r}))\n')
  argv = [sys.executable, '-m', 'launch.cli', 'train', '--config', str(file), '--out', str(out), '--json']
  return argv, compiling.environment()


def stop_when(argv, env, ready, number) -> tuple[int, str]:
  """Starts the command, sends the signal as soon as `ready()`, returns its exit code and stderr."""
  process = subprocess.Popen(argv, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  try:
    deadline = time.monotonic() + 300
    while process.poll() is None and not ready():
      assert time.monotonic() < deadline
      time.sleep(0.001)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
  finally:
    process.kill()
  return process.returncode, err


def test_killed_at_any_moment_the_same_command_reaches_the_same_losses(data, tmp_path):
  """kill -9 at a random step, kill -9 while a checkpoint is being written, SIGTERM; bit for bit the same in the end."""
  train = dict(steps=240, log_every=3, save_every=7)
  whole, out = tmp_path / 'whole', tmp_path / 'out'
  summary = loop.train(tiny_run.config(data, **train), whole).summary
  assert summary['step'] == 240

  argv, env = command(data, out, tmp_path, **train)
  last = lambda: max(losses(out), default=0)
  moment = random.SystemRandom().randrange(3, 40)
  code, _ = stop_when(argv, env, lambda: last() >= moment, signal.SIGKILL)
  assert code == -signal.SIGKILL
  begun = last()
  saving = lambda: any(CUT_OFF in p.name for p in (out / 'checkpoints').glob('*'))       # no folder before the first
  cut_off = lambda: saving() and last() > begun + 20
  code, _ = stop_when(argv, env, cut_off, signal.SIGKILL)
  assert code == -signal.SIGKILL and saving()
  begun = last()
  code, err = stop_when(argv, env, lambda: last() > begun + 10, signal.SIGTERM)
  assert code == 128 + signal.SIGTERM and 'SIGTERM: saving' in err
  assert 'this save was cut off; removed' in err
  stopped = checkpoint.whole(out / 'checkpoints')[-1]
  assert last() <= stopped < last() + 3                               # ended between two steps, and saved there
  done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0 and f'going on from step {stopped}' in done.stderr, done.stderr

  expected, found = losses(whole), losses(out)
  assert expected.keys() == found.keys()
  assert not (differ := {k: (v, found[k]) for k, v in expected.items() if found[k] != v}), differ
  params = [checkpoint.load_params(run, shapes(run), print).params for run in (whole, out)]
  for a, b in zip(*map(jax.tree.leaves, params)):
    np.testing.assert_array_equal(a, b)
  resumed = json.loads(done.stdout)
  assert all(resumed[k] == summary[k] for k in ('tokens', 'loss', 'rows skipped', 'skipped steps'))


def shapes(run):
  from keye_jax.nn import keye
  return keye.param_shapes(run_folder.read_config(run).model)


def test_a_full_disk_ends_the_run_with_one_line(data, tmp_path):
  argv, env = command(data, tmp_path / 'out', tmp_path, save_every=1)
  # A write fails with EFBIG here as it does with ENOSPC on a full disk.
  limit = ('import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
           'resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); '
           'from launch import cli; sys.exit(cli.main(sys.argv[1:]))')
  done = subprocess.run([sys.executable, '-c', limit, *argv[3:]], env=env, cwd=ROOT, capture_output=True, text=True,
                        timeout=300)
  assert done.returncode == 2
  last = done.stderr.splitlines()[-1]
  assert last.startswith('keye train: ') and 'the checkpoint could not be saved: File too large' in last
  assert 'Traceback' not in done.stderr
  assert not list((tmp_path / 'out' / 'checkpoints').iterdir())
