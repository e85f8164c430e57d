"""The whole model: sizes of the published checkpoint, equivalences of packing, caches, scans and meshes.

Nearly all of the time is compiling, so batches have one shape and there is one program of each kind for a config.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax import feed, sharding
from keye_jax.config import MeshConfig
from keye_jax.nn import counts, decoder, head, keye
from tests.nn import batches
from tests.nn.batches import forward
from tests.tolerances import assert_close

MODES = ('dense', 'warmup', 'sparse')


def with_mode(mode, **text):
  return dataclasses.replace(batches.CONFIG, attention=mode, text=dataclasses.replace(batches.TEXT, **text))


@pytest.fixture(scope='module')
def params():
  p = keye.init(batches.CONFIG, jax.random.key(0))
  # away from initial ones and zeros, so that a scale or bias that is not applied shows
  noise = jax.tree.map(lambda a: 0.1 * np.random.default_rng(a.size).normal(size=a.shape).astype(a.dtype), p)
  return jax.tree.map(np.add, p, noise)      # of numpy: jax would compile an addition for every shape


def pack(*rows: list[dict]):
  """Rows of samples in a batch of eight."""
  return batches.pack([*rows, *[[]] * (8 - len(rows))], 32, 4, 8)


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, params, batch, lm, kl):
  """(loss, its gradients) of lm times the language model's loss and kl times the indexer's."""
  def loss(params):
    out = keye.apply(config, params, batch)
    stats = head.token_stats(config.layout, out.hidden_BTD, out.head_DV, batch.target_BT, chunk=16)
    value = -lm * (stats.logp_BT * batch.weight_BT).sum() / batch.weight_BT.sum()
    return value if out.aux.kl_LBT is None else value + kl * out.aux.kl_LBT.sum()
  return jax.value_and_grad(loss)(params)


def test_published_sizes():
  from configs import keye_vl_2_30b_a3b
  from keye_jax.config import RunConfig, freeze
  report = counts.describe(freeze(RunConfig, keye_vl_2_30b_a3b.get_config()).model)
  assert report['parameters'] == 31_122_082_160
  assert report['parameters_by_part'] == dict(language=30_532_122_624, indexers=108_536_832, vision=450_735_984,
                                              projector=30_686_720)
  assert report['cache_bytes_per_token']['kv'] == 96 * 1024


@pytest.mark.parametrize('mode', MODES)
def test_packed_is_unpacked(params, mode):
  config = with_mode(mode)
  rng = np.random.default_rng(1)
  video, image, text = (batches.sample(rng, 2, (2, 4), 3), batches.sample(rng, 1, (4, 2), 4),
                        batches.sample(rng, 0, (2, 2), 7))
  together = forward(config, params, pack([video, image, text])).hidden_BTD[0]
  alone = forward(config, params, pack([video], [image], [text])).hidden_BTD
  start = 0
  for row, s in zip(alone, (video, image, text)):
    n = len(s['token'])
    assert_close(together[start:start + n], row[:n], what=mode)
    start += n


@pytest.mark.parametrize('mode', MODES)
def test_branches_share_a_trunk(params, mode):
  """Each branch of a row sees what it would see alone after the trunk."""
  config = with_mode(mode)
  make = lambda branches: batches.sample(np.random.default_rng(2), 2, (2, 4), 3, branches)
  both = make((3, 4))
  trunk = len(both['token']) - 7
  row = forward(config, params, pack([both])).hidden_BTD[0]
  for b, at in ((1, slice(trunk, trunk + 3)), (2, slice(trunk + 3, trunk + 7))):
    n = at.stop - at.start
    single = make((n,))
    single['token'][trunk:] = both['token'][at]
    alone = forward(config, params, pack([single])).hidden_BTD[0]
    assert_close(row[at], alone[trunk:trunk + n], what=f'{mode} branch {b}')


@pytest.mark.parametrize('mode, split', [('sparse', True), pytest.param('sparse', False, marks=pytest.mark.slow),
                                         pytest.param('dense', True, marks=pytest.mark.slow)])
def test_cached_decode_is_full_forward(params, mode, split):
  config = with_mode(mode)
  batch = batches.mixed(B=8)
  full = forward(config, params, batch)
  cut = 24
  take = lambda a, at: a if a.ndim >= 3 and a.shape[-1] != 3 else a[:, at]
  head_of = type(batch)(*[take(a, slice(0, cut)) for a in batch])
  out = jax.jit(lambda p, b: keye.apply(config, p, b, keep_kv=True))(params, head_of)
  cache = decoder.extend(decoder.empty_cache(config, 8, 40), out.kv, head_of.segment_BT, head_of.order_BT)
  if split:
    params = params | {'layers': tuple(jax.tree.map(lambda a: a[i], params['layers']) for i in range(2))}
  advance = jax.jit(lambda p, b, c: keye.apply(config, p, b, c))
  for t in range(cut, 32):
    one = type(batch)(*[take(a, slice(t, t + 1)) for a in batch])
    one = one._replace(patch_BRNC=one.patch_BRNC[:, :0], coord_BRN4=one.coord_BRN4[:, :0],
                       frame_BRN=one.frame_BRN[:, :0])
    out = advance(params, one, cache)
    cache = decoder.extend(cache, out.kv, one.segment_BT, one.order_BT)
    valid = np.asarray(one.segment_BT) > 0
    assert_close(np.asarray(out.hidden_BTD)[valid], np.asarray(full.hidden_BTD[:, t:t + 1])[valid], what=f'{mode} {t}')


@pytest.mark.parametrize('mode', ['sparse', pytest.param('dense', marks=pytest.mark.slow)])
def test_few_tokens_ask(params, mode):
  """Their hidden states, and everyone's keys and values, are those of a pass that answers all."""
  config, batch = with_mode(mode), batches.mixed(B=8)
  full = jax.jit(lambda p, b: keye.apply(config, p, b, keep_kv=True))(params, batch)
  asking_BQ = np.random.default_rng(0).integers(0, 32, (8, 3))
  some = jax.jit(lambda p, b, i: keye.apply(config, p, b, keep_kv=True, asking_BQ=i))(params, batch, asking_BQ)
  valid_BQ = np.take_along_axis(np.asarray(batch.segment_BT), asking_BQ, 1) > 0
  expected = np.take_along_axis(np.asarray(full.hidden_BTD), asking_BQ[..., None], 1)
  assert_close(np.asarray(some.hidden_BTD)[valid_BQ], expected[valid_BQ], what='hidden states')
  jax.tree.map(assert_close, some.kv, full.kv)
  assert some.aux is None


def test_sparse_with_all_keys_is_dense(params):
  batch = batches.mixed(B=8)
  index = dataclasses.replace(batches.TEXT.indexer, topk=32)
  assert_close(forward(with_mode('sparse', indexer=index), params, batch).hidden_BTD,
               forward(with_mode('dense'), params, batch).hidden_BTD)


def test_sparse_differs_from_dense(params):
  batch = batches.mixed(B=8)
  a, b = (forward(with_mode(m), params, batch).hidden_BTD for m in ('sparse', 'dense'))
  assert float(jnp.abs(a - b).max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['block', 'attention', 'offload'])
def test_remat_changes_nothing(params, remat):
  config, batch = with_mode('sparse'), batches.mixed(B=8)
  again, plain = (gradients(c, params, batch, 1.0, 1.0) for c in (dataclasses.replace(config, remat=remat), config))
  jax.tree.map(assert_close, again, plain)


def test_indexer_learns_from_its_own_loss_only(params):
  config, batch = with_mode('sparse'), batches.mixed(B=8)
  is_indexer = lambda path: any(k.key == 'indexer' for k in path)
  for path, g in jax.tree_util.tree_leaves_with_path(gradients(config, params, batch, 1.0, 0.0)[1]):
    assert (float(np.abs(g).max()) == 0) == (is_indexer(path) or path[-1].key == 'packing_position'), path
  for path, g in jax.tree_util.tree_leaves_with_path(gradients(config, params, batch, 0.0, 1.0)[1]):
    assert (float(np.abs(g).max()) > 0) == is_indexer(path), path


@pytest.mark.parametrize('mode, shape, transport, balance', [
    ('sparse', (2, 2, 2), 'ring', 0.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('sparse', (1, 1, 1), 'local', 0.0), ('sparse', (2, 1, 4), 'ragged', 0.75),
        ('warmup', (1, 4, 2), 'padded', 0.75), ('dense', (2, 2, 2), 'ring', 0.75)))])
def test_meshes_agree(params, mode, shape, transport, balance):
  """Loss and gradients on every mesh equal those of one device without a mesh. Three rows hold text alone."""
  some, text = np.split(np.arange(8), [5])
  batch = batches.mixed(B=8)
  words = pack(*[[batches.sample(np.random.default_rng(b), 0, (2, 2), 20)] for b in text])
  batch = jax.tree.map(lambda a, b: np.concatenate([np.asarray(a)[some], np.asarray(b)[:len(text)]]), batch, words)
  config = with_mode(mode)
  expected = gradients(config, params, batch, 1.0, 1.0)
  config = dataclasses.replace(config, experts_transport=transport, experts_capacity=4.0,    # room for all
                               vision_balance=balance)
  mesh_before = jax.sharding.get_abstract_mesh()
  try:
    sharding.use_mesh(MeshConfig(*shape))
    shapes = keye.param_shapes(config)
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), params, shapes)
    rows = feed.place('train', batch, *feed.share('train', 8))
    got = jax.tree.map(np.asarray, gradients(config, placed, rows, 1.0, 1.0))
  finally:
    jax.set_mesh(None) if mesh_before.empty else jax.set_mesh(mesh_before)
  jax.tree_util.tree_map_with_path(lambda path, a, b: assert_close(a, b, what=f'{path}') if np.abs(b).max() else
                                   np.testing.assert_array_equal(a, b), got, jax.tree.map(np.asarray, expected))
