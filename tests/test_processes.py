"""Two processes of one run on this machine, under jax.distributed."""
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from keye_jax import checkpoint, loop, metrics
from keye_jax.config import MeshConfig
from tests import tiny_run
from tests.tolerances import assert_close

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = '''
import dataclasses
from keye_jax.config import MeshConfig, to_dict
from tests import tiny_run
def get_config(variant=''):
  return to_dict(dataclasses.replace(tiny_run.config({data!r}, **{train!r}), mesh=MeshConfig(data=2)))
'''


def start(config, out):
  """Both processes of `keye train`, one device each."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  env = dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS='', KEYE_COORDINATOR=f'127.0.0.1:{port}', KEYE_PROCESSES='2',
             JAX_COMPILATION_CACHE_DIR=str(ROOT / '.jax_cache'), JAX_DEFAULT_MATMUL_PRECISION='highest')
  argv = [sys.executable, '-m', 'launch.cli', 'train', '--config', str(config), '--out', str(out), '--json']
  return [subprocess.Popen(argv, cwd=ROOT, env=dict(env, KEYE_PROCESS=str(i)), text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE) for i in range(2)]


def finish(processes):
  """[(exit code, stdout, stderr)]."""
  try:
    texts = [p.communicate(timeout=400) for p in processes]
    return [(p.returncode, *text) for p, text in zip(processes, texts)]
  finally:
    for p in processes:
      p.kill()


@pytest.mark.slow
def test_two_processes_train_save_stop_together_and_resume(tmp_path):
  data, out, config = tiny_run.dataset(tmp_path / 'data'), tmp_path / 'out', tmp_path / 'two.py'
  config.write_text(CONFIG.format(data=str(data), train=dict(steps=4000, log_every=1, save_every=1000)))
  processes = start(config, out)
  deadline = time.monotonic() + 400
  while not metrics.read(out) and all(p.poll() is None for p in processes) and time.monotonic() < deadline:
    time.sleep(0.05)
  processes[0].send_signal(signal.SIGTERM)           # the notice reaches both
  (code, _, err), (code1, _, err1) = finish(processes)
  assert (code, code1) == (143, 143), err + err1
  stopped = checkpoint.whole(out / 'checkpoints')[-1]
  assert stopped == metrics.read(out)[-1]['step'] < 4000
  digests = [json.loads((out / 'checkpoints' / str(stopped) / f'digest_{i}.json').read_text()) for i in range(2)]
  assert all(d['processes'] == 2 and d['files'] for d in digests)
  assert not digests[0]['files'].keys() & digests[1]['files'].keys()

  config.write_text(CONFIG.format(data=str(data), train=dict(steps=stopped + 3, log_every=1, save_every=1000)))
  (code, text, err), (code1, text1, err1) = finish(start(config, out))
  assert (code, code1) == (0, 0), err + err1
  # Process 0 speaks for both; gloo, the transport between CPUs, says on stdout that it is connected.
  assert json.loads(text.splitlines()[-1])['step'] == stopped + 3 and '"step"' not in text1
  assert [r['step'] for r in metrics.read(out)] == list(range(1, stopped + 4))


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(tmp_path):
  """Two devices see the losses that one sees, and one goes on from their checkpoint."""
  data = tiny_run.dataset(tmp_path / 'data')
  config = tiny_run.config(data, steps=3, log_every=1)
  plain = loop.train(config, tmp_path / 'plain').summary
  from tests.steps.test_mesh import mesh
  with mesh(2, 1, 1):
    loop.train(dataclasses.replace(config, mesh=MeshConfig(data=2)), tmp_path / 'mesh')
  first = [metrics.read(tmp_path / name)[0]['loss'] for name in ('plain', 'mesh')]
  assert_close(first[1], first[0])
  more = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
  assert loop.train(more, tmp_path / 'mesh').step == 4 and plain['step'] == 3
