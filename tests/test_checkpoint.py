import json
import random
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from data_pipelines.errors import InputError
from keye_jax import checkpoint, sharding
from keye_jax.checkpoint import Checkpoints
from keye_jax.config import OptimizerConfig
from keye_jax.steps import state as state_lib
from keye_jax.steps.optimizer import make_optimizer
from tests.steps import toy


def make_state(step=0, freeze=('vision',)):
  tx = make_optimizer(OptimizerConfig())
  state = state_lib.create(toy.init(step), tx, freeze, 'bfloat16', jax.random.key(step))
  return state._replace(step=jnp.int32(step))


def shape_of(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    same = jax.random.key_data if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray
    np.testing.assert_array_equal(same(x), same(y))


@pytest.fixture
def said():
  return []


@pytest.fixture
def saved(tmp_path, said):
  """Run folder with whole checkpoints of steps 2 and 3."""
  ckpt = Checkpoints(tmp_path, keep=2, report=said.append)
  for step in (1, 2, 3):
    ckpt.save(step, make_state(step), {'data': {'position': step}, 'config': {'a': 1}})
  ckpt.wait()
  return ckpt


def files(path):
  return sorted(p for p in path.rglob('*') if p.is_file() and not p.name.startswith('digest'))


def flip(file, at):
  data = bytearray(file.read_bytes())
  data[at // 8] ^= 1 << at % 8
  file.write_bytes(data)


def test_round_trip_keeps_the_last_n(saved, said):
  assert sorted(p.name for p in saved.folder.iterdir()) == ['2', '3']
  found = saved.restore(shape_of(make_state()))
  assert found.step == 3 and [h['data'] for h in found.hosts] == [{'position': 3}]
  assert_equal(found.state, make_state(3))
  assert not said


def test_nothing_saved_is_none(tmp_path, said):
  assert Checkpoints(tmp_path, 2, said.append).restore(shape_of(make_state())) is None


def test_any_flipped_bit_is_found_and_the_checkpoint_before_is_used(saved, said):
  rng = random.Random(0)
  newest = saved.folder / '3'
  for file in files(newest):
    if not file.stat().st_size:
      continue
    whole = file.read_bytes()
    flip(file, rng.randrange(8 * len(whole)))
    assert checkpoint.damage(newest) == f'{file.relative_to(newest)} differs from its digest'
    file.write_bytes(whole)
  assert checkpoint.damage(newest) is None
  biggest = max(files(newest), key=lambda f: f.stat().st_size)
  flip(biggest, 8 * biggest.stat().st_size // 2)
  found = saved.restore(shape_of(make_state()))
  assert found.step == 2 and len(said) == 1
  assert f'{newest}: damaged checkpoint' in said[0] and biggest.name in said[0]
  assert_equal(found.state, make_state(2))
  assert not newest.exists() and len(list(saved.folder.glob('3.damaged-*'))) == 1      # kept for the user


@pytest.mark.parametrize('hurt', ['truncate', 'delete', 'digest'])
def test_missing_pieces_are_damage(saved, said, hurt):
  newest = saved.folder / '3'
  biggest = max(files(newest), key=lambda f: f.stat().st_size)
  if hurt == 'truncate':
    biggest.write_bytes(biggest.read_bytes()[:-1])
  elif hurt == 'delete':
    biggest.unlink()
  else:
    (newest / 'digest_0.json').write_text('{"proc')
  saved.tidy()
  assert newest.exists() and not said                 # damage is never taken for a save that was cut off
  assert saved.restore(shape_of(make_state())).step == 2


def test_only_damaged_ones_is_an_error_not_a_fresh_start(saved):
  for step in (2, 3):
    flip(files(saved.folder / str(step))[0], 3)
  with pytest.raises(InputError, match='no other whole checkpoint; restore a copy'):
    saved.restore(shape_of(make_state()))


def test_a_save_that_was_cut_off_does_not_count_and_is_tidied(saved, said):
  (saved.folder / '3' / 'digest_0.json').unlink()
  (saved.folder / f'4{checkpoint.CUT_OFF}').mkdir()
  assert saved.restore(shape_of(make_state())).step == 2 and not said
  saved.tidy()
  assert sorted(p.name for p in saved.folder.iterdir()) == ['2'] and len(said) == 2
  saved.save(3, make_state(3), {})                    # the run gets there again
  saved.wait()
  assert checkpoint.whole(saved.folder) == [2, 3]


def test_what_does_not_fit_is_named(saved):
  like = shape_of(make_state())
  bigger = jax.tree.map(lambda x: x, like)
  bigger.train['embed'] = jax.ShapeDtypeStruct((99, toy.D), jnp.float32)
  with pytest.raises(InputError, match=r'3: this checkpoint does not fit: train/embed has shape \(11, 8\) there and '
                                       r'\(99, 8\) in this model$'):
    saved.restore(bigger)
  fewer = jax.tree.map(lambda x: x, like)
  del fewer.train['head']
  with pytest.raises(InputError, match='train/head is there but not in this model'):
    saved.restore(fewer)
  more = jax.tree.map(lambda x: x, like)
  more.train['lora'] = more.train['norm2'] = like.train['norm']
  with pytest.raises(InputError, match=r'train/lora is missing there \(and 1 more\)'):
    saved.restore(more)


def test_parameters_alone_trained_and_frozen_merged(saved, said):
  like = shape_of(toy.init())
  found = checkpoint.load_params(saved.folder.parent, like, said.append)
  state = make_state(3)
  expected = state_lib.merge(state.train, jax.tree.map(lambda x: x.astype(jnp.float32), state.frozen))
  assert_equal(found.params, expected)
  assert found.step == 3 and checkpoint.is_run(saved.folder.parent)
  like['layers']['attn']['extra'] = like['norm']
  with pytest.raises(InputError, match='layers/attn/extra is missing there'):
    checkpoint.load_params(saved.folder.parent, like, said.append)


def test_what_another_number_of_processes_saved_is_handed_out_whole(saved):
  digest = saved.folder / '3' / 'digest_0.json'
  value = json.loads(digest.read_text())
  digest.write_text(json.dumps(value | {'processes': 2}))
  assert saved.restore(shape_of(make_state())).step == 2                 # the second process's digest is missing
  (digest.parent / 'host_1.json').write_text('{"data": {"position": 9}}')
  files = {'host_1.json': xxhash.xxh3_128(b'{"data": {"position": 9}}').hexdigest()}
  (digest.parent / 'digest_1.json').write_text(json.dumps({'processes': 2, 'files': files}))
  found = saved.restore(shape_of(make_state()))
  assert found.step == 3 and [h['data']['position'] for h in found.hosts] == [3, 9]
  flip(digest.parent / 'host_1.json', 7)
  assert saved.restore(shape_of(make_state())).step == 2


def test_another_mesh_restores_the_same_values(tmp_path, said):
  from jax.sharding import AxisType, NamedSharding
  from jax.sharding import PartitionSpec as P
  mesh = lambda *shape: jax.make_mesh(shape, sharding.AXES, (AxisType.Explicit,) * 3)
  value = np.arange(64, dtype=np.float32).reshape(8, 8)

  def place(mesh, *spec):
    return {'w': jax.device_put(value, NamedSharding(mesh, P(*spec))), 'rng': jax.random.key(7)}
  ckpt = Checkpoints(tmp_path, 1, said.append)
  with jax.set_mesh(mesh(2, 2, 2)):
    ckpt.save(5, place(mesh(2, 2, 2), ('data', 'context'), 'expert'), {})
    ckpt.wait()
  with jax.set_mesh(mesh(4, 1, 2)):
    like = shape_of(place(mesh(4, 1, 2), None, ('data', 'expert')))
    found = ckpt.restore(like)
    assert found.state['w'].sharding == like['w'].sharding
    np.testing.assert_array_equal(found.state['w'], value)
    abstract = jax.eval_shape(jax.jit(lambda: jax.sharding.reshard(jnp.zeros((8, 8)), P('data'))))
    found = ckpt.restore(dict(like, w=abstract))      # shapes without devices, as a program would have them
    assert found.state['w'].sharding.spec == P('data', None)
    found = ckpt.restore({'w': abstract, 'rng': jax.eval_shape(lambda: jax.random.key(0))})
    assert found.state['rng'].sharding.is_fully_replicated and len(found.state['rng'].devices()) == 8
  found = ckpt.restore(shape_of({'w': jnp.zeros((8, 8)), 'rng': jax.random.key(0)}))
  np.testing.assert_array_equal(found.state['w'], value)


def test_a_full_disk_gives_one_line_and_leaves_earlier_checkpoints_alone(tmp_path):
  code = textwrap.dedent('''
      import resource, signal, sys, jax, numpy as np
      from data_pipelines.errors import InputError
      from keye_jax import checkpoint
      # A write fails with EFBIG here as it does with ENOSPC on a full disk.
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
      ckpt = checkpoint.Checkpoints(sys.argv[1], 2, print)
      ckpt.save(1, {'w': np.arange(5.0)}, {})
      ckpt.save(2, {'w': np.random.default_rng(0).random(1_000_000)}, {})
      try:
        ckpt.wait()
      except InputError as e:
        print('ERROR', e)
      print(checkpoint.whole(ckpt.folder), sorted(p.name for p in ckpt.folder.iterdir()))
      print(ckpt.restore({'w': jax.ShapeDtypeStruct((5,), np.float64, sharding=None)}).step)
      ''')
  out = subprocess.run([sys.executable, '-c', code, tmp_path], capture_output=True, text=True, timeout=120)
  lines = out.stdout.splitlines()
  assert out.returncode == 0, out.stderr
  assert lines[0].startswith(f'ERROR {tmp_path}/checkpoints/2: the checkpoint could not be saved: File too large; '
                             'step 1 is the last whole one')
  assert lines[1:] == ["[1] ['1']", '1']
