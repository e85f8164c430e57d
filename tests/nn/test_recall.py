"""The recall that training reports is the mass that the probe finds at the same queries."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax import feed, sharding
from keye_jax.config import MeshConfig
from keye_jax.nn import keye, probe, recall
from keye_jax.objectives import auxiliary
from pallas_kernels import tiles
from tests.nn.batches import CONFIG, mixed

SPARSE = dataclasses.replace(CONFIG, attention='sparse')
TOPK = CONFIG.text.indexer.topk


@pytest.fixture(scope='module')
def batch():
  """Its rows end in padding, more of it than keys are picked."""
  batch = mixed(B=2, T=40)
  assert (batch.segment_BT[:, -10:] == 0).all() and TOPK < 10
  return batch


@pytest.fixture(scope='module')
def params():
  return keye.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope='module')
def mass_LBT(params, batch):
  """By the token's place before any re-ordering."""
  return np.asarray(probe.run(SPARSE, probe.indexer, params, batch, TOPK).mass_LBT)


def seen_BT(batch) -> np.ndarray:
  """How many keys a query sees; 0 for padding."""
  segment, order = np.asarray(batch.segment_BT), np.asarray(batch.order_BT)
  trunk = segment >> 8 << 8
  sees = ((segment[:, None] == segment[:, :, None]) | (segment[:, None] == trunk[:, :, None])) & (
      order[:, None] <= order[:, :, None])
  return np.where(segment > 0, sees.sum(-1), 0)


@pytest.mark.parametrize('many', [tiles.MANY, 1], ids=['at once', 'one by one'])
def test_recall_is_the_probes_mass(params, batch, mass_LBT, monkeypatch, many):
  monkeypatch.setattr(tiles, 'MANY', many)
  found = jax.jit(lambda p, b: keye.apply(SPARSE, p, b).aux.recall)(params, batch)
  at_N = [2, 7, 12, 17, 22, 27, 32, 37]
  assert found.mass_BN.shape == (2, 2, recall.QUERIES)
  counts_BN = seen_BT(batch)[:, at_N] > TOPK
  assert 0 < counts_BN.sum() < counts_BN.size
  np.testing.assert_array_equal(found.counts_BN, np.broadcast_to(counts_BN, (2, *counts_BN.shape)))
  np.testing.assert_allclose(np.asarray(found.mass_BN)[:, counts_BN], mass_LBT[:, :, at_N][:, counts_BN], rtol=1e-5)


def test_each_device_looks_at_its_own_queries(params, batch, mass_LBT):
  before = jax.sharding.get_abstract_mesh()
  try:
    sharding.use_mesh(MeshConfig(1, 2, 1))
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), params, keye.param_shapes(SPARSE))
    rows = feed.place('train', jax.tree.map(np.asarray, batch), *feed.share('train', 2))
    found = jax.tree.map(np.asarray, jax.jit(lambda p, b: keye.apply(SPARSE, p, b).aux.recall)(placed, rows))
    order_BT = np.asarray(rows.order_BT)
  finally:
    jax.set_mesh(None) if before.empty else jax.set_mesh(before)
  N, T = recall.QUERIES, order_BT.shape[1] // 2
  at_N = np.concatenate([(2 * np.arange(N) + 1) * T // (2 * N) + device * T for device in range(2)])
  assert found.mass_BN.shape == (2, 2, 2 * N)
  place_BN = order_BT[:, at_N]
  counts_BN = np.take_along_axis(seen_BT(batch), place_BN, 1) > TOPK
  np.testing.assert_array_equal(found.counts_BN[0], counts_BN)
  expected_LBN = np.take_along_axis(mass_LBT, np.broadcast_to(place_BN, (2, *place_BN.shape)), 2)
  np.testing.assert_allclose(found.mass_BN[:, counts_BN], expected_LBN[:, counts_BN], rtol=1e-5)


def test_the_metric_is_a_mean_over_the_queries_that_count():
  mass, counts = jnp.array([[[0.5, 0.1], [1.0, 0.7]]]), jnp.array([[[1.0, 0.0], [1.0, 1.0]]])
  output = keye.Output(None, None, keye.decoder.Aux(None, None, None, None, recall.Recall(mass, counts)), None)
  value, metrics = auxiliary.terms(output, None, {}, 1.0, 1.0)
  total, weight = metrics['indexer_recall']
  assert value == 0 and float(weight) == 3 and float(total) == pytest.approx(2.2)
