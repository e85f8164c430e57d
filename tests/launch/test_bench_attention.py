"""`keye bench attention`: inputs that select what they should, the arithmetic of a row, and what a record says."""
import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.errors import InputError
from launch import (
  bench_attention,
  bench_attention_gpu,
  bench_attention_peers,
  bench_attention_record,
  bench_roofline,
  kernels_page,
  results,
)
from launch import bench_attention_parts as parts
from launch import bench_attention_settings as settings
from launch.bench_attention_parts import Shape
from launch.bench_attention_record import record, summary, table
from launch.bench_attention_settings import CPU, GPU, KINDS, Cell, Part
from launch.bench_roofline import Roofline
from pallas_kernels import gpu_call
from pallas_kernels.index_select import index_select, reference, search, select_mask
from tests.tolerances import assert_close

TINY = Shape(heads=2, kv_heads=1, width=8, index_heads=2, index_width=16, topk=16)
ROOF = Roofline(2.0, 4.0)


@pytest.mark.parametrize('union', [1, 2, 4])
def test_neighbours_select_together_what_was_asked_for(union):
  x = parts.inputs(TINY, 512, union)
  mask = np.asarray(select_mask(index_select(*x.index, topk=TINY.topk), *x.index))[0]
  u = np.mean([len(set(np.nonzero(mask[t:t + 16])[1])) / TINY.topk for t in range(512 - 64, 512, 16)])
  assert parts.union_factor(TINY, x) == pytest.approx(u)
  # With u = 1 a query beside others still has its own causal edge, and the newest keys are not seen by all.
  assert abs(u - union) < 0.15 * union + 0.15


def test_random_queries_share_less():
  wide = parts.union_factor(TINY, parts.inputs(TINY, 512, 'random'))
  assert wide > 4.5


def of(phase, direction, name, n=40, u=2.0):
  return parts.work(TINY, n, Part(phase, direction, name), u)


def test_a_share_of_a_row_costs_its_part():
  assert list(parts.places(4, 1)) == [0, 1, 2, 3]
  at_T = parts.places(16384, 8)
  assert len(at_T) == 2048 and list(at_T[:3]) == [512, 513, 514] and (np.diff(at_T.reshape(-1, parts.RUN)) == 1).all()
  for name in ('dense', 'score', 'sparse', 'attend', 'select'):
    whole, share = (parts.work(Shape(), 16384, Part('prefill', 'forward', name), 4.0, share=s) for s in (1, 8))
    assert share['flops'] == pytest.approx(whole['flops'] / 8, rel=0.02)
  x = parts.inputs(TINY, 2048, 2, share=8)
  assert x.q.shape == (1, 256, 2, 8) and x.k.shape == (1, 2048, 1, 8)
  assert list(x.place[2][0, parts.RUN - 1:parts.RUN + 1]) == [639, 1536] and 1.5 < parts.union_factor(TINY, x) < 2.5


def test_work_of_a_row_counts_pairs():
  n, k = 40, TINY.topk
  causal = np.tril(np.ones((n, n), int))
  pairs, selected = causal.sum(), np.minimum(causal.sum(1), k).sum()
  forward = lambda name: of('prefill', 'forward', name)
  assert forward('dense')['flops'] == pairs * 2 * 2 * 8 * 2              # two products, two FLOPs, width, heads
  assert forward('score')['flops'] == pairs * 2 * 16 * 2
  assert forward('attend')['flops'] == selected * 2 * 2 * 8 * 2
  assert forward('sparse')['flops'] == forward('score')['flops'] + forward('attend')['flops']
  assert forward('masked_dense')['flops'] == forward('score')['flops'] + forward('dense')['flops']
  assert forward('attend')['bytes'] == (2 * n * 16 + int(2.0 * selected / 16) * 2 * 8) * 4
  assert forward('select') == {'flops': 0, 'bytes': pairs * 4}


def test_backward_is_seven_products_and_the_scores_twice():
  forward, backward = (lambda name, d=d: of('prefill', d, name)['flops'] for d in ('forward', 'backward'))
  assert backward('dense') == 3.5 * forward('dense')
  assert backward('masked_dense') == 3.5 * forward('dense') + 2 * forward('score')
  assert backward('sparse') == 3.5 * forward('attend') + 2 * forward('score')
  selected = forward('attend') // (2 * 2 * 8 * 2)
  assert backward('training') - backward('sparse') == selected * (2 * 8 * 2 + 4 * 2 * 16 * 2)
  assert all(of('prefill', 'backward', name)['bytes'] > of('prefill', 'forward', name)['bytes']
             for name in ('dense', 'masked_dense', 'sparse'))


def test_a_decoding_step_reads_what_it_needs():
  assert of('decode', 'forward', 'dense') == {'flops': 40 * 2 * 2 * 8 * 2, 'bytes': 4 * (2 * 16 + 2 * 40 * 8)}
  assert of('decode', 'forward', 'attend') == {'flops': 16 * 2 * 2 * 8 * 2, 'bytes': 4 * (2 * 16 + 16 * 2 * 8)}
  assert of('decode', 'forward', 'score') == {'flops': 40 * 2 * 16 * 2, 'bytes': 4 * (2 * 17 + 40 * 16)}


def test_work_counts_sequences_and_bytes():
  part = Part('decode', 'forward', 'sparse')
  one, many = parts.work(TINY, 40, part, 1.0), parts.work(TINY, 40, part, 1.0, batch=3, width=2)
  assert many == {'flops': 3 * one['flops'], 'bytes': 3 * one['bytes'] // 2}
  select = Part('prefill', 'forward', 'select')
  assert parts.work(TINY, 40, select, 1.0) == parts.work(TINY, 40, select, 1.0, width=2)       # scores are float32
  assert of('prefill', 'backward', 'cudnn') == of('prefill', 'backward', 'dense')


def chosen(setting=CPU, **kwargs):
  no = dict.fromkeys(('length', 'union', 'phase', 'direction', 'batch'))
  return bench_attention.chosen(argparse.Namespace(**no | kwargs), setting)


def test_cells_are_chosen():
  found = chosen()
  assert len(found) == 4 * (2 * 2 + 1) + 5 * 2 + 1 and len(set(found)) == len(found)
  assert found[:10] == [Cell('prefill', 'forward', n, 1, u, u == 4) for n in (65536, 8192, 16384, 32768, 131072)
                        for u in (1, 4)]
  assert {c.union for c in found if c.tokens == 65536} == {1, 2, 4, 8, 'random'}
  assert {c.union for c in found if c.tokens == 131072} == {1, 4}
  assert len(chosen(length=[8192])) == 5 * 2 + 1
  assert chosen(length=[8192, 4096], union=['random', '4'], phase=['decode']) == [
      Cell('decode', 'forward', n, 1, 1, True) for n in (4096, 8192)]
  assert chosen(length=[4096], union=['8'], direction=['backward']) == [
      Cell('prefill', 'backward', 4096, 1, 8, True)]
  with pytest.raises(InputError, match='--length 2048: a row needs more than k = 2048 tokens'):
    chosen(length=[2048, 8192])
  with pytest.raises(InputError, match='--length 3000: one query in 8 is measured, in runs of 128'):
    chosen(length=[3000])
  with pytest.raises(InputError, match='decoding has no backward pass'):
    chosen(phase=['decode'], direction=['backward'])


def test_a_gpu_starts_with_what_is_claimed():
  found = chosen(GPU)
  assert [c[:4] for c in found[:5]] == [
      ('prefill', 'forward', 131072, 1), ('decode', 'forward', 131072, 16), ('decode', 'forward', 131072, 64),
      ('prefill', 'backward', 131072, 1), ('prefill', 'forward', 262144, 1)]
  assert all(c.union in (1, 4) for c in found[:5])
  assert {c.union for c in found if c.tokens == 131072} == {1, 2, 4, 8, 'random'}
  assert {c.union for c in found if c.tokens != 131072} == {1, 4}
  assert max(c.tokens * c.batch for c in found if c.phase == 'decode') == 64 * 131072
  assert found[-1] == Cell('prefill', 'backward', 262144, 1, 4, True)
  first, other = found[0], next(c for c in found if not c.whole)
  assert settings.parts(GPU, first) == ['cudnn', 'tokamax', 'score', 'selection', 'sparse', 'reference']
  assert settings.parts(GPU, other) == ['selection', 'sparse']
  assert 'dense' in settings.parts(GPU, first._replace(tokens=32768))
  assert settings.parts(GPU, found[1]) == ['cudnn', 'einsum', 'pallas', 'selection', 'sparse']
  assert settings.parts(CPU, other) == ['sparse', 'attend']
  assert settings.parts(CPU, first) == ['score', 'selection', 'sparse', 'attend']
  assert {'dense', 'masked_dense'} <= set(settings.parts(CPU, first._replace(tokens=65536)))
  for phase, direction in KINDS:
    assert set(settings.PROGRAMS[phase, direction]) == set(parts.programs(TINY, phase, direction))


def test_parts_are_differences_round_by_round():
  whole = {'score': [1.0, 2.0], 'selection': [1.5, 1.0], 'sparse': [6.0, 7.0], 'dense': [9.0, 9.0]}
  assert parts.differences(whole | {'attend': [3.0, 3.0]}) == {
      'score': [1, 2], 'sparse': [6, 7], 'dense': [9, 9], 'select': [0.5, 0], 'attend': [3, 3]}
  assert parts.differences(whole)['attend'] == [4.5, 6]                   # of a decoding step
  del whole['score']
  assert parts.differences(whole) == whole | {'attend': [4.5, 6]}         # of kernels that do not score alone


def test_fraction_of_a_roof():
  assert bench_roofline.fraction(ROOF, 20, 4, 20) == 0.5                  # 10 s of operations, 1 s of bytes
  assert bench_roofline.fraction(ROOF, 2, 40, 20) == 0.5
  assert bench_roofline.fraction(ROOF, 2, 40, 0.0) is None
  found = bench_roofline.measure('bfloat16', 64, 1 << 12, 2, 3)
  assert found.flops > 0 and found.bandwidth > 0


def row(part, tokens, seconds, phase='prefill', direction='forward', **kwargs):
  return {'phase': phase, 'direction': direction, 'part': part, 'tokens': tokens, 'batch': 1, 'union': 4, 'u': 4.0,
          'seconds': {'best': seconds, 'median': seconds, 'worst': seconds}, 'flops': 1, 'bytes': 1, 'roofline': 0.25,
          'temp bytes': None, 'off': None, 'void': ''} | kwargs


def rows(power=1.0, ratio=2.0, void='', bytes_=1.0, spread=1.0):
  seconds = {'attend': lambda x: x ** power, 'sparse': lambda x: x, 'dense': lambda x: ratio * x}
  found = [row(part, n, s(n / 8192), void=void, union=1 if part == 'attend' else 4) for n in (8192, 65536)
           for part, s in seconds.items()]
  for r in found:
    r['temp bytes'] = int(1000 * (r['tokens'] / 8192) ** bytes_)
    r['seconds'] |= {'worst': spread * r['seconds']['best']}
  return found


@pytest.mark.parametrize('change, why', [
  ({}, ''), ({'power': 1.2}, 'attend grows as S^1.20'), ({'void': 'busy'}, 'busy'),
  ({'ratio': 1.1}, 'sparse prefill at 65536 tokens: 1.10 times as fast, less than 1.2'),
  ({'bytes_': 1.5}, 'temporaries grow as S^1.50'), ({'spread': 1.2}, ''),
  ({'spread': 1.8}, 'sparse prefill at 65536 tokens: 1.11 times as fast, less than 1.2')])
def test_a_record_says_what_it_lacks(change, why):
  out = record(rows(**change), [8192, 65536], CPU, ROOF, 3)
  assert out['why'] == why and out['verdict'] == ('not shown' if why else 'shown')
  assert out['exponents']['prefill, forward, sparse, u = 4'] == pytest.approx(1)
  if change.get('spread') == 1.2:                                     # of 8 times the keys, in 1.2 times as long
    assert out['steepest'] == pytest.approx(1 + np.log(1.2) / np.log(8))
  assert 'S^1.00' in table(out) and ' 0.25 ' in table(out)


def test_one_length_has_no_growth():
  out = record(rows()[:3], [8192], CPU, ROOF, 3)
  assert set(out['exponents'].values()) == {None}
  assert out['why'] == ('sparse prefill at 65536 tokens: not measured; how attend grows was not measured; '
                        'how temporaries grow was not measured')
  assert out['times as fast as dense'] == {'prefill, forward, sparse, u = 4, 8192 tokens': 2,
                                           'prefill, forward, attend, u = 1, 8192 tokens': 2}


def gpu_rows():
  """Each aim met, beside a slow and a fast dense peer and one that failed."""
  found = []
  for aim in GPU.aims:
    about = dict(phase=aim.part.phase, direction=aim.part.direction, tokens=aim.tokens, batch=aim.batch,
                 union=1 if aim.batch > 1 else 4)
    found += [row(seconds=s, **about | {'part': part}) for part, s in (
        ('cudnn', 2.0), ('einsum', 3.0), (aim.part.name, 1.9 / aim.least))]
    found.append(about | {'part': 'tokamax', 'error': 'ValueError: no'})
  return found


def test_a_gpu_is_judged_against_the_fastest_dense_attention():
  out = record(gpu_rows(), [131072, 262144], GPU, ROOF, 3, ['tokamax: the package is not installed'])
  assert [a['reached'] for a in out['aims']] == [pytest.approx(a.least * 2 / 1.9) for a in GPU.aims]
  assert out['verdict'] == 'shown' and out['why'] == ''
  assert set(out['fastest dense'].values()) == {'cudnn'}
  assert summary(gpu_rows()[:4]) == 'cudnn 2000.00 ms, einsum 3000.00 ms, attend 316.67 ms, tokamax: ValueError: no'
  said = table(out)
  assert 'ValueError: no' in said and 'left out: tokamax' in said and 'batch 64' in said


def test_versions_name_the_driver(tmp_path, monkeypatch):
  assert bench_attention_record.versions()['jax'] == jax.__version__
  file = tmp_path / 'version'
  file.write_text('NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root)\n')
  monkeypatch.setattr(bench_attention_record, 'DRIVER', file)
  assert bench_attention_record.versions()['driver'] == '580.159.04'


@pytest.mark.parametrize('change, why', [
  (lambda rows: [r for r in rows if r['batch'] != 64], 'decoding at batch 64 after 131072 tokens: not measured'),
  (lambda rows: [r | {'off': 0.5} if r['tokens'] == 262144 and r['part'] == 'sparse' else r for r in rows],
   'prefill at 262144 tokens is off by 0.5'),
  (lambda rows: [r | {'seconds': {'best': 1.0, 'median': 1.0}} if (r['part'], r['batch']) == ('cudnn', 16) else r
                 for r in rows], 'decoding at batch 16 after 131072 tokens: 3.16 times as fast, less than 6'),
])
def test_a_gpu_record_says_what_it_lacks(change, why):
  out = record(change(gpu_rows()), [131072, 262144], GPU, ROOF, 3)
  assert out['why'] == why and out['verdict'] == 'not shown'


@pytest.fixture(scope='module')
def programs():
  """{(phase, direction): {name: result}} of a row of 64 tokens, and the row."""
  x, results = parts.inputs(TINY, 64, 'random'), {}
  for kind in KINDS:
    cell = Cell(*kind, 64, 1, 'random', True)
    y = parts.prepare(TINY, cell, settings.parts(CPU, cell), parts.last(x, 1) if cell.phase == 'decode' else x)
    made = parts.programs(TINY, *kind)
    results[kind] = {name: jax.jit(made[name])(*parts.arguments(y, cell.direction))
                     for name in settings.parts(CPU, cell) + ['reference'] * (kind == KINDS[0])}
  return x, results


@pytest.mark.slow
def test_what_is_timed_is_one_function(programs):
  x, results = programs
  forward, backward, decode = (results[kind] for kind in KINDS)
  for name in ('masked_dense', 'attend'):
    assert_close(forward[name], forward['sparse'])
  assert_close(forward['reference'], forward['sparse'][:, -parts.CHECKED:])
  assert bench_attention.off(forward['sparse'][:, -parts.CHECKED:], forward['reference']) < 1e-4
  assert_close(decode['masked_dense'], decode['sparse'])
  assert_close(decode['sparse'], forward['sparse'][:, -1:])
  assert_close(decode['dense'], forward['dense'][:, -1:])
  assert_close(decode['score'], forward['score'][:, -1:])
  for kind in (forward, decode):
    assert set(kind) - {'attend', 'reference'} == {'score', 'selection', 'sparse', 'dense', 'masked_dense'}
  (o, masked), (also_o, sparse), (_, dense) = (backward[name] for name in ('masked_dense', 'sparse', 'dense'))
  (training_o, kl), training = backward['training']
  assert kl.shape == (1, 64) and len(training) == 6 and len(sparse) == 3
  for got, want in zip((o, also_o, training_o, *masked, *training[:3]), (*[forward['sparse']] * 3, *sparse, *sparse)):
    assert_close(got, want)
  assert all(a.shape == b.shape and np.isfinite(a).all() for a, b in zip(dense, x[:3]))


def test_dense_peers_of_a_decoding_step_agree():
  x = parts.decode_inputs(TINY, 64, 3)
  assert x.q.shape == (3, 1, 2, 8) and not np.array_equal(x.k[0], x.k[1])
  want = parts.programs(TINY, 'decode', 'forward')['dense'](x)
  y = parts.prepare(TINY, Cell('decode', 'forward', 64, 3, 1, True), GPU.decoding, x)
  assert_close(bench_attention_peers.einsum(x.q, *y.heads_first), want)
  assert_close(bench_attention_peers.pallas(x.q, *y.heads_first, interpret=True), want)


def test_scores_of_the_gpu_kernels_alone(monkeypatch):
  monkeypatch.setattr(gpu_call, 'INTERPRET', True)
  x = parts.inputs(TINY, 64, 'random')
  got = jax.jit(bench_attention_gpu.score)(*(a[0] for a in x.index))
  assert_close(search.value(got), reference.score(x.iq, x.ik, x.gate)[0, :, 0])


@pytest.mark.slow
def test_every_part_is_measured():
  said, found = [], []
  setting = CPU._replace(unions=(), share=1)
  cells = settings.cells(setting, [64, 128], (4, 'random'), KINDS, (1,))
  for _, rows in bench_attention.measure(TINY, cells, setting, ROOF, 2, said.append):
    found += rows
  whole = [('prefill', 'forward', p) for p in ('dense', 'masked_dense', 'sparse', 'score', 'select', 'attend')]
  whole += [('prefill', 'backward', p) for p in ('dense', 'masked_dense', 'sparse', 'training')]
  assert {(r['phase'], r['direction'], r['part'], r['union']) for r in found} == {
      *((*row, 4) for row in whole), *(('decode', 'forward', row[2], 1) for row in whole[:6]),
      *((*row, 'random') for row in whole if row[2] in ('sparse', 'attend', 'training'))}
  assert len(said) == 10
  for r in found:
    assert np.isfinite([r['seconds']['best'], r['u']]).all() and r['bytes'] > 0
    assert r['roofline'] is None or r['roofline'] > 0
  out = record(found, [64, 128], CPU, ROOF, 2)
  assert 'decode, forward, sparse, u = 1, 128 tokens' in out['times as fast as dense']


@pytest.mark.slow
def test_a_gpu_cell_is_measured_with_its_failures():
  """The setting of a GPU on a CPU: peers that need one are rows with an error, and what runs is bfloat16."""
  names = 'cudnn', 'pallas', 'einsum', 'selection', 'sparse', 'reference'
  setting = GPU._replace(shortest=1e-3, workers=2, parts=names, decoding=names)
  cells = [Cell('prefill', 'forward', 64, 1, 4, True), Cell('decode', 'forward', 64, 2, 1, True)]
  said = []
  (_, prefill), (_, decode) = bench_attention.measure(TINY, cells, setting, ROOF, 2, said.append)
  kept = lambda rows: {r['part']: r for r in rows if 'error' not in r}
  assert {'selection', 'sparse', 'attend'} <= set(kept(prefill)) and 'reference' not in kept(prefill)
  assert kept(prefill)['sparse']['off'] < 0.02 and kept(prefill)['sparse']['rounds'] == 2
  assert {'selection', 'sparse', 'attend', 'einsum'} <= set(kept(decode))
  if jax.default_backend() == 'cpu':
    assert [r['error'][:12] for r in prefill + decode if r['part'] == 'cudnn'] == ['RuntimeError'] * 2
  assert parts.inputs(TINY, 64, 4, 'bfloat16').iq.dtype == jnp.bfloat16
  assert said[0].startswith('9 programs compiled')


def test_no_cell_begins_after_the_time_is_over():
  cells = [Cell('prefill', 'forward', 64, 1, 4, True)]
  assert list(bench_attention.measure(TINY, cells, CPU, ROOF, 2, print, until=0.0)) == []
  late = bench_attention.compiled(TINY, cells, GPU, print, until=0.0)
  assert set(late.values()) == {'it was not compiled in time'}
  found = bench_attention.measure_cell(TINY, cells[0], GPU, late, ROOF, 2, print)
  assert [(r['part'], r['error']) for r in found] == [(k[4], 'it was not compiled in time') for k in late]


def test_a_record_is_gone_on_with(tmp_path, monkeypatch, capsys):
  """One cell is there; the others are measured, and the record names the run that measured it."""
  path, done = tmp_path / 'out.json', []
  first = record([row('dense', 8192, 1.0)], [8192], CPU, ROOF, 3)
  bench_attention.save(path, first)
  monkeypatch.setattr(bench_roofline, 'measure', lambda *a, **k: ROOF)
  monkeypatch.setattr(bench_attention, 'measure', lambda shape, cells, *a: (
      done.append(c) or (c, [row('sparse', c.tokens, 0.5, c.phase, c.direction, union=c.union)]) for c in cells))
  args = argparse.Namespace(length=[8192], union=['4'], phase=None, direction=None, batch=None, rounds=2,
                            seconds=float('inf'), out=str(path), json=True)
  assert bench_attention.run(args) == 0
  assert [c[:3] for c in done] == [('decode', 'forward', 8192), ('prefill', 'backward', 8192)]
  said = json.loads(path.read_text())
  assert said == json.loads(capsys.readouterr().out)
  assert [r['part'] for r in said['rows']] == ['dense', 'sparse', 'sparse']
  assert [run['n'] for run in said['earlier runs']] == [3] and said['n'] == 2 and not said['left out']
  assert bench_attention.run(args) == 0 and len(done) == 2
  path.write_text('{}')
  with pytest.raises(InputError, match='no record of this benchmark; name another'):
    bench_attention.run(args)
  bench_attention.save(path, first | {'hardware': 'a laptop'})
  with pytest.raises(InputError, match='its rows are of a laptop; name another file'):
    bench_attention.run(args)


def test_a_killed_run_leaves_a_whole_record(tmp_path):
  path = tmp_path / 'out.json'
  bench_attention.save(path, {'rows': [1]})
  bench_attention.save(path, {'rows': [1, 2]})
  assert json.loads(path.read_text()) == {'rows': [1, 2]} and [*tmp_path.iterdir()] == [path]


def test_a_record_goes_to_the_page(tmp_path, monkeypatch):
  page, file = tmp_path / 'kernels.md', tmp_path / 'out.json'
  block = lambda name, text: f'{results.START.format(name)}\n{text}\n{results.END}\n'
  text = f'a\n{block("kernels_gpu", "old")}b\n{block("kernels_aot", "c")}d\n'
  page.write_text(text)
  monkeypatch.setattr(kernels_page, 'PAGE', page)
  monkeypatch.setattr(results, 'FOLDER', tmp_path)
  out = record(gpu_rows(), [131072, 262144], GPU, ROOF, 3, ['tokamax: the package is not installed'])
  assert out['platform'] == 'cpu'
  out['platform'] = 'gpu'
  bench_attention.save(file, out | {'commit': ''})
  kernels_page.main([str(file)])
  said = json.loads((tmp_path / 'kernels_gpu.json').read_text())
  assert said == out and said['commit']
  shown = page.read_text()
  assert shown == text.replace('old', kernels_page.block_timed(said))
  assert '| attend alone at 131072 tokens | 6 | 6.32 |' in shown and 'ValueError: no' in shown
  assert 'Left out: tokamax: the package is not installed.' in shown
