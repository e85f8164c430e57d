"""Runs that train adapters of a base: what is trained and kept, going on, and what the result is."""
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from keye_jax import adapters, api, begin, checkpoint, loop, run_folder
from keye_jax.config import LoraConfig
from keye_jax.hf import reader, writer
from keye_jax.nn import head, keye, lora
from keye_jax.steps import state as state_lib
from launch import export
from tests import compiling, tiny_run
from tests.launch.test_hf_commands import command
from tests.parity.fixtures import text_batch
from tests.test_loop import losses, stop_when
from tests.tolerances import LOSS, assert_close

ROOT = pathlib.Path(__file__).parent.parent
TOKEN_BT = np.random.default_rng(0).integers(0, 250, (2, 20))


def config_of(data, base, targets=('layers/attn/*', 'layers/mlp/*'), kept='float', **train):
  """Adapters of rank 2 beside a small dense base: 12 steps, unless told otherwise. Experts and sparse attention with
  adapters are the business of tests/nn."""
  config = tiny_run.config(data, init=str(base), **train)
  return dataclasses.replace(config, lora=LoraConfig(targets=targets, rank=2, alpha=4.0, base=kept),
                             optimizer=dataclasses.replace(config.optimizer, learning_rate=2e-2))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return tiny_run.dataset(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def base(data, tmp_path_factory):
  """A trained run to adapt."""
  out = tmp_path_factory.mktemp('base')
  loop.train(tiny_run.config(data), out)
  return out


@pytest.fixture(scope='module')
def finished(data, base, tmp_path_factory):
  """12 steps of adapters beside it: (folder, result)."""
  out = tmp_path_factory.mktemp('finished')
  return out, loop.train(config_of(data, base), out)


def logits(config, params):
  out = jax.jit(keye.apply, static_argnums=0)(config, params, text_batch(TOKEN_BT))
  return np.asarray(head.logits(out.hidden_BTD, out.head_DV))


def parts(run):
  """(base, adapters) of a run as numpy, flat."""
  config = run_folder.read_config(run)
  read = lambda params: {k: np.asarray(v) for k, v in writer.flatten(params).items()}
  return (read(api.load_pretrained(config.train.init)[1]), read(adapters.trained(run, config, config.model).params))


def test_only_adapters_have_gradients_optimizer_state_and_a_place_in_the_checkpoint(finished, base, data):
  config = config_of(data, base)
  state = jax.eval_shape(begin.programs(config).fresh, jax.random.key(0))
  pairs = {'q', 'k', 'v', 'o', 'gate_up', 'down'}
  assert {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(state.train)} == {f'{p}_lora' for p in pairs}
  sizes = lambda tree: sorted(x.size for x in jax.tree.leaves(tree))
  moments = [x for x in jax.tree.leaves(state.opt) if x.ndim]
  assert sizes(moments) == sorted(2 * sizes(state.train))           # AdamW has two, and the rest are counters
  assert sum(sizes(state.frozen)) == sum(sizes(keye.param_shapes(config.model)))
  saved = checkpoint._stored_shapes(finished[0] / 'checkpoints' / '12')
  assert {k.split('/')[0] for k in saved} == {'step', 'train', 'opt', 'rng'}
  assert {k for k in saved if k.startswith('train/')} == {f'train/{k}' for k in parts(finished[0])[1]}


@pytest.mark.slow
def test_the_step_neither_forms_merged_weights_nor_their_gradients(data, base):
  """Ahead of time at a size where weights outweigh activations. What a step of adapters needs beside its arguments is
  the slice of one layer's weights that the scan reads, and little else: neither a sum nor a gradient of that size. A
  step of the whole model holds several."""
  config = config_of(data, base)
  text = dataclasses.replace(config.model.text, layers=3, embed=256, ffn=256, experts=16, experts_per_token=2)
  model = dataclasses.replace(config.model, text=text, remat='block')
  layer = 3 * 256 * 256 * 16 * 4

  def temporaries(config):
    made = begin.programs(config)
    state = jax.eval_shape(made.fresh, jax.random.key(0))
    step = jax.jit(made.update, donate_argnums=0).lower(state, text_batch(np.zeros((1, 16), int)), made.rates(0), 1.0)
    return step.compile().memory_analysis().temp_size_in_bytes

  adapted = dataclasses.replace(config, model=model)
  assert temporaries(adapted) < 1.5 * layer < 4 * layer < temporaries(dataclasses.replace(adapted, lora=LoraConfig()))


def test_it_begins_as_the_base_and_learns(finished, base, data):
  config = config_of(data, base)
  made = begin.programs(config)
  state = begin.first_state(config, made, lambda line: None)
  params = state_lib.merge(state.train, state.frozen)
  model, plain = api.load_pretrained(base)
  assert_close(logits(config.model, lora.scaled(config.lora, params)), logits(config.model, plain))
  assert not any(x.any() for path, x in writer.flatten(state.train).items() if path.endswith('/b'))
  seen = losses(finished[0])
  assert seen[12][0] < 0.9 * seen[2][0]
  before, after = writer.flatten(plain), parts(finished[0])[0]
  for path, value in before.items():
    np.testing.assert_array_equal(after[path], value, err_msg=path)          # the base is as it was


def test_a_loaded_run_is_base_and_adapters_merged(finished, base, data):
  config = config_of(data, base)
  own = adapters.trained(finished[0], config, config.model).params
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(own))
  applied = lora.scaled(config.lora, state_lib.merge(own, api.load_pretrained(base)[1]))
  model, params = api.load_pretrained(finished[0])
  assert jax.tree.structure(params) == jax.tree.structure(keye.param_shapes(model.config))
  assert_close(logits(config.model, params), logits(config.model, applied))
  assert np.abs(logits(config.model, params) - logits(config.model, api.load_pretrained(base)[1])).max() > 0.05


def test_export_is_the_merged_model_or_the_adapters(finished, base, tmp_path):
  assert command(export, '--model', str(finished[0]), '--out', str(tmp_path / 'hf'), '--dtype', 'float32') == 0
  found = writer.flatten(reader.load_folder(str(tmp_path / 'hf')).params)
  for path, value in writer.flatten(api.load_pretrained(finished[0])[1]).items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)
  assert command(export, '--model', str(finished[0]), '--out', str(tmp_path / 'peft'), '--adapter') == 0
  assert sorted(os.listdir(tmp_path / 'peft')) == ['adapter_config.json', 'adapter_model.safetensors']
  said = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
  assert (said['r'], said['lora_alpha'], said['base_model_name_or_path']) == (2, 4.0, str(base))
  with pytest.raises(InputError, match='was trained without adapters; leave out --adapter'):
    command(export, '--model', str(base), '--out', str(tmp_path / 'x'), '--adapter')


def test_going_on_is_exact_and_parts_of_a_batch_are_the_whole(finished, base, data, tmp_path):
  out = tmp_path / 'out'
  shutil.copytree(finished[0], out)
  shutil.rmtree(out / 'checkpoints' / '12')
  assert loop.train(config_of(data, base), out).step == 12
  assert losses(out) == losses(finished[0])
  for (path, a), b in zip(parts(out)[1].items(), parts(finished[0])[1].values()):
    np.testing.assert_array_equal(a, b, err_msg=path)
  loop.train(config_of(data, base, accumulate=2), tmp_path / 'cut')
  for step, (loss, _, _) in losses(finished[0]).items():
    assert losses(tmp_path / 'cut')[step][0] == pytest.approx(loss, abs=LOSS)


@pytest.fixture(scope='module')
def in_8_bits(data, base, tmp_path_factory):
  """12 steps of adapters beside the same base in 8 bits."""
  out = tmp_path_factory.mktemp('eight')
  loop.train(config_of(data, base, kept='int8'), out)
  return out


def test_a_base_in_8_bits_trains_as_the_float_one_and_goes_on_exactly(finished, in_8_bits, base, data, tmp_path):
  for step, (loss, _, _) in losses(finished[0]).items():
    assert losses(in_8_bits)[step][0] == pytest.approx(loss, rel=1e-2)
  assert losses(in_8_bits) != losses(finished[0])
  out = tmp_path / 'out'
  shutil.copytree(in_8_bits, out)
  shutil.rmtree(out / 'checkpoints' / '12')
  assert loop.train(config_of(data, base, kept='int8'), out).step == 12
  assert losses(out) == losses(in_8_bits)
  own = [parts(run)[1] for run in (out, in_8_bits)]
  for path, a in own[0].items():
    np.testing.assert_array_equal(a, own[1][path], err_msg=path)
  saved = checkpoint._stored_shapes(out / 'checkpoints' / '12')
  assert {k.split('/')[0] for k in saved} == {'step', 'train', 'opt', 'rng'} and not any('int8' in k for k in saved)
  assert "lora.base was 'int8', now 'float'" in refused(loop.train, config_of(data, base), out)


def test_of_a_base_in_8_bits_the_loaded_and_exported_model_is_what_was_trained(in_8_bits, base, data, tmp_path):
  """Also from a Hugging Face folder, read a layer at a time; the adapters alone are exported as ever."""
  config = config_of(data, base, kept='int8')
  own = adapters.trained(in_8_bits, config, config.model).params
  state = begin.first_state(config, begin.programs(config), lambda line: None)
  assert state.frozen['layers']['mlp']['down'].dtype == np.int8
  model, params = api.load_pretrained(in_8_bits)
  trained = logits(config.model, lora.scaled(config.lora, state_lib.merge(own, state.frozen)))
  assert_close(logits(config.model, params), trained)
  assert command(export, '--model', str(in_8_bits), '--out', str(tmp_path / 'hf'), '--dtype', 'float32') == 0
  found = writer.flatten(reader.load_folder(str(tmp_path / 'hf')).params)
  for path, value in writer.flatten(params).items():
    np.testing.assert_array_equal(found[path], value, err_msg=path)
  assert command(export, '--model', str(in_8_bits), '--out', str(tmp_path / 'peft'), '--adapter') == 0
  assert sorted(os.listdir(tmp_path / 'peft')) == ['adapter_config.json', 'adapter_model.safetensors']
  assert command(export, '--model', str(base), '--out', str(tmp_path / 'base'), '--dtype', 'float32') == 0
  folder = config_of(data, tmp_path / 'base', kept='int8')
  again = begin.first_state(folder, begin.programs(folder), lambda line: None)
  for (path, a), b in zip(writer.flatten(again.frozen).items(), writer.flatten(state.frozen).values(), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=path)


def test_the_best_step_is_a_model_too(base, data, tmp_path):
  other = tiny_run.dataset(tmp_path / 'held', rows=8, seed=5)
  rows = [line for line in other.read_text().splitlines() if line != '{"id": ']
  held = data.parent / 'held.jsonl'
  held.write_text('\n'.join(rows) + '\n')
  loop.train(config_of(data, base, steps=4, heldout='held.jsonl', eval_every=2), tmp_path / 'run')
  model, params = api.load_pretrained(tmp_path / 'run' / 'best')
  assert np.isfinite(logits(model.config, params)).all()


def refused(call, *args) -> str:
  with pytest.raises(InputError) as e:
    call(*args)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_another_base_is_refused_and_a_moved_one_is_found(finished, base, data, tmp_path):
  out, moved = tmp_path / 'out', tmp_path / 'moved'
  shutil.copytree(finished[0], out)
  shutil.copytree(base, moved)
  change = lambda init: run_folder.write_config(out, config_of(data, init))
  change(moved)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *(api.load_pretrained(run)[1]
                                                                        for run in (out, finished[0]))))
  assert loop.train(config_of(data, moved, steps=13), out).step == 13
  loop.train(tiny_run.config(data, steps=14), moved)
  for said in (refused(api.load_pretrained, out), refused(loop.train, config_of(data, moved, steps=14), out)):
    assert 'its adapters belong to another base' in said and str(moved) in said
  shutil.rmtree(moved)
  change(moved)
  assert f'the base of its adapters is not at {moved}; bring it back' in refused(api.load_pretrained, out)
  change(base)
  assert jax.tree.structure(api.load_pretrained(out)[1]) == jax.tree.structure(api.load_pretrained(base)[1])


def test_what_cannot_be_adapted_gives_one_line(base, data, tmp_path):
  without = dataclasses.replace(config_of(data, base), train=dataclasses.replace(config_of(data, base).train, init=''))
  assert 'there is no model to adapt; set train.init' in refused(loop.train, without, tmp_path / 'a')
  assert "lora.targets: 'embed' matches no weight" in refused(loop.train, config_of(data, base, ('embed',)),
                                                             tmp_path / 'b')
  assert 'no model is there' in refused(loop.train, config_of(data, tmp_path / 'absent'), tmp_path / 'c')
  assert 'has no indexer, and beside adapters a new one would stay random' in refused(
      loop.train, tiny_run.with_indexer(config_of(data, base)), tmp_path / 'd')


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_losses(finished, base, data, tmp_path):
  file, out = tmp_path / 'tiny.py', tmp_path / 'out'
  file.write_text('from keye_jax.config import to_dict\nfrom tests import test_adapters\ndef get_config(variant=""):\n'
                  f'  return to_dict(test_adapters.config_of({str(data)!r}, {str(base)!r}))\n')
  argv = [sys.executable, '-m', 'launch.cli', 'train', '--config', str(file), '--out', str(out), '--json']
  env = compiling.environment()
  code, _ = stop_when(argv, env, lambda: checkpoint.whole(out / 'checkpoints'), signal.SIGKILL)
  assert code == -signal.SIGKILL
  done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0 and 'going on from step 5' in done.stderr, done.stderr
  assert losses(out) == losses(finished[0])
