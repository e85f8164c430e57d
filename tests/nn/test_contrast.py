"""The two towers: packed is alone, neither sees the other, a mesh is one device."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from keye_jax import feed
from keye_jax.config import IndexerConfig
from keye_jax.nn import contrast, counts, keye
from keye_jax.nn.vision import Vision
from keye_jax.objectives.siglip import siglip
from keye_jax.steps import state as state_lib
from keye_jax.steps.update import make_update
from tests.nn import batches
from tests.steps.test_mesh import mesh
from tests.tolerances import assert_close

TEXT = dataclasses.replace(batches.TEXT, experts=0, experts_per_token=0, mrope_section=(), indexer=IndexerConfig())
CONFIG = dataclasses.replace(batches.CONFIG, text=TEXT, contrast=True)
SAMPLES = 3


def captioned(batch):
  """Half of what is no picture is the caption."""
  here_BT = (batch.vision_BT < 0) & (batch.segment_BT > 0) & (batch.token_BT % 2 == 0)
  return batch._replace(weight_BT=jnp.where(here_BT, 1.0, 0.0))


@pytest.fixture(scope='module')
def params():
  return contrast.init(CONFIG, jax.random.key(0))


@functools.cache
def program(config):
  return jax.jit(functools.partial(contrast.apply, config, SAMPLES))


def samples():
  rng = np.random.default_rng(1)
  return [batches.sample(rng, 2, (2, 4), 6), batches.sample(rng, 1, (4, 2), 7), batches.sample(rng, 0, (2, 2), 5)]


def test_a_pair_has_a_picture_and_a_caption_and_length_one(params):
  batch = captioned(batches.pack([samples(), samples()[:1]], 32, 3, 8))
  out = program(CONFIG)(params, batch)
  assert out.pair_BS.tolist() == [[1, 1, 0], [1, 0, 0]]             # the third sample is text alone
  for x_BSW in (out.image_BSW, out.text_BSW):
    assert_close(np.linalg.norm(x_BSW, axis=-1), out.pair_BS)
  assert float(out.log_scale) == pytest.approx(np.log(10)) and float(out.bias) == -10
  silent = program(CONFIG)(params, batch._replace(weight_BT=0 * batch.weight_BT))
  assert not silent.pair_BS.any() and not silent.image_BSW.any()


def test_packed_samples_are_what_they_are_alone(params):
  together = program(CONFIG)(params, captioned(batches.pack([samples()], 32, 3, 8)))
  for s, one in enumerate(samples()[:2]):
    alone = program(CONFIG)(params, captioned(batches.pack([[one]], 32, 3, 8)))
    assert_close(together.image_BSW[0, s], alone.image_BSW[0, 0], what=f'picture {s}')
    assert_close(together.text_BSW[0, s], alone.text_BSW[0, 0], what=f'caption {s}')


def test_an_image_embedding_is_the_mean_of_its_patches(params):
  """Against the tower itself, over frames of a sample in any vision row."""
  batch = captioned(batches.pack([samples()], 32, 3, 8))
  features = Vision(CONFIG).apply({'params': params['vision']}, keye.pixels(CONFIG, batch.patch_BRNC),
                                  batch.coord_BRN4, batch.frame_BRN)[0]
  mean_W = np.concatenate([features[0], features[1]]).mean(0)       # the first sample has the frames of two rows
  out = program(CONFIG)(params, batch)
  assert_close(out.image_BSW[0, 0], mean_W / np.linalg.norm(mean_W))


def test_no_tower_sees_what_the_other_reads(params):
  batch = captioned(batches.pack([samples()], 32, 3, 8))
  out = program(CONFIG)(params, batch)
  other = program(CONFIG)(params, batch._replace(patch_BRNC=255 - batch.patch_BRNC))
  assert (other.text_BSW == out.text_BSW).all() and not (other.image_BSW == out.image_BSW).all()
  caption_BT = batch.weight_BT > 0
  prompt = batch._replace(target_BT=jnp.where(caption_BT, batch.target_BT, 0), token_BT=0 * batch.token_BT)
  again = program(CONFIG)(params, prompt)
  assert (again.text_BSW == out.text_BSW).all() and (again.image_BSW == out.image_BSW).all()
  words = program(CONFIG)(params, batch._replace(target_BT=batch.target_BT ^ 1))
  assert not (words.text_BSW == out.text_BSW).all() and (words.image_BSW == out.image_BSW).all()


def step(params, batch):
  tx = optax.sgd(1.0)
  update = make_update(functools.partial(contrast.apply, CONFIG, SAMPLES), siglip('train'), tx)
  state = state_lib.create(params, tx, (), 'float32', jax.random.key(0))
  state, metrics = update(state, batch, {'model': 1.0})
  return jax.tree.map(np.asarray, (state.train, metrics))


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 1, 1), (4, 1, 1), (2, 2, 2)])
def test_a_step_on_a_mesh_is_the_step_of_one_device(params, shape):
  start = jax.tree.map(np.asarray, params)
  batch = jax.tree.map(np.asarray, captioned(batches.pack([samples()[:1 + b % 3] for b in range(8)], 32, 4, 8)))
  trained, metrics = step(jax.tree.map(jnp.asarray, start), batch)
  with mesh(*shape):
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding.spec), start, contrast.param_shapes(CONFIG))
    trained8, metrics8 = step(placed, feed.place('train', batch, *feed.share('train', 8)))
  for (path, a), b, at in zip(jax.tree_util.tree_leaves_with_path(trained8), jax.tree.leaves(trained),
                              jax.tree.leaves(start)):
    if np.array_equal(b, at):
      np.testing.assert_array_equal(a, b, err_msg=str(path))
    else:
      assert_close(a - at, b - at, what=str(path))
  for name, (total, weight) in metrics.items():
    assert_close(metrics8[name][0] / metrics8[name][1], total / weight, what=name)


def test_a_model_of_two_towers_is_counted_without_projector_and_head():
  found = counts.describe(CONFIG, 32)
  assert found['parameters_by_part'].keys() == {'language', 'indexers', 'vision', 'projector', 'text tower'}
  assert [found['parameters_by_part'][part] for part in ('language', 'indexers', 'projector')] == [0, 0, 0]
  tree = contrast.param_shapes(CONFIG)
  assert found['parameters_by_part']['vision'] == sum(x.size for x in jax.tree.leaves(tree['vision']))
  assert found['parameters'] == sum(x.size for x in jax.tree.leaves(tree))
  assert not found['flops_per_token']['head'] and 'projector' not in found['flops_per_token']
