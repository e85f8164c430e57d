import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.errors import InputError
from keye_jax.config import DataConfig
from keye_jax.hf import config, names, processor, reader, writer
from tests.hf.models import DATA, FORMATS, MODELS, random_params


def folder_of(path, model='keye', experts=None, shard_bytes=4000, dtype='float32', params=None):
  """A folder of weights and config, as an export leaves it but without a tokenizer."""
  cfg, fmt = MODELS[model], FORMATS[model]
  path.mkdir(exist_ok=True)
  params = params or random_params(cfg, fmt)
  writer.write_weights(str(path), writer.flatten(params), names.table(cfg, fmt, experts), dtype, shard_bytes)
  contents = {'config.json': config.to_hf(cfg, fmt)} | (processor.to_hf(cfg.vision, DATA) if cfg.vision.layers else {})
  for name, content in contents.items():
    (path / name).write_text(json.dumps(content))
  return path, params


def assert_same(actual, expected):
  actual, expected = writer.flatten(actual), writer.flatten(expected)
  assert actual.keys() == expected.keys()
  for path, value in expected.items():
    assert actual[path].dtype == value.dtype, path
    np.testing.assert_array_equal(actual[path], value, err_msg=path)


@pytest.mark.parametrize('model,experts', [
    *((m, None) for m in MODELS), ('keye', 'split'), ('keye', 'module'), ('qwen3_moe', 'hub'), ('qwen3_moe', 'module')])
def test_round_trip_is_exact(tmp_path, model, experts):
  path, params = folder_of(tmp_path / 'x', model, experts)
  assert len(list(path.glob('*.safetensors'))) > 2
  got = reader.load_folder(str(path))
  assert (got.config, got.format) == (MODELS[model], FORMATS[model])
  assert_same(got.params, params)


def test_places_of_elements(tmp_path):
  """The table against index arithmetic written out by hand."""
  path, p = folder_of(tmp_path / 'x', shard_bytes=10**9)
  (file,) = path.glob('*.safetensors')
  hf = load_file(file)
  text, v, lp = MODELS['keye'].text, MODELS['keye'].vision, p['layers']
  layer, at = 1, 'model.layers.1.self_attn.'
  head, dim, row = 3, 5, 7
  assert hf[at + 'q_proj.weight'][head * text.head_dim + dim, row] == lp['attn']['q'][layer, row, head, dim]
  assert hf[at + 'o_proj.weight'][row, head * text.head_dim + dim] == lp['attn']['o'][layer, head, dim, row]
  index = hf[at + 'sa_indexer.q_proj.weight']
  I, J = text.indexer.heads, text.indexer.head_dim
  assert index.shape == (I * J + I, text.embed)
  assert index[2 * J + 1, row] == lp['attn']['indexer']['q'][layer, row, 2, 1]
  assert index[I * J + 2, row] == lp['attn']['indexer']['gate'][layer, row, 2]
  experts = 'model.layers.1.mlp.experts.'
  assert (hf[experts + 'gate_up_proj'] == lp['mlp']['gate_up'][layer]).all()
  assert (hf[experts + 'down_proj'] == lp['mlp']['down'][layer]).all()
  assert hf['lm_head.weight'][9, row] == p['head'][row, 9]
  conv = hf['visual.vision_model.embeddings.patch_embedding.weight']
  channel, y, x = 2, 3, 11
  assert conv[4, channel, y, x] == p['vision']['patch'][(channel * v.patch + y) * v.patch + x, 4]
  bias = hf['visual.vision_model.encoder.layers.1.self_attn.k_proj.bias']
  assert bias[1 * 8 + 3] == p['vision']['layers']['k_bias'][1, 1, 3]
  split = folder_of(tmp_path / 'y', 'qwen3_moe', shard_bytes=10**9)
  hf, gate_up = load_file(next(split[0].glob('*.safetensors'))), split[1]['layers']['mlp']['gate_up']
  name = 'model.layers.0.mlp.experts.2.{}_proj.weight'
  F = MODELS['qwen3_moe'].text.ffn
  assert hf[name.format('gate')][4, row] == gate_up[0, 2, row, 4]
  assert hf[name.format('up')][4, row] == gate_up[0, 2, row, F + 4]


@pytest.mark.parametrize('experts', ['hub', 'module', 'split'])
def test_blocks_are_those_of_the_whole(tmp_path, experts):
  """What a sharded placement asks for, and the order in which it gets it."""
  path, params = folder_of(tmp_path / 'x', experts=experts)
  rng = np.random.default_rng(0)
  seen = []

  def place(path, shape, dtype, fetch):
    seen.append(path)
    for _ in range(3):
      start = [int(rng.integers(0, n)) for n in shape]
      index = tuple(slice(a, int(rng.integers(a + 1, n + 1))) for a, n in zip(start, shape))
      np.testing.assert_array_equal(fetch(index), writer.flatten(params)[path][index], err_msg=path)
    whole = fetch((slice(None),) * len(shape))
    assert dtype == np.float32 and whole.shape == shape
    assert jax.device_put(whole, jax.devices('cpu')[0]).unsafe_buffer_pointer() == whole.ctypes.data    # not copied
    return path

  tree = reader.load_folder(str(path), place=place).params
  assert tree['layers']['attn']['q'] == 'layers/attn/q' and len(seen) == len(writer.flatten(params))


def test_bfloat16(tmp_path):
  path, params = folder_of(tmp_path / 'x', dtype='bfloat16')
  rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in writer.flatten(params).items()}
  got = writer.flatten(reader.load_folder(str(path), 'bfloat16').params)
  assert all(got[k].dtype == ml_dtypes.bfloat16 and (got[k] == v).all() for k, v in rounded.items())
  wide = writer.flatten(reader.load_folder(str(path)).params)
  assert all(wide[k].dtype == np.float32 and (wide[k] == v.astype(np.float32)).all() for k, v in rounded.items())


def test_media_limits_are_read(tmp_path):
  path, _ = folder_of(tmp_path / 'x')
  got = reader.load_folder(str(path)).data
  fields = ('fps', 'min_frames', 'frame_tokens_min', 'frame_tokens_max', 'video_tokens', 'image_tokens_min',
            'image_tokens_max')
  assert [getattr(got, f) for f in fields] == [getattr(DATA, f) for f in fields]
  (path / 'video_preprocessor_config.json').unlink()
  assert reader.load_folder(str(path)).data.video_tokens == DataConfig().video_tokens


def resave(path, change):
  """Applies `change` to the tensors of the one shard."""
  (file,) = path.glob('*.safetensors')
  tensors = load_file(file)
  change(tensors)
  file.unlink()
  (path / 'model.safetensors.index.json').unlink()
  save_file(tensors, path / 'model.safetensors')


@pytest.mark.parametrize('model,change,message', [
    ('qwen3', lambda t: t.pop('model.norm.weight'), "'model.norm.weight' is missing"),
    ('qwen3', lambda t: t.update({'model.layers.9.x': np.zeros(2, np.float32)}), "'model.layers.9.x' belongs to no"),
    ('qwen3', lambda t: t.update({'model.norm.weight': np.zeros(25, np.float32)}), 'has shape (25,)'),
    ('qwen3', lambda t: t.update({'model.norm.weight': np.zeros(24, np.int32)}), 'stored as I32'),
    ('qwen3', lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'] + 1}), 'differs from it'),
    ('keye', lambda t: t.pop('model.layers.1.self_attn.sa_indexer.q_proj.weight'), 'sa_indexer.q_proj.weight'),
    ('keye', lambda t: [t.pop(k) for k in list(t) if 'sa_indexer' in k], '(and 9 more)'),
    ('qwen3_moe', lambda t: t.pop('model.layers.1.mlp.experts.3.up_proj.weight'), 'experts.3.up_proj')])
def test_names_and_shapes_are_checked(tmp_path, model, change, message):
  path, _ = folder_of(tmp_path / 'x', model, shard_bytes=10**9)
  resave(path, change)
  with pytest.raises(InputError) as e:
    reader.load_folder(str(path))
  assert message in str(e.value) and str(path) in str(e.value) and '\n' not in str(e.value)


def test_harmless_extras_are_allowed(tmp_path):
  path, params = folder_of(tmp_path / 'x', 'qwen3', shard_bytes=10**9)
  resave(path, lambda t: t.update({'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(4, np.float32),
                                   'visual.vision_model.head.probe': np.zeros(4, np.float32),
                                   'lm_head.weight': t['model.embed_tokens.weight']}))
  assert_same(reader.load_folder(str(path)).params, params)


@pytest.mark.parametrize('size', [0, 5, 300, -1])
def test_truncated_shard(tmp_path, size):
  path, _ = folder_of(tmp_path / 'x')
  shard = sorted(path.glob('*.safetensors'))[1]
  shard.write_bytes(shard.read_bytes()[:size])
  with pytest.raises(InputError, match='not a whole safetensors file') as e:
    reader.load_folder(str(path))
  assert str(shard) in str(e.value) and 'again' in str(e.value)


def test_incomplete_folders(tmp_path):
  def refused(path):
    with pytest.raises(InputError) as e:
      reader.load_folder(str(path))
    assert '\n' not in str(e.value)
    return str(e.value)

  assert 'no such folder' in refused(tmp_path / 'absent')
  empty = tmp_path / 'empty'
  empty.mkdir()
  assert 'no *.safetensors here' in refused(empty)
  (empty / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n(S"exit 1"\ntR.')
  assert 'pickled weights are never opened' in refused(empty)

  path, _ = folder_of(tmp_path / 'x')
  first, second, *_ = sorted(path.glob('*.safetensors'))
  kept = second.read_bytes()
  second.unlink()
  assert 'the index names this shard but it is missing' in refused(path) and second.name in refused(path)
  second.write_bytes(first.read_bytes())
  assert 'the index promises' in refused(path)
  second.write_bytes(kept)
  (path / 'model.safetensors.index.json').rename(path / 'kept')
  assert 'download the index' in refused(path)
  (path / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
  assert 'points out of the folder' in refused(path)
  (path / 'kept').rename(path / 'model.safetensors.index.json')
  (path / 'config.json').unlink()
  assert 'config.json: no such file' in refused(path)
