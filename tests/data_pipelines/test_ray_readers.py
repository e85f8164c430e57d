"""Readers on Ray: the batches of local workers, whatever happens to an actor. `-m ray` starts a real one here."""
import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import grain
import pytest

from data_pipelines import pipeline, ray_readers, sources, streams
from data_pipelines.errors import InputError
from keye_jax.config import RunConfig, check
from tests.data_pipelines.test_pipeline import assert_same, config, path, take  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent.parent
SECONDS = 60                    # until which what must happen has happened, also on a busy machine


@pytest.fixture(scope='module')
def ray():
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('RAY_ADDRESS', raising=False)
    patch.setenv('RAY_worker_niceness', '0')           # actors as busy as the tests that wait for them
    yield ray_readers.connect(4)
    sys.modules['ray'].shutdown()


class Job:
  """What a pool asks of pipeline.Load. Row n is n, but row 3 stays away as long as nobody was killed over it, row 5
  is bad, and row 7 ends its process."""
  rows = types.SimpleNamespace(where=lambda i: f'a.jsonl:{i + 1}')

  def __init__(self, folder, workers=1):
    self.folder, self.data = folder, types.SimpleNamespace(workers=workers)

  def __call__(self, i):
    with open(self.folder / 'begun', 'a') as f:
      f.write(f'{i} {os.getpid()}\n')
    if i == 3 and not (self.folder / 'killed').exists():
      threading.Event().wait()
    if i == 5:
      raise sources.BadRow('media', 'a.jsonl:6: no such video')
    if i == 7:
      os.kill(os.getpid(), signal.SIGKILL)
    return i

  def begun(self):
    file = self.folder / 'begun'
    return [tuple(map(int, line.split())) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope='module')
def one(ray, tmp_path_factory):
  """(readers with one actor, their job, what they reported)."""
  job, said = Job(tmp_path_factory.mktemp('job')), []
  made = ray_readers.readers(job, said.append)
  yield made, job, said
  made.close()


@pytest.fixture
def pool(one):
  _, job, said = one
  said.clear()
  for file in job.folder.iterdir():
    file.unlink()
  return one


def until(found):
  deadline = time.monotonic() + SECONDS
  while not (value := found()):
    assert time.monotonic() < deadline, 'waited in vain'
    time.sleep(0.02)
  return value


def gone(pid):
  """Whether a process has ended, also one that nobody has waited for."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return True


def pids(ray, it):
  pool = it._reading.readers.load
  with pool._changed:
    actors = list(pool._actors)
  return [int(ray.get(actor.where.remote()).split()[1]) for actor in actors]


@pytest.mark.ray
def test_batches_sources_and_skips_are_those_of_this_process(ray, path):  # noqa: F811
  for part, parts in ((0, 1), (1, 2)):                 # one process; the second of two; two streams each
    kinds = (config(path, streams=2 * parts, **kind) for kind in ({}, {'readers': 'ray', 'workers': 2}))
    here, there = (pipeline.train_batches(data, 4, 5, part, parts) for data in kinds)
    for _ in range(8):
      assert_same([next(there)], [next(here)])
      assert there.sources == here.sources
    assert there.stats() == here.stats() and there.stats()['skipped'].keys() == {'bad JSON', 'missing media'}
    assert there.get_state() == here.get_state()
    here.close()
    there.close()


@pytest.mark.ray
def test_a_state_goes_on_with_readers_of_the_other_kind(ray, path, monkeypatch):  # noqa: F811
  monkeypatch.setattr(pipeline, 'WINDOW_ROWS', 3)
  kinds = {'local': config(path), 'ray': config(path, readers='ray', workers=1)}
  expected = take(pipeline.train_batches(kinds['local'], 3, seed=7), 8)
  for first, then in (('local', 'ray'), ('ray', 'local')):
    begun, gone_on = (pipeline.train_batches(kinds[kind], 3, seed=7) for kind in (first, then))
    assert_same(take(begun, 4), expected[:4])
    gone_on.set_state(json.loads(json.dumps(begun.get_state())))
    assert_same(take(gone_on, 4), expected[4:])
    begun.close()
    gone_on.close()


@pytest.mark.ray
def test_an_actor_that_is_killed_is_replaced_and_changes_no_batch(ray, path, capfd):  # noqa: F811
  said = []
  it = pipeline.train_batches(config(path, readers='ray', workers=2), 2, seed=9, report=said.append)
  found = take(it, 1)
  victims = pids(ray, it)
  for pid in victims:
    os.kill(pid, signal.SIGKILL)
  while len(said) < 2:                     # what had been read ahead comes first
    found += take(it, 1)
  found += take(it, 4)
  assert not set(victims) & set(pids(ray, it)) and all(map(gone, victims))
  it.close()
  assert {line.partition(' so far')[0][-11:] for line in said} == {'replaced, 1', 'replaced, 2'} and len(said) == 2
  assert capfd.readouterr().out == ''      # Ray leaves standard output alone
  assert_same(found, take(pipeline.train_batches(config(path), 2, seed=9), len(found)))


@pytest.mark.ray
def test_a_row_under_way_in_an_actor_that_is_killed_is_read_again(pool, monkeypatch):
  made, job, said = pool
  put = made.load._put
  monkeypatch.setattr(made.load, '_put', lambda actor: (put(actor), time.sleep(0.5)))    # others take it first
  it, got = made.read(grain.MapDataset.range(5).map(made.load), 1), []
  reading = threading.Thread(target=lambda: got.extend(it), daemon=True)
  reading.start()
  pid = until(lambda: dict(job.begun()).get(3))
  (job.folder / 'killed').touch()
  os.kill(pid, signal.SIGKILL)
  reading.join(SECONDS)
  assert got == [0, 1, 2, 3, 4] and sorted(i for i, _ in job.begun()) == [0, 1, 2, 3, 3, 4]
  assert len(said) == 1 and f'process {pid} on ' in said[0]
  assert 'died over a.jsonl:4, which is read again; replaced, 1 so far' in said[0]


@pytest.mark.ray
def test_a_row_that_kills_every_actor_ends_the_run_with_its_name(pool, monkeypatch):
  made, job, said = pool
  monkeypatch.setattr(ray_readers, 'TRIES', 2)
  with pytest.raises(InputError, match='^a.jsonl:8: 2 readers in a row died over it.*take the row out'):
    made.load(7)
  assert len(said) == 2 and [i for i, _ in job.begun()] == [7] * 2
  assert made.load(8) == 8                 # others are read as before


@pytest.mark.ray
def test_what_a_row_raises_arrives_as_it_was(pool):
  made, job, said = pool
  with pytest.raises(sources.BadRow, match='^a.jsonl:6: no such video$') as e:
    made.load(5)
  assert type(e.value) is sources.BadRow and e.value.reason == 'media' and not said


@pytest.mark.ray
def test_killing_and_closing_end_what_is_under_way(ray, tmp_path):
  job, said, ended = Job(tmp_path), [], []
  made = ray_readers.readers(job, said.append)

  def read(i):
    try:
      made.load(i)
    except Exception as e:
      ended.append(type(e))
  for end, kind in ((made.kill, streams.WorkerDied), (made.close, ValueError)):
    for i in (3, 8):                       # one is under way, the other waits for the actor
      threading.Thread(target=read, args=(i,), daemon=True).start()
      until(lambda: job.begun() and job.begun()[-1][0] == 3)
    pid = job.begun()[-1][1]
    end()
    until(lambda: len(ended) == 2)
    assert set(ended) == {kind} and until(lambda: gone(pid))
    ended.clear()
    (job.folder / 'begun').unlink()
  assert not said


@pytest.mark.ray
def test_no_more_samples_are_read_ahead_than_two_an_actor(ray, tmp_path):
  job = Job(tmp_path, workers=2)
  (tmp_path / 'killed').touch()
  made = ray_readers.readers(job, print)
  it = iter(made.read(grain.MapDataset.range(100, 140).map(made.load), 1))
  assert [next(it) for _ in range(6)] == list(range(100, 106))
  until(lambda: len(job.begun()) == 10)
  time.sleep(0.3)
  assert len(job.begun()) == 10
  made.close()


@pytest.mark.ray
def test_an_actor_that_hangs_is_killed_and_changes_no_batch(ray, path):  # noqa: F811
  said = []

  def report(line):
    said.append(line)
    stream._reading = patient              # its successor has to start first
  it = pipeline.train_batches(config(path, readers='ray', workers=1), 2, seed=9, report=report)
  found = take(it, 2)
  (pid,) = pids(ray, it)
  os.kill(pid, signal.SIGSTOP)
  (stream,) = it._streams
  patient, stream._reading = stream._reading, stream._reading._replace(waits=2.0)       # data.max_wait_seconds
  while not said:
    found += take(it, 1)
  found += take(it, 2)
  it.close()
  assert len(said) == 1 and 'its workers were killed; started again behind the last batch' in said[0]
  assert until(lambda: gone(pid))
  assert_same(found, take(pipeline.train_batches(config(path), 2, seed=9), len(found)))


@pytest.mark.ray
def test_a_host_that_would_read_otherwise_ends_the_run_with_a_line(ray, path, monkeypatch):  # noqa: F811
  data = config(path.name, readers='ray', workers=1, tokenizer=str(path.parent))
  monkeypatch.chdir(path.parent)
  it = pipeline.train_batches(data, 2, seed=9)         # a relative path
  next(it)
  it.close()
  with monkeypatch.context() as m:
    m.setattr(os, 'getcwd', lambda: '/nowhere')
    it = pipeline.train_batches(data, 2, seed=9)
    with pytest.raises(InputError, match='^data.readers: the host .* cannot open the data .*the same paths'):
      next(it)
    it.close()
  monkeypatch.setattr(ray_readers, 'versions', lambda: dict.fromkeys(ray_readers.ALIKE, '0'))
  it = pipeline.train_batches(data, 2, seed=9)
  with pytest.raises(InputError, match='^data.readers: the host .* has av 1.*, this process 0; .*install the same'):
    next(it)
  it.close()


ALONE = """
import os, sys, time
from data_pipelines import pipeline
from keye_jax.config import DataConfig
it = pipeline.train_batches(DataConfig(path=sys.argv[1], tokens=96, vision_rows=1, vision_patches=48,
                                       image_tokens_max=4, readers='ray', workers=1), 2, seed=9)
next(it)
import ray
print(ray.get(next(iter(it._reading.readers.load._actors)).where.remote()).split()[1], flush=True)
time.sleep(600)
"""


@pytest.mark.ray
def test_nothing_is_left_of_a_process_that_is_killed(path):  # noqa: F811
  env = {k: v for k, v in os.environ.items() if k != 'RAY_ADDRESS'} | {'RAY_worker_niceness': '0'}
  trainer = subprocess.Popen([sys.executable, '-c', ALONE, str(path)], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                             text=True)
  reader = int(trainer.stdout.readline())
  # Two agents of Ray end by themselves, a minute later.
  comm = lambda pid: pathlib.Path(f'/proc/{pid}/comm').read_text().strip()
  below = [pid for pid in descendants(trainer.pid) if pid == reader or comm(pid) in ('raylet', 'gcs_server')]
  assert reader in below and len(below) == 3
  trainer.kill()
  until(lambda: all(map(gone, below)))
  trainer.wait()
  trainer.stdout.close()


def descendants(pid):
  parents = {}
  for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      parents[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
      continue
  found = [pid]
  for parent in found:
    found += [child for child, of in parents.items() if of == parent]
  return found[1:]


@pytest.mark.ray
def test_no_cluster_at_the_address_is_told_in_a_line(ray, monkeypatch):
  monkeypatch.setattr(ray, 'is_initialized', lambda: False)
  monkeypatch.setenv('RAY_ADDRESS', 'auto')
  monkeypatch.setattr(ray, 'init', lambda address, **_: exec('raise ConnectionError("nothing at " + address)'))
  with pytest.raises(InputError, match='no cluster of Ray at RAY_ADDRESS=auto .*nothing at auto'):
    ray_readers.connect(1)


def test_without_ray_its_extra_is_named(path, monkeypatch):  # noqa: F811
  monkeypatch.setitem(sys.modules, 'ray', None)
  with pytest.raises(InputError, match=r"pip install 'keye_jax\[cluster\]'.*data.readers='local'"):
    pipeline.train_batches(config(path, readers='ray', workers=1), 2, seed=1)
  with pytest.raises(InputError, match="data.readers = 'ray' needs data.workers"):
    check(RunConfig(data=config(path, readers='ray')))


def test_sigterm_goes_to_whom_it_went_before(monkeypatch):
  came, libc = [], ctypes.CDLL(None)
  before = signal.signal(signal.SIGTERM, lambda *_: came.append('python'))
  try:
    with ray_readers.sigterm_kept():
      signal.signal(signal.SIGTERM, lambda *_: came.append('ray'))
    os.kill(os.getpid(), signal.SIGTERM)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: came.append('not of python'))
    libc.signal(signal.SIGTERM, handler)
    with ray_readers.sigterm_kept():
      signal.signal(signal.SIGTERM, lambda *_: came.append('ray'))
    os.kill(os.getpid(), signal.SIGTERM)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert came == ['python', 'not of python']
