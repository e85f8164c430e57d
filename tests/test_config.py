"""Schema, config files and overrides: what a wrong key looks like to the person who typed it."""
import dataclasses
import re
from typing import Literal

import pytest

from data_pipelines.errors import InputError
from keye_jax.config import MeshConfig, RunConfig, freeze, to_dict
from keye_jax.nn import counts
from launch.run_config import load


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 1.0
  axes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner = Inner()
  steps: int = 3
  on: bool = False
  name: str = 'x'
  kind: Literal['a', 'b'] = 'a'


def changed(**values):
  """to_dict(Outer()) with dotted keys replaced or added, or removed where the value is None."""
  tree = to_dict(Outer()).to_dict()
  for key, value in values.items():
    *above, last = key.split('.')
    group = tree
    for name in above:
      group = group[name]
    if value is None:
      del group[last]
    else:
      group[last] = value
  return tree


def test_freeze_and_to_dict_are_inverses():
  for config in (Outer(), RunConfig(), load('configs/sft.py:tiny')):
    frozen = freeze(type(config), to_dict(config))
    assert frozen == config and hash(frozen) == hash(config)
    assert to_dict(frozen) == to_dict(config)


@pytest.mark.parametrize('values, message', [
    ({'inner.raet': 1.0}, "inner: unknown key 'raet'; did you mean 'rate'?"),
    ({'zzz': 1}, "config: unknown key 'zzz'; known keys: inner, kind, name, on, steps"),
    ({'inner.rate': None}, "inner: missing keys ['rate']"),
    ({'steps': 1.5}, 'steps: expected int, got 1.5'),
    ({'steps': True}, 'steps: expected int, got True'),
    ({'on': 1}, 'on: expected bool, got 1'),
    ({'inner.rate': '1'}, "inner.rate: expected float, got '1'"),
    ({'inner.rate': True}, 'inner.rate: expected float, got True'),
    ({'inner.axes': 3}, 'inner.axes: expected a tuple, got 3'),
    ({'inner.axes': 'ab'}, "inner.axes: expected a tuple, got 'ab'"),
    ({'inner.axes': [1, 'b']}, "inner.axes[1]: expected int, got 'b'"),
    ({'inner': 3}, 'inner: expected a group of keys, got 3'),
    ({'kind': 'c'}, "kind: 'c' is not one of 'a', 'b'"),
])
def test_freeze_names_what_is_wrong(values, message):
  with pytest.raises(InputError, match=f'^{re.escape(message)}$'):
    freeze(Outer, changed(**values))


def test_freeze_takes_what_json_and_the_command_line_give():
  assert freeze(Outer, changed(**{'inner.axes': [4], 'inner.rate': 2})) == Outer(inner=Inner(2.0, (4,)))


def test_overrides_reach_every_kind_of_key():
  config = load('configs/sft.py:tiny', ['--config.optimizer.learning_rate=1', '--config.data.pack=false',
                                        '--config.train.freeze=(\'vision\', \'embed\')', '--config.train.steps=7',
                                        '--config.model.attention=dense', '--config.data.path=a=b.jsonl'])
  assert config.optimizer.learning_rate == 1.0 and config.data.pack is False and config.train.steps == 7
  assert config.train.freeze == ('vision', 'embed')
  assert config.model.attention == 'dense' and config.data.path == 'a=b.jsonl'
  base = load('configs/sft.py:tiny')
  assert dataclasses.replace(config, model=base.model, optimizer=base.optimizer, data=base.data,
                             train=base.train) == base
  assert load('configs/sft.py:tiny', ['--config.train.freeze=vision']).train.freeze == ('vision',)


@pytest.mark.parametrize('override, message', [
    ('--config.optimizer.learningrate=1', 'no such key; did you mean --config.optimizer.learning_rate?'),
    ('--config.modle.text.layers=1', 'no such key; did you mean --config.model.text.layers?'),
    ('--config.steps=1', 'no such key; did you mean --config.train.steps?'),
    ('--config.qqqq.zzzz=1', '--config.qqqq.zzzz: no such key'),
    ('--config.train=1', '--config.train: no such key'),
    ('--config.train.steps=many', "--config.train.steps=many: invalid literal for int() with base 10: 'many'"),
    ('--config.data.pack=maybe', 'data.pack'),
    ('--config.model.attention=spares', "model.attention: 'spares' is not one of 'dense', 'warmup', 'sparse'"),
])
def test_a_wrong_override_gives_one_line(override, message):
  with pytest.raises(InputError) as caught:
    load('configs/sft.py:tiny', [override])
  assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('overrides, message', [
    (['model.text.indexer.heads=0'], "model.attention = 'sparse' needs an indexer"),
    (['model.text.kv_heads=3'], 'model.text.heads = 4 is no multiple of kv_heads = 3'),
    (['model.text.kv_heads=0'], 'is no multiple of kv_heads = 0'),
    (['model.text.experts_per_token=5'], 'experts_per_token = 5 must be 1 to experts = 4'),
    (['model.text.indexer.head_dim=6'], 'does not scale to whole numbers for indexer.head_dim = 6'),
    (['model.text.mrope_section=(2, 3, 4)'], '(2, 3, 4) must sum to half of head_dim = 16'),
    (['model.vision.heads=3'], 'model.vision.embed = 32 is no multiple of heads = 3'),
    (["data.sources=({'name': 'a', 'path': 'a', 'weight': 1.0}, {'name': 'a', 'path': 'b', 'weight': 1.0})"],
     "data.sources: the names ['a', 'a'] must be different and not empty"),
    (["data.sources=({'name': 'a', 'path': 'a', 'weight': 0.0},)"], "'a' has weight 0.0; it must be above 0"),
    (["data.sources=({'name': 'a', 'path': 'a', 'wight': 1.0},)"], "data.sources[0]: unknown key 'wight'"),
    (['train.accumulate=3'], 'train.batch = 8 rows cannot be cut into train.accumulate = 3 micro-batches'),
    (['model.contrast=True', 'data.samples=2'],
     'model.contrast needs a vision tower, and a text tower without experts and indexer'),
    (['train.accumulate=0'], 'train.accumulate = 0 must be at least 1'),
    (['train.heldout=x'], "train.heldout = 'x' and train.eval_every = 0 need each other"),
    (['train.patience=2'], 'train.patience = 2 needs train.heldout'),
    (['lora.rank=0'], 'lora.rank = 0 must be at least 1; lora.targets = () is without adapters'),
    (['lora.alpha=0'], 'lora.alpha = 0.0 must be above 0'),
    (['lora.base=int8'], "lora.base = 'int8' is for adapters, which lora.targets = () is without"),
    (['train.save_every=0'], 'train.save_every = 0 must be at least 1'),
])
def test_keys_that_contradict_each_other_are_named(overrides, message):
  with pytest.raises(InputError) as caught:
    load('configs/sft.py:tiny', [f'--config.{o}' for o in overrides])
  assert message in str(caught.value)


def test_a_wrong_file_gives_one_line(tmp_path):
  def fails(text, config):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(InputError) as caught:
      load(config)
    assert '\n' not in str(caught.value)
    return str(caught.value)
  c = str(tmp_path / 'c.py')
  assert fails('', str(tmp_path / 'nothing.py')) == f'{tmp_path}/nothing.py: no such config file'
  assert fails('x = = 1', c) == f'{c}:1: invalid syntax'
  assert 'has no function get_config' in fails('x = 1', c)
  (tmp_path / 'c.yaml').write_text('a: 1')
  assert 'a config file is Python' in fails('', str(tmp_path / 'c.yaml'))
  assert "no variant 'big'" in fails('', 'configs/sft.py:big')
  assert "no variant ''" in fails('', 'configs/sft.py')
  old = ('from keye_jax.config import *\ndef get_config(v):\n'
         '  d = to_dict(RunConfig())\n  d.train.epochs = 3\n  return d')
  assert fails(old, c).endswith("train: unknown key 'epochs'; known keys: accumulate, balance_rows, balance_weight, "
                                'batch, eval_every, freeze, heldout, indexer_weight, init, keep, log_every, '
                                'max_bad_steps, objective, patience, save_every, seed, spike_factor, steps')


def test_the_configs_describe_what_they_say():
  assert counts.describe(load('configs/sft.py:30b').model)['parameters'] == 31_122_082_160
  tiny = load('configs/sft.py:tiny')
  assert counts.describe(tiny.model)['parameters'] < 500_000
  assert tiny.data.vision_patches % tiny.model.vision.merge ** 2 == 0
  full = load('configs/sft.py:30b')
  assert full.data.vision_rows * full.data.vision_patches // 4 >= full.data.video_tokens
  assert full.train.batch % (full.mesh.data * full.mesh.expert) == 0
  assert [load(f'configs/sft.py:{size},lora,int8').lora.base for size in ('tiny', '30b')] == ['int8', 'int8']
  one = load('configs/sft.py:30b,lora')
  assert one.mesh == MeshConfig() and one.data.vision_patches // 4 >= max(one.data.video_tokens,
                                                                          one.data.image_tokens_max)
