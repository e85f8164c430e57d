"""Several processes of one `keye train` on this machine, under jax.distributed with gloo."""
import pathlib
import socket
import subprocess
import sys
import time

from keye_jax import checkpoint, metrics
from tests import compiling

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = '''
import dataclasses, os
from keye_jax.config import MeshConfig, to_dict
from tests import tiny_run
def get_config(variant=''):
  config = tiny_run.config({data!r}, **{train!r})
  return to_dict(dataclasses.replace(
      config, mesh=MeshConfig(data={devices}), data=dataclasses.replace(config.data, streams=4),
      optimizer=dataclasses.replace(config.optimizer, schedule='constant')))
'''


def write_config(path: pathlib.Path, data, devices: int, **train) -> pathlib.Path:
  """A config file of tiny_run on a mesh of `devices`, its data in four streams, its rate the same for runs of any
  length."""
  path.write_text(CONFIG.format(data=str(data), train=train, devices=devices))
  return path


def start(config, out, count: int = 2, devices: int = 1) -> list[subprocess.Popen]:
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  env = compiling.environment() | dict(
      JAX_PLATFORMS='cpu', KEYE_COORDINATOR=f'127.0.0.1:{port}', KEYE_PROCESSES=str(count),
      XLA_FLAGS=compiling.flags(devices))
  argv = [sys.executable, '-m', 'launch.cli', 'train', '--config', str(config), '--out', str(out), '--json']
  return [subprocess.Popen(argv, cwd=ROOT, env=dict(env, KEYE_PROCESS=str(i)), text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE) for i in range(count)]


def finish(processes) -> list[tuple[int, str, str]]:
  """[(exit code, stdout, stderr)]."""
  try:
    texts = [p.communicate(timeout=400) for p in processes]
    return [(p.returncode, *text) for p, text in zip(processes, texts)]
  finally:
    for p in processes:
      p.kill()


def wait(processes, ready) -> None:
  """Until `ready()` or one of them has ended."""
  deadline = time.monotonic() + 400
  while not ready() and all(p.poll() is None for p in processes):
    assert time.monotonic() < deadline
    time.sleep(0.02)


def last_step(out) -> int:
  return max((r['step'] for r in metrics.read(out)), default=0)


def losses(out) -> dict[int, tuple[float, float]]:
  return {r['step']: (r['loss'], r['grad_norm']) for r in metrics.read(out)}


def saving(out) -> bool:
  folder = out / checkpoint.FOLDER
  return folder.is_dir() and any(checkpoint.CUT_OFF in p.name for p in folder.iterdir())
