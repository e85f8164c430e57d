"""`keye plan`: arguments, refusals, seconds and advice, and a small run compiled for TPUs that are not here."""
import dataclasses
import json

import jax
import pytest

from data_pipelines.errors import InputError
from keye_jax import jaxpr_costs, planning
from keye_jax.chips import CHIPS
from keye_jax.jaxpr_costs import Cost
from launch import cli, plan, plan_advice, scale_page
from launch.run_config import load
from pallas_kernels import dispatch
from pallas_kernels.aot import rows

WORDS = ['plan', '--config', 'configs/sft.py:tiny', '--topology', 'v5p:2x2x1',
         # the kernels take rows of lanes: heads of 128, an indexer of 64
         '--config.model.text.head_dim=128', '--config.model.text.mrope_section=(16,24,24)',
         '--config.model.text.indexer.head_dim=64', '--config.model.experts_transport=ring',
         '--config.data.tokens=1024', '--config.data.vision_rows=0', '--config.mesh.context=2',
         '--config.mesh.expert=2', '--config.model.dtype=bfloat16', '--config.model.remat=block',
         '--config.train.accumulate=2']


@pytest.mark.parametrize('words, message', [
    (['--topology', 'v9:2x2'], "--topology v9:2x2: no figures for 'v9'; there are v5p, v6e, tpu7x, "
     'h100'),
    (['--efficiency', '0'], '--efficiency 0.0 must be above 0 and at most 1'),
])
def test_bad_input_is_one_line(capsys, words, message):
  assert cli.main([*WORDS, *words]) == 2
  assert capsys.readouterr().err == f'keye plan: {message}\n'


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
  monkeypatch.setattr(plan, 'installed', lambda target: target != 'h100')
  assert cli.main([*WORDS, '--topology', 'h100:4']) == 2
  assert capsys.readouterr().err == "keye plan: the compiler for h100 is missing: pip install 'keye_jax[aot]'\n"


def test_an_op_that_would_not_run_so_is_refused(monkeypatch):
  monkeypatch.setattr(jaxpr_costs, 'implementations', lambda jaxpr, rules: {
      'dsa_attention_forward_kl': {('pallas', tuple(dict(G=4, N=512, T=64, S=64).items()))}})
  with pytest.raises(InputError, match="dsa_attention_forward_kl is compiled as pallas, but 'xla' is what runs"):
    planning.implementations(None, {})


def test_short_rows_on_a_gpu_are_not_for_its_kernels(monkeypatch):
  monkeypatch.setattr(dispatch, 'platform', lambda: 'gpu')
  dims = dict(G=4, N=8 * 4096, T=4096, K=128)
  assert planning.chosen('dsa_attention', S=4096, **dims) == 'xla'
  assert planning.chosen('dsa_attention', S=65536, **dims) == 'gpu'
  assert planning.chosen('dense_attention', T=2048, S=2048) == 'xla'
  assert planning.chosen('dense_attention', T=4096, S=4096) == 'gpu'
  assert planning.chosen('routed_swiglu', N=1, K=8) == 'xla'
  assert planning.chosen('routed_swiglu', N=64, K=8) == 'gpu'
  assert planning.chosen('adapted_swiglu', N=64, K=8) == 'gpu'


def test_the_warmup_of_any_config_is_the_step_of_its_indexers():
  config = load('configs/sft.py:tiny')
  other = dataclasses.replace(config, model=dataclasses.replace(config.model, attention='warmup'),
                              train=dataclasses.replace(config.train, freeze=('', '!layers/attn/indexer')))
  found, expected = planning.traced(config, 'warmup'), planning.traced(other, 'train')
  assert found.model_flops == expected.model_flops < planning.traced(config, 'train').model_flops
  assert {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(found.parts['parameters'][0])} == {'indexer'}
  assert 'indexer_warmup_backward' in planning.implementations(found.trace.jaxpr.jaxpr, found.rules)
  assert planning.described(config, 'warmup') == planning.described(config, 'train')
  text = dataclasses.replace(config.model.text, indexer=dataclasses.replace(config.model.text.indexer, heads=0))
  with pytest.raises(InputError, match="model.attention = 'warmup' needs an indexer; set model.text.indexer.heads"):
    planning.traced(dataclasses.replace(config, model=dataclasses.replace(config.model, text=text)), 'warmup')


def test_a_policy_step_needs_the_most_responses_of_a_row():
  config = load('configs/layouts.py:rl_v5p_4x4x8')
  assert config.data.samples == 16 and config.train.freeze == ('vision', 'projector')
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, samples=0))
  with pytest.raises(InputError, match='--what rl needs data.samples, the most responses in a row'):
    planning.traced(config, 'rl')


def test_advice_names_what_would_help():
  config = load('configs/layouts.py:stage3_v6e_16x16')
  found = {'what': 'train', 'mesh': {'data': 2, 'context': 32, 'expert': 4},
           'bytes': {'fits': False, 'parameters': 2 << 30, 'optimizer': 4 << 30, 'hbm': 32 << 30}}
  lines = ' '.join(plan_advice.advice(config, found))
  assert 'a smaller mesh.expert' in lines and 'a device now holds 8,192 tokens' in lines
  assert "model.remat = 'offload'" in lines and "model.remat = 'block'" not in lines and 'param_dtype' not in lines
  found['bytes'] |= {'optimizer': 40 << 30}
  assert 'take 42.0 of 32 GiB' in ' '.join(plan_advice.advice(config, found))
  found |= {'what': 'decode', 'bytes': {'fits': False, 'parameters': 2 << 30, 'cache': 35 << 30, 'hbm': 32 << 30}}
  lines = plan_advice.advice(config, found)
  assert 'parameters and caches alone take 37.0 of 32 GiB; a device holds 4 of the rows' in lines[0] and len(lines) == 2


def test_seconds_are_flops_over_peak_and_bytes_over_bandwidth():
  chip = CHIPS['v5p']
  cost = Cost(flops=3 * chip.flops, masked=chip.flops, bytes=chip.hbm_bandwidth, sent={'context': chip.ici_bandwidth})
  got = planning.roofline(cost, 2 * chip.flops, chip, 0.5, {'data': 2, 'context': 4})
  assert got['compute_s'] == 8 and got['compute_s_without_masked'] == 6
  assert got['hbm_s'] == 1 and got['ici_s'] == 3 and got['step_s'] == 8        # one of three dimensions
  assert got['model_flops_bound_s'] == 2
  about = {'config': 'c', 'topology': 't', 'device': 'd', 'what': 'train', 'mesh': {'data': 1}, 'layout': 'train',
           'batch': 'b', 'ops': {}, 'advice': ['more'],
           'largest': [{'bytes': 3 << 30, 'shape': 'f32[805306368]', 'op': 'jit(update)/dot_general'}],
           'bytes': {'fits': False, 'hbm': 1, 'compile seconds': 1}}
  said = plan.text(about | got)
  assert '       3.00 GiB  f32[805306368]  jit(update)/dot_general' in said
  assert 'compute_s      8.00' in said and 'DOES NOT FIT' in said and said.endswith('- more')


@pytest.mark.parametrize('mesh, over_the_network', [
    ((16, 1, 4), {'data'}), ((4, 4, 4), {'data', 'context'}), ((1, 16, 4), {'context'}), ((8, 2, 4), {'data'}),
    ((1, 2, 4), set()), ((1, 1, 16), {'expert'})])
def test_an_axis_that_leaves_a_host_goes_at_the_speed_of_the_network(mesh, over_the_network):
  chip, mesh = CHIPS['h100'], dict(zip(('data', 'context', 'expert'), mesh))
  assert planning.links(chip, mesh) == {a: 50e9 if a in over_the_network else 450e9 for a in mesh}
  cost = Cost(sent={'data': 50e9, 'expert': 450e9})
  assert planning.roofline(cost, 0, chip, 0.5, {'data': 2, 'context': 1, 'expert': 8})['ici_s'] == 2
  assert set(planning.links(CHIPS['v5p'], mesh).values()) == {200e9}


def test_tpus_and_gpus_have_a_table_each():
  tables = [scale_page.table({'topology': f'{chip}:8'}) for chip in CHIPS]
  assert tables == ['scale', 'scale', 'scale', 'scale_gpu']


@pytest.mark.slow
@pytest.mark.skipif(not rows.installed('v5p'), reason='needs libtpu, of the extra `aot`')
def test_a_small_run_is_planned(capfd):
  assert cli.main([*WORDS, '--json']) == 0
  found = json.loads(capfd.readouterr().out)
  size = found['bytes']
  assert found['device'] == 'TPU v5' and found['mesh'] == {'data': 1, 'context': 2, 'expert': 2}
  assert found['ops'] == {'dsa_attention_backward_kl': 'tpu', 'dsa_attention_forward_kl': 'tpu',
                          'indexer_recall': 'xla', 'routed_swiglu_backward': 'tpu', 'routed_swiglu_forward': 'tpu'}
  assert size['fits'] and size['temporaries'] > 0
  # a little more than the parts: step, key, and rows of lanes that are padded
  assert size['parameters'] + size['optimizer'] + size['batch'] < size['arguments'] < size['peak']
  assert found['step_s'] == max(found['compute_s'], found['hbm_s'], found['ici_s'])
  assert found['sent_bytes']['context'] > 0 and found['sent_bytes']['expert'] > 0
  assert 'text only' in found['batch']
  assert found['largest'][0]['bytes'] <= size['temporaries'] and '[' in found['largest'][0]['shape']


@pytest.mark.slow
@pytest.mark.skipif(not rows.installed('v5p'), reason='needs libtpu, of the extra `aot`')
def test_a_small_policy_step_is_planned(capfd):
  words = ['--what', 'rl', '--config.data.samples=4', "--config.train.freeze=('vision','projector')",
           '--config.model.text.layers=1']
  assert cli.main([*WORDS, *words, '--json']) == 0
  found = json.loads(capfd.readouterr().out)
  size = found['bytes']
  assert (found['what'], found['layout']) == ('rl', 'train') and 'in 2 micro-batches' in found['batch']
  assert set(found['ops']) == {'dsa_attention_backward_kl', 'dsa_attention_forward_kl', 'indexer_recall',
                               'routed_swiglu_backward', 'routed_swiglu_forward'}
  assert size['fits'] and size['temporaries'] > 0
  # of 8 rows of 1,024 tokens a device has half of the rows and half of their tokens: beside what a supervised step
  # reads log-probabilities and whose token, 4 bytes each, and of half of the rows the advantages
  shapes = planning.batch_shapes(load(WORDS[2], WORDS[5:]))
  supervised = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(shapes))
  assert size['batch'] == supervised / 4 + 2 * 4 * 4 * 512 + 4 * 4 * 4


@pytest.mark.slow
@pytest.mark.skipif(not rows.installed('h100'), reason='needs the CUDA plugin, of the extra `aot`')
def test_a_small_prefill_is_planned_for_gpus(capfd):
  """Rows of a length that the kernels are for; the newest token, for which the last layer answers, is one tile. Nothing
  is learnt."""
  words = ['--topology', 'h100:4', '--what', 'prefill', '--config.data.tokens=32768', '--config.model.text.layers=1']
  assert cli.main([*WORDS, *words, '--json']) == 0
  found = json.loads(capfd.readouterr().out)
  assert found['device'] == 'NVIDIA H100 80GB HBM3' and found['mesh'] == {'data': 1, 'context': 2, 'expert': 2}
  assert found['ops'] == {'dsa_attention_forward': 'gpu, xla', 'routed_swiglu_forward': 'gpu'}
  assert found['bytes']['fits'] and found['bytes']['temporaries'] > 0 and found['largest'][0]['bytes'] > 0
  assert found['hbm_s_without_masked'] < found['hbm_s'] and found['sent_bytes']['expert'] > 0
