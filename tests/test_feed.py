import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from data_pipelines.schema import Batch
from keye_jax import feed
from keye_jax.config import RunConfig
from tests.nn import batches
from tests.steps.test_mesh import mesh


def numbered(B=8, T=32):
  """A batch whose every value is different."""
  shapes = jax.tree.map(np.shape, batches.mixed(B=B, T=T))
  return Batch(*(np.arange(np.prod(s)).reshape(s).astype(np.int32) for s in shapes))


@pytest.mark.parametrize('shape', [(2, 2, 2), (4, 1, 2), (2, 4, 1)])
def test_every_device_gets_its_block(shape):
  batch = numbered()
  with mesh(*shape):
    assert feed.share('train', 8) == (0, 1)
    placed, rows = feed.place('train', batch, 0, 1), shape[0] * shape[2]
    assert placed.token_BT.sharding.shard_shape((8, 32)) == (8 // rows, 32 * rows // 8)
    assert placed.patch_BRNC.sharding.shard_shape((8, 4, 8, 12))[:2] == (8 // rows, 4 * rows // 8)
    old_T = feed.zigzag(32, 8 // rows)
    for name, whole, local in zip(Batch._fields, placed, batch):
      moved = '_BT' in name and old_T is not None
      np.testing.assert_array_equal(whole, local[:, old_T] if moved else local, err_msg=name)


@pytest.mark.parametrize('shards', [2, 4])
def test_zigzag_gives_every_device_the_same_work(shards):
  """Each token is on one device, and the keys that a device's queries see are as many on each."""
  held = feed.zigzag(32, shards).reshape(shards, -1)
  assert sorted(held.reshape(-1)) == list(range(32))
  assert len({int((device + 1).sum()) for device in held}) == 1
  pieces = np.diff(held, axis=1) == 1
  assert (pieces.sum(1) >= 32 // shards - 2).all()         # two runs of neighbours: tiles of keys stay together


def test_a_long_sample_costs_more_than_its_parts():
  samples = [8, 1, 2, 1]
  segment_BT = np.stack([np.repeat(np.arange(1, n + 1) << 8, 32 // n) for n in samples]).astype(np.int32)
  config = RunConfig(model=batches.CONFIG)
  cost_B = feed.costs(config, numbered(4)._replace(segment_BT=segment_BT))
  assert cost_B.dtype == np.float32 and cost_B[1] == cost_B[3] > cost_B[2] > cost_B[0] > 0


def test_tokens_that_do_not_divide_are_refused():
  with mesh(2, 2, 2):
    with pytest.raises(InputError, match='data.tokens = 30 cannot be cut into two pieces for each of 2 devices'):
      feed.place('train', numbered(T=30), 0, 1)


def test_vision_rows_that_do_not_divide_are_refused():
  with mesh(1, 8, 1):
    with pytest.raises(InputError, match='data.vision_rows = 4 cannot be divided over 8 devices'):
      feed.place('train', numbered(), 0, 1)


def test_two_processes_would_each_place_their_rows(monkeypatch):
  """Part 1 of 2 reads rows 4 to 7 of the whole out of its own four."""
  batch = numbered(4)
  asked = []
  with mesh(8, 1, 1):
    monkeypatch.setattr(jax, 'make_array_from_callback', lambda shape, sharding, read: asked.append((shape, read)))
    feed.place('train', batch, 1, 2)
  (shape, read), *_ = asked
  assert shape == (8, 32)
  np.testing.assert_array_equal(read((slice(4, 5), slice(None))), batch.token_BT[:1])
  np.testing.assert_array_equal(read((slice(6, 8), slice(8, 16))), batch.token_BT[2:, 8:16])


def test_rows_that_do_not_divide_are_refused():
  with mesh(2, 2, 2):
    with pytest.raises(InputError, match='train.batch = 6 rows cannot be divided over 4 groups of devices'):
      feed.share('train', 6)
