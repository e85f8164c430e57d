"""Mixtures: proportions, every row once an epoch, exact resume, counters; what is wrong is named."""
import collections
import json

import numpy as np
import pytest
from absl import flags

from data_pipelines import mixture, pipeline, tokenizer
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig, SourceConfig

SIZES = {'long': 7, 'short': 40, 'text': 23}
WEIGHTS = {'long': 1.0, 'short': 2.0, 'text': 1.0}


@pytest.fixture(scope='module', autouse=True)
def parsed_flags():
  flags.FLAGS.mark_as_parsed()       # grain's worker processes read absl flags


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Three files; a row of source s answers 's i'. Row 3 of each is not JSON."""
  path = tmp_path_factory.mktemp('mixed')
  tokenizer.train_bpe([f'{name} {i}' for name, n in SIZES.items() for i in range(n)], 400).save(path)
  for name, n in SIZES.items():
    rows = [json.dumps({'messages': [{'role': 'user', 'content': '?' * (1 + i % 4)},
                                     {'role': 'assistant', 'content': f'{name} {i}'}]}) for i in range(n)]
    rows[3] = '{"broken'
    (path / f'{name}.jsonl').write_text('\n'.join(rows) + '\n')
  return path


def config(folder, weights=WEIGHTS, **changes):
  sources = tuple(SourceConfig(name, f'{name}.jsonl', weight) for name, weight in weights.items())
  return DataConfig(path=str(folder), sources=sources, **({'tokens': 64} | changes))


def take(batches, n):
  return [next(batches) for _ in range(n)]


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    for left, right in zip(x, y):
      np.testing.assert_array_equal(left, right)


def test_every_block_holds_the_shares_and_every_source_is_read_in_order():
  order = mixture.Order([250, 600, 150], seed=3)
  found = [order[i] for i in range(3 * mixture.BLOCK)]
  for start in range(0, len(found), mixture.BLOCK):
    assert collections.Counter(s for s, _ in found[start:start + mixture.BLOCK]) == {0: 250, 1: 600, 2: 150}
  for s in range(3):
    own = [j for at, j in found if at == s]
    assert own == list(range(len(own)))
  assert [s for s, _ in found[:1000]] != [s for s, _ in found[1000:2000]]            # each block in a new order
  assert [s for s, _ in found[:1000]] != [mixture.Order([250, 600, 150], seed=4)[i][0] for i in range(1000)]
  assert order[10**15][0] in (0, 1, 2)                                                # no counting up to a place


def test_the_order_is_the_same_everywhere():
  """Committed: a run resumed elsewhere must go on with the same rows."""
  order = mixture.Order([1, 999], seed=0)
  first = [next(i for i in range(1000 * b, 1000 * (b + 1)) if order[i][0] == 0) for b in range(4)]
  assert first == [13, 1802, 2824, 3493]


@pytest.mark.parametrize('weights, counts', [([1, 1], [500, 500]), ([1, 1, 1], [334, 333, 333]), ([1e-3, 1], [1, 999]),
                                             ([0.24, 0.5, 0.26], [240, 500, 260]), ([7], [1000])])
def test_shares_are_the_largest_remainders(weights, counts):
  assert mixture.shares([mixture.Source(str(i), '', w) for i, w in enumerate(weights)]) == counts


def test_a_run_sees_the_weights_and_counts_them(folder):
  data = config(folder)
  batches = pipeline.train_batches(data, 4, seed=1)
  where, tokens = [], np.zeros(len(WEIGHTS), int)
  for _ in range(50):
    batch = next(batches)
    where += batches.sources
    tokens += np.bincount(batch.origin_BT[batch.segment_BT > 0], minlength=len(WEIGHTS))
  stats = batches.stats()
  batches.close()
  seen = collections.Counter(w.rpartition('/')[2].partition('.')[0] for w in where)
  met = stats['sources']
  skipped = sum(m['skipped'] for m in met.values())
  assert list(met) == ['long', 'short', 'text'] and sum(seen.values()) > 300
  for name, weight in WEIGHTS.items():
    assert met[name]['samples'] == seen[name]
    assert abs((seen[name] + met[name]['skipped']) / (len(where) + skipped) - weight / 4) < 0.06
    assert met[name]['epochs'] == round((seen[name] + met[name]['skipped']) / SIZES[name], 3)
  assert met['long']['epochs'] > 20 > met['short']['epochs'] > 2         # the small one was repeated
  assert skipped == stats['skipped']['bad JSON'] > 3
  assert met['text']['tokens'] > 5 * met['text']['samples']
  assert [m['tokens'] for m in met.values()] == tokens.tolist()          # each token knows its source


def test_every_epoch_of_a_source_holds_its_rows_once(folder):
  rows = mixture.Rows(config(folder))
  stream = mixture.stream(rows, 2, 0, 1)
  found = [stream[i] for i in range(240)]
  for s, n in enumerate(SIZES.values()):
    own = [i - rows.starts[s] for i in found if rows.starts[s] <= i < rows.starts[s + 1]]
    for start in range(0, len(own) - n, n):
      assert sorted(own[start:start + n]) == list(range(n))
    assert own[:n] != own[n:2 * n]
  assert rows.where(rows.starts[1]) == f'{folder}/short.jsonl:1' and rows.name(rows.where(46)) == 'short'


def test_processes_get_the_same_mix_of_different_rows(folder):
  rows = mixture.Rows(config(folder))
  parts = [[mixture.stream(rows, 2, p, 2)[i] for i in range(40)] for p in range(2)]
  kinds = [[rows.name(rows.where(i)) for i in part] for part in parts]
  assert kinds[0] == kinds[1] and set(kinds[0]) == set(SIZES)
  short = [{i for i, kind in zip(part, kinds[0]) if kind == 'short'} for part in parts]
  assert not short[0] & short[1]


def test_one_file_reads_what_it_read_before_there_were_mixtures(folder):
  """The stream of `data.path` alone: grain's own shuffle of its rows, dealt out to the processes."""
  import grain
  rows = mixture.Rows(DataConfig(path=str(folder / 'short.jsonl')))
  expected = grain.MapDataset.range(40).seed(5).shuffle().repeat()[1::2]
  stream = mixture.stream(rows, 5, 1, 2)
  assert [stream[i] for i in range(90)] == [expected[i] for i in range(90)]
  assert mixture.epoch(rows, 2) == 20


def test_resume_equals_uninterrupted_at_any_step(folder, monkeypatch):
  monkeypatch.setattr(pipeline, 'WINDOW_ROWS', 5)         # several windows, and states inside one
  whole = pipeline.train_batches(config(folder), 3, seed=7)
  expected, states = [], [json.loads(json.dumps(whole.get_state()))]
  for _ in range(10):
    expected.append(next(whole))
    states.append(json.loads(json.dumps(whole.get_state())))
  for step in (0, 3, 8):
    again = pipeline.train_batches(config(folder), 3, seed=7)
    again.set_state(states[step])
    assert again.get_state() == states[step]
    assert_same(take(again, 10 - step), expected[step:])
    assert again.get_state() == states[-1]
    again.close()
  whole.close()


@pytest.mark.slow
def test_workers_change_neither_order_nor_resume(folder):
  """Spawns two worker processes twice."""
  whole = pipeline.train_batches(config(folder), 2, seed=9)
  expected = take(whole, 10)
  part = pipeline.train_batches(config(folder, workers=2), 2, seed=9)
  assert_same(take(part, 4), expected[:4])
  state = part.get_state()
  part.close()
  again = pipeline.train_batches(config(folder, workers=2), 2, seed=9)
  again.set_state(state)
  assert_same(take(again, 6), expected[4:])
  assert again.stats() == whole.stats()
  again.close()
  whole.close()


def test_fingerprints_name_each_source_and_the_weights(folder, tmp_path):
  base = pipeline.fingerprints(config(folder))
  assert list(base) == [f"rows or media of the source '{name}'" for name in SIZES] + [
      'weights of the mixture', 'tokenizer of the dataset']
  changed = lambda other: [what for what in base if other.get(what) != base[what]]
  assert changed(pipeline.fingerprints(config(folder, dict(reversed(WEIGHTS.items()))))) == []
  assert changed(pipeline.fingerprints(config(folder, WEIGHTS | {'long': 2.0}))) == ['weights of the mixture']
  for name in SIZES:
    (tmp_path / f'{name}.jsonl').write_text((folder / f'{name}.jsonl').read_text() + '\n' * (name == 'text'))
  assert changed(pipeline.fingerprints(config(tmp_path, tokenizer=str(folder)))) == [
      "rows or media of the source 'text'"]


def test_what_cannot_be_mixed_is_named(folder):
  with pytest.raises(InputError, match="'text' with weight 0.0001 of 3.0001 together is less than one sample in 1000"):
    pipeline.train_batches(config(folder, WEIGHTS | {'text': 1e-4}), 2, 0)
  with pytest.raises(InputError, match="'a' and 'b' are the same file .*/text.jsonl"):
    mixture.Rows(DataConfig(path=str(folder), sources=tuple(SourceConfig(n, 'text.jsonl') for n in 'ab')))
  with pytest.raises(InputError, match='absent.jsonl'):
    mixture.Rows(config(folder, {'absent': 1.0}))


def test_no_usable_row_in_any_source_is_an_error(folder, monkeypatch):
  monkeypatch.setattr(mixture, 'BLOCK', 20)               # one block is more than an epoch of these sources
  with pytest.raises(InputError, match='no row of the dataset can be used; the last: .*do not fit a row of 4'):
    next(pipeline.train_batches(config(folder, tokens=4), 2, seed=0))
