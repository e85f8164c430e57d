"""describe, import, export and generate, run as the command line runs them."""
import argparse
import json
import os

import numpy as np
import pytest

from data_pipelines.errors import InputError
from keye_jax import api
from keye_jax.hf import reader, writer
from launch import describe, export, generate, import_
from tests.hf.models import DATA, FORMATS, MODELS, random_params, tiny_tokenizer
from tests.hf.test_names import published

PUBLISHED = 'configs/keye_vl_2_30b_a3b.py'


def command(module, *words: str, overrides=()) -> int:
  parser = argparse.ArgumentParser()
  module.add_arguments(parser)
  return module.run(parser.parse_args(words), list(overrides))


@pytest.fixture
def folder(tmp_path):
  def make(model='keye'):
    cfg, path = MODELS[model], tmp_path / model
    writer.export(str(path), cfg, random_params(cfg, FORMATS[model]), tiny_tokenizer(), FORMATS[model], DATA, 'float32')
    return str(path)
  return make


def test_describe_published_model(capsys):
  assert command(describe, '--config', PUBLISHED, '--json') == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts['parameters'] == 31_122_082_160
  assert facts['parameters_by_part'] == {'language': 30_532_122_624, 'indexers': 108_536_832, 'vision': 450_735_984,
                                         'projector': 30_686_720}
  # facts of the checkpoint: about 3.04 B matrix parameters a token with the head, and 0.11 B of the indexers
  active = facts['active_by_part']
  assert round((active['layers'] + active['head']) / 1e9, 2) == 3.04 and round(active['indexers'] / 1e9, 2) == 0.11
  assert facts['active_parameters'] == sum(active.values())
  assert facts['cache_bytes_per_token']['kv'] == 96 * 1024         # 48 layers x 4 heads x 128 x 2 x bfloat16
  assert {'attention', 'indexer_scores', 'layers', 'head', 'vision'} <= facts['flops_per_token'].keys()
  assert command(describe, '--config', PUBLISHED) == 0
  assert '31,122,082,160' in capsys.readouterr().out


def test_describe_names_of_the_published_checkpoint(capsys):
  assert command(describe, '--config', PUBLISHED, '--names') == 0
  lines = dict(line.split('\t') for line in capsys.readouterr().out.splitlines())
  assert {name: tuple(map(int, shape.split(','))) for name, shape in lines.items()} == published()
  assert command(describe, '--config', PUBLISHED, '--names', '--json', overrides=[
      '--config.model.text.layers=1', '--config.model.vision.layers=0']) == 0
  assert len(json.loads(capsys.readouterr().out)) == 3 + 16


@pytest.mark.parametrize('model', MODELS)
def test_import_then_export_is_exact(folder, tmp_path, capsys, model):
  source, run, out = folder(model), str(tmp_path / 'run'), str(tmp_path / 'out')
  assert command(import_, source, '--json') == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts['format'] == FORMATS[model]
  params = writer.flatten(random_params(MODELS[model], FORMATS[model]))
  assert facts['parameters'] == sum(x.size for x in params.values())
  assert command(import_, source, '--out', run) == 0
  assert command(export, '--model', run, '--out', out, '--dtype', 'float32', '--title', 'Back again') == 0
  first, second = (reader.load_folder(path) for path in (source, out))
  assert (first.config, first.format, first.data) == (second.config, second.format, second.data)
  for path, value in writer.flatten(first.params).items():
    np.testing.assert_array_equal(writer.flatten(second.params)[path], value, err_msg=path)
  assert '# Back again' in (tmp_path / 'out' / 'README.md').read_text()


def test_export_options(folder, tmp_path, capsys):
  scores = tmp_path / 'scores.json'
  scores.write_text('{"digit reading": 0.9}')
  words = ['--model', folder(), '--out', str(tmp_path / 'out'), '--shard-bytes', '20000', '--scores', str(scores),
           '--json']
  assert command(export, *words) == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts['format'] == 'keye' and facts['dtype'] == 'bfloat16' and 'model-00002-of-' in ' '.join(facts['files'])
  assert '| digit reading | 0.9 |' in (tmp_path / 'out' / 'README.md').read_text()
  with pytest.raises(InputError, match='already exists'):
    command(export, *words)
  scores.write_text('{"digit reading": "good"}')
  with pytest.raises(InputError, match="'digit reading' is not a number"):
    command(export, '--model', folder('qwen3'), '--out', str(tmp_path / 'other'), '--scores', str(scores))
  with pytest.raises(InputError, match='cannot hold this model'):
    command(export, '--model', str(tmp_path / 'out'), '--out', str(tmp_path / 'other'), '--format', 'llama')
  assert sorted(os.listdir(tmp_path)) == ['keye', 'out', 'qwen3', 'scores.json']


def test_import_refuses(folder, tmp_path):
  source = folder('qwen3')
  (shard,) = (tmp_path / 'qwen3').glob('*.safetensors')
  with pytest.raises(InputError, match='already exists'):
    command(import_, source, '--out', str(tmp_path))
  shard.write_bytes(shard.read_bytes()[:-8])
  with pytest.raises(InputError, match='not a whole safetensors file'):
    command(import_, source, '--out', str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_generate_streams_what_the_api_answers(folder, capsys):
  source = folder('qwen3')
  words = ['--model', source, '--prompt', 'when?', '--max-tokens', '5', '--temperature', '1.2', '--seed', '3']
  assert command(generate, *words) == 0
  streamed = capsys.readouterr().out
  model, params = api.load_pretrained(source)
  answer = api.generate(model, params, [{'role': 'user', 'content': 'when?'}], max_tokens=5, temperature=1.2, seed=3)
  assert streamed == answer + '\n'
  assert command(generate, *words, '--json') == 0
  assert json.loads(capsys.readouterr().out)['text'] == answer
  with pytest.raises(InputError, match='takes no'):
    command(generate, *words, overrides=['--config.x=1'])
