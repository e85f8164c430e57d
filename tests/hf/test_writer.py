import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest
from safetensors import safe_open

from data_pipelines import tokenizer as tokenizer_lib
from data_pipelines.errors import InputError
from keye_jax.hf import names, reader, writer
from keye_jax.hf.card import Card
from tests.hf.models import DATA, FORMATS, MODELS, random_params, tiny_tokenizer
from tests.hf.test_reader import assert_same

FILES = {'config.json', 'generation_config.json', 'model.safetensors.index.json', 'tokenizer.json',
         'tokenizer_config.json', 'chat_template.jinja', 'README.md'}
VISION_FILES = {'preprocessor_config.json', 'video_preprocessor_config.json', 'processor_config.json'}


def export(folder, model='keye', **kwargs):
  cfg, fmt = MODELS[model], FORMATS[model]
  params = kwargs.pop('params', None) or random_params(cfg, fmt)
  args = dict(data=DATA, dtype='float32', shard_bytes=20_000) | kwargs
  writer.export(str(folder), cfg, params, tiny_tokenizer(), fmt, **args)
  return params


@pytest.mark.parametrize('model', MODELS)
def test_folder_is_complete_and_loads_exactly(tmp_path, model):
  params = export(tmp_path / 'x', model)
  files = {p.name for p in (tmp_path / 'x').iterdir()}
  assert FILES <= files and (VISION_FILES <= files) == bool(MODELS[model].vision.layers)
  assert os.listdir(tmp_path) == ['x']
  got = reader.load_folder(str(tmp_path / 'x'))
  assert (got.config, got.format) == (MODELS[model], FORMATS[model])
  assert_same(got.params, params)


def test_jax_arrays_and_bfloat16(tmp_path):
  params = random_params(MODELS['qwen3'], 'qwen3')
  export(tmp_path / 'x', 'qwen3', params=jax.tree.map(jax.numpy.asarray, params), dtype='bfloat16')
  got = reader.load_folder(str(tmp_path / 'x')).params
  expected = jax.tree.map(lambda a: a.astype(jax.numpy.bfloat16).astype(np.float32), params)
  assert_same(got, expected)
  assert json.loads((tmp_path / 'x' / 'config.json').read_text())['torch_dtype'] == 'bfloat16'


def test_shards_and_index(tmp_path):
  export(tmp_path / 'x')
  index = json.loads((tmp_path / 'x' / 'model.safetensors.index.json').read_text())
  table = {t.name: t for t in names.table(MODELS['keye'], 'keye')}
  assert index['weight_map'].keys() == table.keys()
  assert index['metadata']['total_size'] == sum(4 * int(np.prod(t.shape)) for t in table.values())
  shards = sorted(set(index['weight_map'].values()))
  assert shards == [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))] and len(shards) > 3
  for shard in shards:
    with safe_open(tmp_path / 'x' / shard, 'np') as f:
      assert f.metadata() == {'format': 'pt'}
      sizes = [4 * int(np.prod(table[name].shape)) for name in f.keys()]
      assert sum(sizes) <= 20_000 or len(sizes) == 1


def test_special_tokens_and_template(tmp_path):
  export(tmp_path / 'x')
  raw = json.loads((tmp_path / 'x' / 'config.json').read_text())
  tokenizer = tokenizer_lib.load(tmp_path / 'x')
  assert raw['video_token_id'] == tokenizer.id('<|video_pad|>')
  assert raw['image_token_id'] == tokenizer.id('<|image_pad|>')
  generation = json.loads((tmp_path / 'x' / 'generation_config.json').read_text())
  assert generation['eos_token_id'] == [tokenizer.id('<|im_end|>'), tokenizer.id('<|endoftext|>')]
  assert tokenizer.encode('the 7 appears') == tiny_tokenizer().encode('the 7 appears')
  assert 'im_start' in (tmp_path / 'x' / 'chat_template.jinja').read_text()


def test_card(tmp_path):
  export(tmp_path / 'x',
         card=Card('Tiny', 'Trained on FrameForge.', {'digit reading': 0.875}, '500 clips', 'apache-2.0'))
  text = (tmp_path / 'x' / 'README.md').read_text()
  for part in ('license: apache-2.0', '# Tiny', 'Trained on FrameForge.', '| digit reading | 0.875 |', '500 clips',
               'load_pretrained', 'top 8 keys'):
    assert part in text
  export(tmp_path / 'y')
  text = (tmp_path / 'y' / 'README.md').read_text()
  assert 'license: unknown' in text and 'must set `license:`' in text and 'None was given at export.' in text


def refused(folder, **kwargs) -> str:
  with pytest.raises(InputError) as e:
    export(folder, **kwargs)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
  params = random_params(MODELS['keye'], 'keye')
  params['norm'] = params['norm'][:3]
  assert "'norm' has shape (3,)" in refused(tmp_path / 'x', params=params)
  del params['norm']
  assert "'norm' is not in the parameters" in refused(tmp_path / 'x', params=params)
  params = random_params(MODELS['keye'], 'keye') | {'extra': np.zeros(2)}
  assert "'extra' has no place" in refused(tmp_path / 'x', params=params)
  assert "dtype 'float8'" in refused(tmp_path / 'x', dtype='float8')
  assert 'media limits' in refused(tmp_path / 'x', data=None)
  cfg = dataclasses.replace(MODELS['qwen3'], text=dataclasses.replace(MODELS['qwen3'].text, vocab=100))
  with pytest.raises(InputError, match='320 tokens do not fit'):
    writer.export(str(tmp_path / 'x'), cfg, random_params(cfg, 'qwen3'), tiny_tokenizer(), 'qwen3')
  with pytest.raises(InputError, match='cannot hold this model'):
    writer.export(str(tmp_path / 'x'), MODELS['keye'], random_params(MODELS['keye'], 'keye'), tiny_tokenizer(),
                  'qwen3_moe', DATA)
  assert os.listdir(tmp_path) == []
  (tmp_path / 'x').mkdir()
  assert 'already exists' in refused(tmp_path / 'x')


@contextlib.contextmanager
def largest_file(size):
  """The kernel refuses to let any file grow beyond `size` bytes, as it does when a disk is full."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize('size', [1000, 30_000])     # in config.json; in a shard
def test_full_disk_leaves_nothing(tmp_path, size):
  params = random_params(MODELS['keye'], 'keye')
  with largest_file(size):
    message = refused(tmp_path / 'x', params=params, shard_bytes=10**9)
  assert 'could not be written' in message and str(tmp_path / 'x') in message
  assert os.listdir(tmp_path) == []


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
  monkeypatch.setattr(writer.shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=10))
  assert 'GB are free' in refused(tmp_path / 'x')
  assert os.listdir(tmp_path) == []


def test_killed_export_is_not_taken_for_a_whole_one(tmp_path):
  """kill -9 after the first shard."""
  code = textwrap.dedent('''
      import os, signal, sys
      from keye_jax.hf import writer
      from tests.hf.test_writer import export
      save = writer.save_file
      def save_one(*args):
        save(*args)
        os.kill(os.getpid(), signal.SIGKILL)
      writer.save_file = save_one
      export(sys.argv[1])
  ''')
  child = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'x')], timeout=120)
  assert child.returncode == -signal.SIGKILL
  (left,) = os.listdir(tmp_path)
  assert left.startswith('.x.part-') and any(f.endswith('.safetensors') for f in os.listdir(tmp_path / left))
  with pytest.raises(InputError):
    reader.load_folder(str(tmp_path / 'x'))
  with pytest.raises(InputError):
    reader.load_folder(str(tmp_path / left))
  export(tmp_path / 'x')     # the leftovers are in nobody's way
  assert reader.load_folder(str(tmp_path / 'x')).config == MODELS['keye']
