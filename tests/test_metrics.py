import json
import sys
import types

import pytest

from data_pipelines.errors import InputError
from keye_jax import metrics
from keye_jax.metrics import Progress, Window, Writer


def test_a_window_is_a_weighted_mean_and_survives_json():
  window = Window()
  window.add({'loss': (6.0, 2.0), 'skipped': (0.0, 1.0), 'nothing': (0.0, 0.0)})
  window = Window(json.loads(json.dumps(window.sums)))
  window.add({'loss': (1.0, 8.0), 'skipped': (1.0, 1.0), 'nothing': (0.0, 0.0)})
  assert window.means() == {'loss': 0.7, 'skipped': 0.5}


def test_records_go_to_jsonl_and_tensorboard(tmp_path):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  writer = Writer(tmp_path, 0, {})
  for step in (1, 2):
    writer.write(step, {'loss': step / 2, 'note': 'text'})
  writer.close()
  assert metrics.read(tmp_path) == [{'step': 1, 'loss': 0.5, 'note': 'text'}, {'step': 2, 'loss': 1.0, 'note': 'text'}]
  board = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
  assert [(e.step, e.value) for e in board.Scalars('loss')] == [(1, 0.5), (2, 1.0)]


def test_a_resumed_run_drops_what_it_will_write_again_and_a_torn_line(tmp_path):
  (tmp_path / metrics.FILE).write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
  writer = Writer(tmp_path, 1, {})
  writer.write(2, {'loss': 2.5})
  writer.close()
  assert [(r['step'], r['loss']) for r in metrics.read(tmp_path)] == [(1, 3), (2, 2.5)]


def test_wandb_only_when_asked_and_installed(tmp_path, monkeypatch):
  with pytest.raises(InputError, match='--wandb: the package is not installed; run `pip install wandb`'):
    monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
    Writer(tmp_path, 0, {}, wandb='project')
  calls = []
  run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append('end'))
  fake = types.ModuleType('wandb')
  fake.init = lambda **kw: calls.append(kw['project']) or run
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: True)
  writer = Writer(tmp_path, 0, {}, wandb='project')
  writer.write(4, {'loss': 1.0, 'note': 'x'})
  writer.close()
  assert calls == ['project', (4, {'loss': 1.0}), 'end']


def test_progress_in_a_log_file_is_one_line_a_record(capsys):
  progress = Progress('train', 10, 100)
  progress.step()
  progress.record(11, 100, {'loss': 1.25, 'tokens_per_s': 12345.6, 'step_s': 42.0})
  progress.record(12, 100, {'tokens_per_s': 5.0, 'step_s': 0.5})
  progress.close()
  assert capsys.readouterr().err == ('step 11/100  loss 1.2500, 12,346 tok/s, 1:02:18 left\n'
                                     'step 12/100  5 tok/s, 0:44 left\n')


def test_table_and_duration():
  assert metrics.table({'a': 1, 'long name': 'x'}) == 'a          1\nlong name  x'
  assert [metrics.duration(s) for s in (0, 59.6, 3600)] == ['0:00', '1:00', '1:00:00']
