"""The probed forward pass is the model's own, and its choosers choose what they say."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.config import IndexerConfig, ModelConfig
from keye_jax.nn import inspect, keye, probe
from tests.nn.batches import CONFIG, forward, mixed, pack, sample
from tests.tolerances import assert_close

SPARSE = dataclasses.replace(CONFIG, attention='sparse')


@pytest.fixture(scope='module')
def params():
  return keye.init(CONFIG, jax.random.key(0))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(probe, 'QUERIES', 12)      # does not divide the row


def one_sample(T=32):
  """A row that is one sample of text."""
  return pack([[sample(np.random.default_rng(1), 0, (2, 2), T)]], T, 0, 0)


@pytest.mark.parametrize('choose, config', [(probe.everything, CONFIG), (probe.indexer, SPARSE)])
def test_the_walk_is_the_model(params, choose, config):
  batch = mixed(B=2)
  found = probe.run(config, choose, params, batch, CONFIG.text.indexer.topk)
  assert_close(found.hidden_BTD, forward(config, params, batch).hidden_BTD)
  if choose is probe.everything:
    np.testing.assert_allclose(found.mass_LBT[:, batch.segment_BT > 0], 1, rtol=1e-5)


def test_a_dense_text_model():
  """No indexer, no experts, no norms of q and k: the shape of a Llama."""
  text = dataclasses.replace(CONFIG.text, indexer=IndexerConfig(), experts=0, experts_per_token=0, qk_norm=False)
  config = ModelConfig(text=text)
  params, batch = keye.init(config, jax.random.key(0)), one_sample()
  expected = forward(config, params, batch).hidden_BTD
  assert_close(probe.run(config, probe.everything, params, batch, 1).hidden_BTD, expected)
  for choose, k in ((probe.oracle, 32), (probe.window, 32 + probe.SINKS)):
    assert_close(probe.run(config, choose, params, batch, k).hidden_BTD, expected)


def test_mass_and_overlap_of_the_indexer_are_those_of_its_selection(params):
  batch, k = mixed(B=2), 6
  found = probe.run(SPARSE, probe.indexer, params, batch, k)
  chosen_LBTS, _ = inspect.selections(SPARSE, params, batch)
  x_BTD, ctx = inspect.start(SPARSE, params, batch)
  own = jax.tree.map(lambda a: a[0], params['layers'])
  normed_BTD = x_BTD * jax.lax.rsqrt((x_BTD ** 2).mean(-1, keepdims=True) + CONFIG.text.norm_eps) * own['attn_norm']
  q, key, _ = (np.asarray(x, np.float64) for x in probe.heads(SPARSE, own['attn'], normed_BTD, ctx))
  segment, order, chosen = np.asarray(batch.segment_BT), np.asarray(batch.order_BT), np.asarray(chosen_LBTS[0])
  for b, t in ((0, 14), (0, 25), (1, 30)):
    seen = [s for s in range(t + 1) if segment[b, s] >> 8 == segment[b, t] >> 8
            and segment[b, s] & 255 in (0, segment[b, t] & 255) and order[b, s] <= order[b, t]]
    p = np.zeros(len(order[b]))
    for h in range(CONFIG.text.heads):
      x = key[b, seen, h // 2] @ q[b, t, h] * CONFIG.text.head_dim ** -0.5
      p[seen] += np.exp(x - x.max()) / np.exp(x - x.max()).sum() / CONFIG.text.heads
    np.testing.assert_allclose(found.mass_LBT[0, b, t], p[chosen[b, t]].sum(), rtol=1e-4)
    top = sorted(seen, key=lambda s: (-p[s], order[b, s]))[:k]
    np.testing.assert_allclose(found.overlap_LBT[0, b, t], chosen[b, t, top].mean(), rtol=1e-5)


def view(T=40):
  order = jnp.arange(T)
  p_TS = jnp.asarray(np.random.default_rng(0).integers(0, 5, (T, T)), jnp.float32)
  return probe.View(p_TS, -p_TS, order[:, None] >= order, order, order)


def test_window_keeps_the_newest_and_the_first():
  mask = np.asarray(probe.window(view(), 10))
  assert set(np.flatnonzero(mask[30])) == {0, 1, 2, 3, *range(25, 31)}
  assert (mask.sum(1) == np.minimum(np.arange(40) + 1, 10)).all()


@pytest.mark.parametrize('choose, sign', [(probe.oracle, 1), (probe.indexer, -1)])
def test_best_keys_with_ties_lowest_first(choose, sign):
  v = view()
  mask = np.asarray(choose(v, 7))
  for t in range(40):
    expected = sorted(range(t + 1), key=lambda s: (-sign * float(v.p_TS[t, s]), s))[:7]
    assert set(np.flatnonzero(mask[t])) == set(expected)
