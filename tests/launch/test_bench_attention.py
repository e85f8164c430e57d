"""`keye bench attention`: inputs that select what they should, the arithmetic of a row, and what a record says."""
import argparse

import jax
import numpy as np
import pytest

from data_pipelines.errors import InputError
from launch import bench_attention, bench_roofline
from launch import bench_attention_parts as parts
from launch.bench_attention import What
from launch.bench_attention_parts import Part, Shape
from launch.bench_roofline import Roofline
from pallas_kernels.index_select import index_select, select_mask
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


def chosen(**kwargs):
  return bench_attention.chosen(argparse.Namespace(**dict.fromkeys(('length', 'union', 'phase', 'direction')) | kwargs))


def test_rows_are_chosen():
  assert chosen() == What(list(bench_attention.LENGTHS), list(bench_attention.UNIONS), list(bench_attention.KINDS))
  assert chosen(length=[8192, 4096], union=['random', '4'], phase=['decode']) == What(
      [4096, 8192], [4, 'random'], [('decode', 'forward')])
  assert chosen(direction=['backward']).kinds == [('prefill', 'backward')]
  with pytest.raises(InputError, match='--length 2048: a row needs more than k = 2048 tokens'):
    chosen(length=[2048, 8192])
  with pytest.raises(InputError, match='decoding has no backward pass'):
    chosen(phase=['decode'], direction=['backward'])


def test_parts_are_differences_round_by_round():
  whole = {'score': [1.0, 2.0], 'selection': [1.5, 1.0], 'sparse': [6.0, 7.0], 'dense': [9.0, 9.0]}
  assert parts.differences(whole | {'replay': [4.0, 5.0]}) == {
      'score': [1, 2], 'sparse': [6, 7], 'dense': [9, 9], 'select': [0.5, 0], 'attend': [3, 3]}
  assert parts.differences(whole)['attend'] == [4.5, 6]                   # of a decoding step


def test_fraction_of_a_roof():
  assert bench_roofline.fraction(ROOF, 20, 4, 20) == 0.5                  # 10 s of operations, 1 s of bytes
  assert bench_roofline.fraction(ROOF, 2, 40, 20) == 0.5
  assert bench_roofline.fraction(ROOF, 2, 40, 0.0) is None
  found = bench_roofline.measure(64, 1 << 12, 2)
  assert found.flops > 0 and found.bandwidth > 0


def rows(power=1.0, ratio=2.0, void=''):
  seconds = {'attend': lambda x: x ** power, 'sparse': lambda x: x, 'dense': lambda x: ratio * x}
  return [{'phase': 'prefill', 'direction': 'forward', 'part': part, 'tokens': n, 'union': 4, 'u': 4.0,
           'seconds': {'best': s(n / 8192), 'median': s(n / 8192)}, 'flops': 1, 'bytes': 1, 'roofline': 0.25,
           'temp bytes': None, 'void': void}
          for n in (8192, 65536) for part, s in seconds.items()]


@pytest.mark.parametrize('change, why', [
  ({}, ''), ({'power': 1.2}, 'attend grows as S^1.20'), ({'void': 'busy'}, 'busy'),
  ({'ratio': 1.1}, '1.10 times as fast at 65536 tokens, less than 1.2')])
def test_a_record_says_what_it_lacks(change, why):
  out = bench_attention.record(rows(**change), [8192, 65536], ROOF, 3)
  assert out['why'] == why and out['verdict'] == ('not shown' if why else 'shown')
  assert out['exponents']['prefill, forward, sparse, u = 4'] == pytest.approx(1)
  assert 'S^1.00' in bench_attention.table(out) and ' 0.25 ' in bench_attention.table(out)


def test_one_length_has_no_growth():
  out = bench_attention.record(rows()[:3], [8192], ROOF, 3)
  assert set(out['exponents'].values()) == {None}
  assert out['why'] == 'nothing was measured at 65536 tokens and u = 4; the growth of attend was not measured'
  assert out['times as fast as dense'] == {'prefill, forward, sparse, u = 4, 8192 tokens': 2}


@pytest.fixture(scope='module')
def programs():
  """{(phase, direction): {name: result}} of a row of 64 tokens, and the row."""
  x = parts.inputs(TINY, 64, 'random')
  made = {kind: parts.programs(TINY, x, *kind, whole=True) for kind in bench_attention.KINDS}
  return x, {kind: {name: jax.jit(fn)(*a) for name, (fn, a) in found.items()} for kind, found in made.items()}


@pytest.mark.slow
def test_what_is_timed_is_one_function(programs):
  x, results = programs
  forward, backward, decode = (results[kind] for kind in bench_attention.KINDS)
  for name in ('masked_dense', 'replay'):
    assert_close(forward[name], forward['sparse'])
  assert_close(decode['masked_dense'], decode['sparse'])
  assert_close(decode['sparse'], forward['sparse'][:, -1:])
  assert_close(decode['dense'], forward['dense'][:, -1:])
  assert_close(decode['score'], forward['score'][-1:])
  for kind in (forward, decode):
    assert set(kind) - {'replay'} == {'score', 'selection', 'sparse', 'dense', 'masked_dense'}
  (o, masked), (also_o, sparse), (_, dense) = (backward[name] for name in ('masked_dense', 'sparse', 'dense'))
  (training_o, kl), training = backward['training']
  assert kl.shape == (1, 64) and len(training) == 6 and len(sparse) == 3
  for got, want in zip((o, also_o, training_o, *masked, *training[:3]), (*[forward['sparse']] * 3, *sparse, *sparse)):
    assert_close(got, want)
  assert all(a.shape == b.shape and np.isfinite(a).all() for a, b in zip(dense, x[:3]))


@pytest.mark.slow
def test_every_part_is_measured():
  said = []
  found = bench_attention.measure(TINY, What([64, 128], (4, 'random')), ROOF, 2, said.append)
  whole = [('prefill', 'forward', p) for p in ('dense', 'masked_dense', 'sparse', 'score', 'select', 'attend')]
  whole += [('prefill', 'backward', p) for p in ('dense', 'masked_dense', 'sparse', 'training')]
  assert {(r['phase'], r['direction'], r['part'], r['union']) for r in found} == {
      *((*row, 4) for row in whole), *(('decode', 'forward', row[2], 4) for row in whole[:6]),
      *((*row, 'random') for row in whole if row[2] in ('sparse', 'score', 'attend', 'training'))}
  assert len(said) == 10
  for r in found:
    assert np.isfinite([r['seconds']['best'], r['u']]).all() and r['bytes'] > 0
    assert r['roofline'] is None or r['roofline'] > 0
  out = bench_attention.record(found, [64, 128], ROOF, 2)
  assert 'decode, forward, sparse, u = 4, 128 tokens' in out['times as fast as dense']
