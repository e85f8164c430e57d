"""Held-out rows while a run trains: every row once, the best parameters kept, an early stop that stays stopped."""
import dataclasses
import json

import jax
import numpy as np
import pytest

from data_pipelines import pipeline
from data_pipelines.errors import InputError
from keye_jax import api, checkpoint, heldout, loop, metrics, run_folder
from keye_jax.nn import head, keye
from tests import tiny_run


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Sums to train on, and 11 others to evaluate on in heldout.jsonl."""
  folder = tmp_path_factory.mktemp('data')
  path = tiny_run.dataset(folder)
  rows = [line for line in tiny_run.dataset(folder / 'other', rows=12, seed=5).read_text().splitlines()
          if len(line) > 20]
  (folder / 'heldout.jsonl').write_text('\n'.join(rows) + '\n')
  return path


def config(data, **train):
  return tiny_run.config(data, **(dict(heldout='heldout.jsonl', eval_every=4) | train))


def load_of(config):
  return pipeline.Load(heldout.data_of(config), 14, 2, strict=True)


@pytest.mark.parametrize('together', [True, False])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_every_row_comes_once_whatever_the_number_of_processes(data, together, count, monkeypatch):
  monkeypatch.setattr(pipeline, 'WINDOW_ROWS', 5)
  load = load_of(config(data))
  parts = [list(pipeline.heldout_batches(load, 4, i, count, together)) for i in range(count)]
  assert len({len(part) for part in parts}) == 1
  whole = [jax.tree.map(lambda *a: np.concatenate(a), *batches) for batches in zip(*parts)]
  assert all(batch.token_BT.shape == (4, 48) and batch.patch_BRNC.shape[:2] == (4, 0) for batch in whole)
  said = [tuple(row[(segment >> 8) == s]) for batch in whole for row, segment in zip(batch.token_BT, batch.segment_BT)
          for s in range(1, (segment.max() >> 8) + 1)]
  assert sorted(said) == sorted(tuple(load(i).token_T) for i in range(11))
  assert all((batch.vision_BT == -1).all() for batch in whole)


def test_losses_are_of_all_rows_and_the_best_is_kept(data, tmp_path):
  cfg = config(data)
  result = loop.train(cfg, tmp_path)
  records = {r['step']: r for r in metrics.read(tmp_path) if 'heldout/loss' in r}
  assert list(records) == [4, 8, 12] and records[12]['heldout/loss'] < records[4]['heldout/loss']
  best = min(records, key=lambda step: records[step]['heldout/loss'])
  assert (result.summary['best held-out loss'], result.summary['at step']) == (records[best]['heldout/loss'], best)
  # by hand, from the folder of the best: each row on its own
  model, params = api.load_pretrained(tmp_path / 'best')
  assert checkpoint.whole(tmp_path / 'best' / 'checkpoints') == [best]
  nll = weight = 0.0
  load = load_of(cfg)
  for example in map(load, range(11)):
    (batch,) = [b for b in pipeline.heldout_batches(_one(load, example), 1, 0, 1, False)]
    out = jax.jit(keye.apply, static_argnums=0)(model.config, params, batch)
    logp_TV = jax.nn.log_softmax(head.logits(out.hidden_BTD, out.head_DV)[0])
    nll -= float((np.take_along_axis(np.asarray(logp_TV), batch.target_BT[0][:, None], 1)[:, 0]
                  * batch.weight_BT[0]).sum())
    weight += batch.weight_BT.sum()
  assert records[best]['heldout/loss'] == pytest.approx(nll / weight, rel=1e-5)
  with pytest.raises(InputError, match=r'best: holds a model, not a run .* --config.train.init='):
    loop.train(run_folder.read_config(tmp_path / 'best'), tmp_path / 'best')


def _one(load, example):
  class One:
    rows, shape = [0], load.shape
    __call__ = staticmethod(lambda i: example)
  return One()


def test_training_is_the_same_with_and_without(data, tmp_path):
  loop.train(config(data), tmp_path / 'with')
  loop.train(tiny_run.config(data), tmp_path / 'without')
  lines = [[(r['step'], r['loss'], r['grad_norm']) for r in metrics.read(tmp_path / name) if 'loss' in r]
           for name in ('with', 'without')]
  assert lines[0] == lines[1]


def test_it_stops_early_stays_stopped_and_goes_on_when_told(data, tmp_path, capsys):
  """At a rate of 0 nothing gets better after the first evaluation."""
  still = config(data, eval_every=1, patience=2)
  still = dataclasses.replace(still, optimizer=dataclasses.replace(still.optimizer, learning_rate=0.0))
  result = loop.train(still, tmp_path)
  assert (result.step, result.stopped_by, result.summary['at step']) == (3, 0, 1)
  assert 'step 3: held-out loss was lowest at step 1; stopping early' in capsys.readouterr().err
  assert [checkpoint.whole(tmp_path / name / 'checkpoints') for name in ('', 'best')] == [[3], [1]]
  assert loop.train(still, tmp_path).step == 3
  on = dataclasses.replace(still, train=dataclasses.replace(still.train, patience=0, steps=5))
  assert loop.train(on, tmp_path).step == 5
  host = json.loads((tmp_path / 'checkpoints' / '5' / 'host_0.json').read_text())
  assert host['heldout'] == {'best': result.summary['best held-out loss'], 'step': 1, 'worse': 4}
  assert run_folder.read_config(tmp_path / 'best') == still


def test_judging():
  fresh = {'best': float('inf'), 'step': 0, 'worse': 0}
  assert heldout.judge(fresh, 4, 2.0) == {'best': 2.0, 'step': 4, 'worse': 0}
  assert heldout.judge({'best': 2.0, 'step': 4, 'worse': 1}, 8, 2.0) == {'best': 2.0, 'step': 4, 'worse': 2}
  assert heldout.judge({'best': 2.0, 'step': 4, 'worse': 1}, 8, float('nan'))['worse'] == 2


def test_the_indexers_are_judged_by_their_own_loss(data):
  assert heldout.metric(config(data)) == 'loss'
  warm = tiny_run.with_indexer(config(data))
  warm = dataclasses.replace(warm, model=dataclasses.replace(warm.model, attention='warmup'))
  assert heldout.metric(warm) == 'indexer_kl'


def test_what_cannot_be_evaluated_is_named(data, tmp_path):
  with pytest.raises(InputError, match='absent.jsonl'):
    loop.train(config(data, heldout='absent.jsonl'), tmp_path / 'a')
  bad = data.parent / 'bad.jsonl'
  bad.write_text('{"broken\n')
  with pytest.raises(InputError, match='bad.jsonl:1: not valid JSON'):
    loop.train(config(data, heldout='bad.jsonl', eval_every=1), tmp_path / 'b')
  from data_pipelines import tokenizer
  (tmp_path / 'c').mkdir()
  (tmp_path / 'c' / 'h.jsonl').write_text((data.parent / 'heldout.jsonl').read_text())
  tokenizer.train_bpe(['other words'], 300).save(tmp_path / 'c')
  with pytest.raises(InputError, match='h.jsonl: has another tokenizer beside it than the training data'):
    loop.train(config(data, heldout=str(tmp_path / 'c' / 'h.jsonl')), tmp_path / 'd')
