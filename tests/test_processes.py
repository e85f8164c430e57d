"""Several processes of one run on this machine: they equal one process, and they end and go on together."""
import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from data_pipelines.errors import InputError
from keye_jax import checkpoint, loop
from keye_jax.config import MeshConfig
from launch import run_config, together
from tests import kills, tiny_run
from tests.processes import ROOT, finish, last_step, losses, start, wait, write_config
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close

STEPS = 60
TRAIN = dict(steps=STEPS, log_every=1, save_every=9, balance_rows=True)        # rows change processes


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return tiny_run.dataset(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
  """Run folder of two processes that were left alone."""
  out = tmp_path_factory.mktemp('whole')
  ended = finish(start(write_config(out / 'two.py', data, 2, **TRAIN), out))
  assert [code for code, _, _ in ended] == [0, 0], ended
  # Process 0 speaks for both; gloo, the transport between CPUs, says on stdout that it is connected.
  assert json.loads(ended[0][1].splitlines()[-1])['step'] == STEPS and '"step"' not in ended[1][1]
  assert f'step {STEPS}/{STEPS}' in ended[0][2] and 'step' not in ended[1][2]
  return out


def alone(config, out, devices: int = 2, **train):
  """The same run in this process, on as many devices."""
  config = run_config.load(str(config))
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
  with mesh(devices, 1, 1):
    loop.train(dataclasses.replace(config, mesh=MeshConfig(data=devices)), out)
  return losses(out)


def assert_same_losses(actual, expected):
  assert actual.keys() == expected.keys()
  for step in expected:
    assert_close(actual[step], expected[step], what=f'step {step}')


def test_an_error_of_one_process_ends_all_with_a_line_each(data, tmp_path):
  """Process 1 does not find the dataset; process 0 waits for it in vain."""
  config = write_config(tmp_path / 'two.py', data, 2, **TRAIN)
  here = f"'{data}' if os.environ['KEYE_PROCESS'] == '0' else '/nowhere/sums.jsonl'"
  config.write_text(config.read_text().replace(repr(str(data)), here))
  (code, _, err), (code1, _, err1) = finish(start(config, tmp_path / 'out'))
  assert (code, code1) == (2, 2), err + err1
  assert err1.splitlines()[-1].startswith('keye train: process 1 of 2: /nowhere/sums.jsonl: ')
  assert err.splitlines()[-1].startswith('keye train: process 0 of 2: ended with process 1: /nowhere/sums.jsonl: ')
  assert 'Traceback' not in err + err1


def aborting(where: str) -> list[str]:
  """Command of process 1 of 2, its coordinator at `where`, that is aborted when it reads a line."""
  return [sys.executable, '-c', 'import os\nfrom jax._src.distributed import global_state as s\n'
          'from launch import together\n'
          f's.coordinator_address, s.process_id, s.num_processes = "{where}", 1, 2\n'
          'together.end_aborts_in_words("train")\ninput()\nos.abort()']


@pytest.mark.parametrize('there, line', [
  (False, 'process 0 is gone; run the same command again on all'),
  (True, 'aborted, the reason is above; most likely another process of the run is gone; run the same command again on '
         'all')])
def test_a_process_that_jax_aborts_ends_with_a_line(there, line):
  """As when process 0 is gone, or does not hear of another one for 100 s."""
  with socket.socket() as coordinator:
    coordinator.bind(('127.0.0.1', 0))
    if there:
      coordinator.listen()
    done = subprocess.run(aborting(f'127.0.0.1:{coordinator.getsockname()[1]}'), cwd=ROOT, capture_output=True,
                          text=True, input='\n')
  assert (done.returncode, done.stderr) == (together.LOST, f'keye train: process 1 of 2: {line}\n')


def test_a_process_ends_also_when_nobody_reads_what_it_says():
  """As when the terminal that started it is gone."""
  process = subprocess.Popen(aborting('127.0.0.1:1'), cwd=ROOT, text=True, stdin=subprocess.PIPE,
                             stderr=subprocess.PIPE)
  process.stderr.close()
  process.stdin.write('\n')
  process.stdin.close()
  assert process.wait(60) == together.LOST


def test_what_jax_raises_when_another_process_is_gone_is_known():
  reset = 'UNKNOWN: Gloo AllGather failed: transport/tcp/pair.cc:538] Read error: Connection reset by peer'
  save = InputError('runs/a/checkpoints/9: cannot be saved')
  save.__cause__ = RuntimeError('DEADLINE_EXCEEDED: Barrier timed out')
  assert all(map(together.other_end_gone, (RuntimeError(reset), ValueError(reset), OSError('Broken pipe'), save)))
  assert not any(map(together.other_end_gone, (ValueError('shapes (3,) and (4,)'), TypeError(reset),
                                               InputError('a.jsonl: UNAVAILABLE'))))


@pytest.mark.slow
def test_two_processes_equal_one_and_one_goes_on_from_their_checkpoint(data, whole, tmp_path):
  config = whole / 'two.py'
  assert_same_losses(alone(config, tmp_path / 'one', steps=20), {k: v for k, v in losses(whole).items() if k <= 20})
  assert checkpoint.whole(whole / checkpoint.FOLDER)[-2:] == [54, 60]
  digests = [json.loads((whole / checkpoint.FOLDER / '60' / f'digest_{i}.json').read_text()) for i in range(2)]
  assert all(d['processes'] == 2 and d['files'] for d in digests)
  assert not digests[0]['files'].keys() & digests[1]['files'].keys()
  shutil.copytree(whole, tmp_path / 'copy')
  shutil.rmtree(tmp_path / 'copy' / checkpoint.FOLDER / '60')
  assert_same_losses(alone(config, tmp_path / 'copy'), losses(whole))


@pytest.mark.slow
def test_after_kills_and_a_notice_the_run_is_the_same(data, whole, tmp_path):
  """kill -9 of either of two processes, in a step and in a save, then SIGTERM at one; bit for bit the losses of a run
  left alone. `python -m tests.kills` draws its kills."""
  out, config = tmp_path / 'out', write_config(tmp_path / 'two.py', data, 2, **TRAIN)
  for kill in (kills.Kill(victim=1, step=5, in_save=False), kills.Kill(victim=0, step=15, in_save=True),
               kills.Kill(victim=0, step=28, in_save=False)):
    kills.survive(config, out, kill)
  begun, processes = last_step(out), start(config, out)
  wait(processes, lambda: last_step(out) > begun + 3)
  processes[1].send_signal(signal.SIGTERM)           # the notice reaches both
  (code, _, err), (code1, _, err1) = finish(processes)
  assert (code, code1) == (143, 143), err + err1
  assert checkpoint.whole(out / checkpoint.FOLDER)[-1] == last_step(out) < STEPS
  ended = finish(start(config, out))
  assert [code for code, _, _ in ended] == [0, 0], ended
  assert losses(out) == losses(whole)


@pytest.mark.slow
def test_of_four_one_is_killed_and_two_or_one_go_on_from_their_checkpoint(data, tmp_path):
  """Three end with a line each; two processes of two devices, and one of four, see the losses that one of four sees."""
  four, there = write_config(tmp_path / 'four.py', data, 4, **TRAIN | dict(save_every=4)), tmp_path / 'four'
  processes = start(four, there, 4)
  wait(processes, lambda: checkpoint.whole(there / checkpoint.FOLDER))
  processes[2].kill()
  for i, (code, _, err) in enumerate(finish(processes)):
    if i != 2:
      assert code == together.LOST and err.splitlines()[-1].endswith(kills.GONE), err
  saved = checkpoint.whole(there / checkpoint.FOLDER)[-1]
  expected = alone(four, tmp_path / 'one', 4, steps=saved + 8)
  begun = {step: found for step, found in losses(there).items() if step <= 8}
  assert_same_losses(begun, {step: expected[step] for step in begun})
  shutil.copytree(there, tmp_path / 'copy')
  more = write_config(tmp_path / 'more.py', data, 4, **TRAIN | dict(save_every=4, steps=saved + 8))
  ended = finish(start(more, there, 2, devices=2))
  assert [code for code, _, _ in ended] == [0, 0], ended
  assert_same_losses(losses(there), expected)
  assert_same_losses(alone(four, tmp_path / 'copy', 4, steps=saved + 8), expected)


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(tmp_path):
  """Two devices see the losses that one sees, and one goes on from their checkpoint."""
  data = tiny_run.dataset(tmp_path / 'data')
  config = tiny_run.config(data, steps=3, log_every=1)
  plain = loop.train(config, tmp_path / 'plain').summary
  with mesh(2, 1, 1):
    loop.train(dataclasses.replace(config, mesh=MeshConfig(data=2)), tmp_path / 'mesh')
  first = [losses(tmp_path / name)[1][0] for name in ('plain', 'mesh')]
  assert_close(first[1], first[0])
  more = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
  assert loop.train(more, tmp_path / 'mesh').step == 4 and plain['step'] == 3
