"""The protocol of a benchmark: when a run is void, what a record says, and what happens when the peer fails."""
import argparse
import itertools
import sys

import numpy as np
import pytest

from data_pipelines.errors import InputError
from launch import bench, bench_page, bench_rounds
from launch.bench_rounds import Cpu, Rounds


def args(**kwargs):
  return argparse.Namespace(**dict(peer='transformers', rounds=6, out=None, json=True, dsa=0) | kwargs)


def rounds(ours, theirs, others=0.0):
  return Rounds({'keye_jax': [ours] * 6, 'transformers': [theirs] * 6}, [0.01] * 6, others)


def everything(**kwargs):
  return {t.name: rounds(1.0, 1.5, **kwargs) for t in bench.TASKS}


def test_sides_take_turns_when_the_probe_has_settled(monkeypatch):
  order, tick = [], itertools.count()
  monkeypatch.setattr(bench_rounds.time, 'sleep', lambda seconds: order.append('z' * (seconds > 0.1)))
  side = lambda name: lambda: order.append(name) or float(next(tick))
  found = bench_rounds.alternate({'a': side('a'), 'b': side('b')}, lambda: order.append('p') or 0.5, 3)
  assert ''.join(order) == 'pzabpzabpzab'
  assert found.seconds == {'a': [0, 2, 4], 'b': [1, 3, 5]} and found.probe == [0.5] * 3


@pytest.mark.parametrize('kwargs, why', [
  ({}, ''),
  ({'others': 0.3}, 'other processes used 0.30 cores'),
  ({'others': None}, ''),
])
def test_void(kwargs, why):
  found = bench_rounds.void(rounds(1.0, 1.0, **kwargs))
  assert why in found and bool(found) == bool(why)


def test_others_are_what_the_machine_used_beyond_us():
  assert bench_rounds.others(Cpu(10, 100, 50), Cpu(20, 125, 70)) == pytest.approx(0.5)
  assert bench_rounds.others(Cpu(10, 100, 50), Cpu(20, 119, 70)) == 0
  assert bench_rounds.others(None, None) is None


def test_own_time_counts_as_ours():
  before = bench_rounds.cpu()
  if before is None:
    pytest.skip('no /proc')
  while bench_rounds.cpu().own < before.own + 0.2:       # the kernel counts in ticks of 10 ms, each counter its own
    sum(range(10_000))
  assert bench_rounds.cpu().machine > before.machine


def test_interval_of_a_median():
  assert bench_rounds.median_interval([1, 2, 3, 4, 5]) is None
  assert bench_rounds.median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
  assert bench_rounds.median_interval([9, 8, 7, 6, 5, 4, 3, 2, 1]) == (2, 8)       # 1 in 51 has two or more on one side
  drawn = np.random.default_rng(0).exponential(size=(2000, 9))
  held = np.mean([low <= np.log(2) <= high for low, high in map(bench_rounds.median_interval, drawn)])
  assert 0.95 < held < 0.97                              # 0.961


def test_the_last_call_of_a_turn_counts():
  """At least the second, and after AWAKE seconds of calls."""
  side = bench.awake(iter([5.0, 3.0, 6.0, 9.0, 4.0, 2.0, 2.5, 1.0]).__next__)
  assert bench.AWAKE == 8 and [side(), side(), side()] == [3.0, 9.0, 2.5]


def test_exponent():
  assert bench_rounds.exponent([8, 16, 32], [1, 4, 16]) == pytest.approx(2)


class TestRecord:

  def test_shown(self):
    out = bench.record(bench.TASKS, everything(), args(), {'torch': '2'})
    assert out['verdict'] == 'shown' and out['versions']['torch'] == '2'
    assert out['medians of ratios'] == {t.name: 1.5 for t in bench.TASKS}
    assert out['intervals'] == {t.name: (1.5, 1.5) for t in bench.TASKS}
    assert out['arms']['keye_jax']['0']['prefill 2048, median tokens/s'] == 2048
    assert out['baselines']['transformers']['decode after 1024, best tokens/s'] == pytest.approx(64 / 1.5)
    assert 'x 1.50' in bench.table(out)
    page = bench_page.block('model', out)
    assert '| prefill 2048 | 2,048 | 1,365 | 1.50 | 1.50 to 1.50 | 0.' in page and '| 1.50 to 1.50 | – | – |' in page
    assert page.endswith(': shown (every interval lies at or above its floor).')

  def test_share_of_a_large_product(self):
    """8 layers of 655,360 (q, k, v, o) + 4 x 393,216 (experts) + 16,384 (router) multiply-adds a token, 1,024.5 keys on
    average, the head for one token; against 1024^3 of them in 0.01 s. Our prefill makes the last layer's 131,072 for
    keys and values alone."""
    out = bench.record(bench.TASKS, everything(), args(), {})['share of one large product']
    layers, keys, head = 8 * (655360 + 4 * 393216 + 16384), 8 * 2 * 8 * 64 * 1024.5, 512 * 8192
    ours = 2048 * ((layers + keys) * 7 / 8 + 131072) + head
    assert out['prefill 2048']['keye_jax'] == pytest.approx(ours / 1.0 * 0.01 / 1024 ** 3)
    whole = 2048 * (layers + keys) + head
    assert out['prefill 2048']['transformers'] == pytest.approx(whole / 1.5 * 0.01 / 1024 ** 3)
    assert out['train 2048']['transformers'] == pytest.approx(
        3 * 2048 * (layers + keys + head) / 1.5 * 0.01 / 1024 ** 3)
    assert 'decode after 1024' not in out

  def test_below_the_floor(self):
    out = bench.record(bench.TASKS, everything() | {'train 2048': rounds(1.0, 1.1)}, args(), {})
    assert out['verdict'] == 'not shown' and out['why'] == 'not above the floor: train 2048 1.10 (1.10 to 1.10)'

  def test_void(self):
    out = bench.record(bench.TASKS, everything() | {'train 2048': rounds(1.0, 2.0, others=0.5)}, args(), {})
    assert out['verdict'] == 'not shown' and out['why'].startswith('train 2048: void, other processes')
    assert 'VOID' in bench.table(out)

  @pytest.mark.parametrize('tasks, kwargs, why', [
    (bench.TASKS[:2], {}, 'needs all tasks'), (bench.TASKS, {'rounds': 3}, 'needs all tasks'),
    (bench.TASKS, {'peer': None}, 'no peer was measured')])
  def test_part_of_it_shows_nothing(self, tasks, kwargs, why):
    found = {t.name: everything()[t.name] for t in tasks}
    out = bench.record(tasks, found, args(**kwargs), {})
    assert out['verdict'] == 'not shown' and why in out['why']


def test_a_peer_that_cannot_start_is_named(tmp_path):
  with pytest.raises(InputError, match='--peer-python .*nowhere: No such file'):
    bench.Peer(str(tmp_path / 'nowhere'), {}, 1)
  fake = tmp_path / 'python'
  fake.write_text('#!/bin/sh\necho "No module named torch" >&2; exit 1\n')
  fake.chmod(0o755)
  with pytest.raises(InputError, match='No module named torch; install the extra `parity`'):
    bench.Peer(str(fake), {}, 1)


def test_more_threads_than_cores():
  with pytest.raises(InputError, match='--threads 4096'):
    bench.limit_threads(4096)


@pytest.mark.parity
def test_both_sides_are_the_same_model():
  import jax
  import transformers

  from keye_jax.nn import keye
  from launch import bench_model
  theirs = transformers.Qwen3MoeForCausalLM(
      transformers.Qwen3MoeConfig(**bench_model.peer_shape(bench_model.MODEL)))
  ours = jax.tree.leaves(keye.param_shapes(bench_model.MODEL))
  assert sum(p.numel() for p in theirs.parameters()) == sum(a.size for a in ours)


@pytest.mark.parity
def test_peer_answers():
  shape = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
               head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
  peer = bench.Peer(sys.executable, shape, 1)
  try:
    assert peer.versions['transformers']
    for kind, new in (('prefill', 0), ('train', 0), ('decode', 3)):
      assert peer.ask(bench.Task(kind, kind, 8, new, 1.0)) > 0
  finally:
    peer.close()


@pytest.mark.slow
def test_our_side_runs():
  """A small stand-in for the model: what is timed must run, and train repeatedly on its donated state."""
  import dataclasses

  import jax

  from keye_jax.nn import keye
  from launch import bench_model, bench_timing
  text = dataclasses.replace(bench_model.MODEL.text, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, vocab=32,
                             ffn=8, experts=2, experts_per_token=1)
  config = dataclasses.replace(bench_model.MODEL, text=text)
  params = keye.init(config, jax.random.key(0))
  for side in (bench_model.prefill(config, params, 16), bench_model.train(config, params, 16),
               bench_model.decode(config, params, 16, 2), bench_timing.probe()):
    assert side() > 0 and side() > 0


@pytest.mark.slow
def test_parts_of_sparse_attention():
  import dataclasses

  from launch import bench_dsa, bench_model
  text = dataclasses.replace(bench_model.MODEL.text, layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, vocab=32,
                             ffn=8, experts=2, experts_per_token=1)
  said = []
  found = bench_dsa.measure(128, said.append, 64, dataclasses.replace(bench_model.MODEL, text=text))
  names = {'dense', 'score', *(f'{part}, u = {u}' for part in ('select', 'attend', 'sparse') for u in (4, 'random'))}
  assert set(found['seconds']) == names == set(found['exponents']) and found['topk'] == 16
  assert all(list(row) == ['64', '128'] for row in found['seconds'].values()) and len(said) == 2


@pytest.mark.parametrize('sparse, verdict', [(3.0, 'shown (0.75'), (5.0, 'not shown (1.25')])
def test_record_and_page_of_the_parts_of_sparse_attention(sparse, verdict):
  from launch import bench_dsa
  rows = {'dense': (1.0, 4.0), 'select, u = 4': (0.25, 0.5), 'sparse, u = 4': (1.0, sparse),
          'sparse, u = random': (1.0, 6.0)}
  out = bench_dsa.record({
      'topk': 2048, 'seconds': {name: dict(zip(('8192', '16384'), row)) for name, row in rows.items()},
      'exponents': dict.fromkeys(rows) | {'dense': 2.0}})
  page = bench_page.block('sparse', out)
  assert '| one layer, seconds at | 8,192 | 16,384 | grows as |' in page
  assert '| dense | 1.00 | 4.00 | S^2.00 |' in page and '| select, u = 4 | 0.25 | 0.50 | – |' in page
  assert f'in a prefill of 16384 tokens: {verdict} of its time at u = 4, 1.50 of its time at u = random).' in page
  assert 'grows as n^2.00' in bench_dsa.table(out)


@pytest.mark.parametrize('extra', [dict(peer='transformers'), dict(task=['train 2048'])])
def test_parts_of_sparse_attention_are_measured_alone(extra):
  from launch import bench_dsa
  with pytest.raises(InputError, match='measured alone'):
    bench_dsa.run(argparse.Namespace(**dict(dsa=16384, peer=None, task=None) | extra))


def test_growth_needs_two_lengths():
  from launch import bench_dsa
  with pytest.raises(InputError, match='--dsa 8192 leaves one length or none'):
    bench_dsa.measure(8192, print)
