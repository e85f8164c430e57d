"""`keye bench attention`: inputs that select what they should, the arithmetic of a row, and what a record says."""
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.errors import InputError
from launch import bench_attention
from launch.bench_attention import Shape
from pallas_kernels.index_select import index_select, select_mask

TINY = Shape(heads=2, kv_heads=1, width=8, index_heads=2, index_width=16, topk=16)


@pytest.mark.parametrize('union', [1, 2, 4])
def test_neighbours_select_together_what_was_asked_for(union):
  x = bench_attention.inputs(TINY, 512, union)
  index = x.iq, x.ik, x.gate, *x.place
  mask = np.asarray(select_mask(index_select(*index, topk=TINY.topk), *index))[0]
  u = np.mean([len(set(np.nonzero(mask[t:t + 16])[1])) / TINY.topk for t in range(512 - 64, 512, 16)])
  assert bench_attention.union_factor(TINY, x) == pytest.approx(u)
  # With u = 1 a query beside others still has its own causal edge, and the newest keys are not seen by all.
  assert abs(u - union) < 0.15 * union + 0.15


def test_random_queries_share_less():
  wide = bench_attention.union_factor(TINY, bench_attention.inputs(TINY, 512, 'random'))
  assert wide > 4.5


def test_work_of_a_row_counts_pairs():
  shape, n, k = TINY, 40, TINY.topk
  causal = np.tril(np.ones((n, n), int))
  selected = np.minimum(causal.sum(1), k).sum()
  of = lambda part: bench_attention.work(shape, n, part, 2.0)
  assert of('dense')['flops'] == causal.sum() * 2 * 2 * 8 * 2          # two products, two FLOPs, width, heads
  assert of('score')['flops'] == causal.sum() * 2 * 16 * 2
  assert of('attend')['flops'] == selected * 2 * 2 * 8 * 2
  assert of('forward')['flops'] == of('score')['flops'] + of('attend')['flops']
  assert of('attend')['bytes'] == (2 * n * 16 + int(2.0 * selected / 16) * 2 * 8) * 4


def test_growth_needs_two_lengths():
  assert bench_attention.lengths(40000) == [8192, 16384, 32768]
  with pytest.raises(InputError, match='--max-length 8192 leaves one length or none'):
    bench_attention.lengths(8192)


def test_parts_are_differences_round_by_round():
  found = bench_attention.differences({'score': [1.0, 2.0], 'selection': [1.5, 1.0], 'replay': [4.0, 5.0],
                                       'forward': [6.0, 7.0], 'dense': [9.0, 9.0]})
  assert found == {'score': [1, 2], 'forward': [6, 7], 'dense': [9, 9], 'select': [0.5, 0], 'attend': [3, 3]}


def rows(power=1.0, ratio=2.0, void=''):
  seconds = {'attend': lambda x: x ** power, 'forward': lambda x: x, 'dense': lambda x: ratio * x}
  return [{'part': part, 'tokens': n, 'union': 4, 'u': 4.0, 'seconds': {'best': s(n / 8192), 'median': s(n / 8192)},
           'flops': 1, 'bytes': 1, 'temp bytes': None, 'void': void}
          for n in (8192, 65536) for part, s in seconds.items()]


@pytest.mark.parametrize('change, why', [
  ({}, ''), ({'power': 1.2}, 'attend grows as S^1.20'), ({'void': 'busy'}, 'busy'),
  ({'ratio': 1.1}, '1.10 times as fast at 65536 tokens, less than 1.2')])
def test_a_record_says_what_it_lacks(change, why):
  out = bench_attention.record(rows(**change), [8192, 65536], 3)
  assert out['why'] == why and out['verdict'] == ('not shown' if why else 'shown')
  assert out['exponents']['forward, u = 4'] == pytest.approx(1) and 'S^1.00' in bench_attention.table(out)


@pytest.mark.slow
def test_every_part_is_measured():
  said = []
  found = bench_attention.measure(TINY, [64, 128], (4, 'random'), 2, said.append)
  assert {(r['part'], r['union']) for r in found} == {
      *((p, 4) for p in ('dense', 'score', 'select', 'attend', 'forward')),
      *((p, 'random') for p in ('score', 'attend', 'forward'))}
  assert len(said) == 4 and all(np.isfinite(r['seconds']['best']) for r in found)
  assert jnp.isfinite(jnp.asarray([r['u'] for r in found])).all()
