"""Model FLOPs against a peak, memory, and which steps a trace holds."""
import dataclasses
import types

import jax
import pytest

from keye_jax import watch
from keye_jax.config import DataConfig, IndexerConfig, MeshConfig, ModelConfig, RunConfig, TextConfig, TrainConfig


def devices(monkeypatch, kind, stats=None):
  device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])


def test_mfu_is_six_flops_a_parameter_and_token_and_attention(monkeypatch):
  text = TextConfig(layers=2, embed=8, heads=2, kv_heads=1, head_dim=4, vocab=10, ffn=16, indexer=IndexerConfig())
  config = RunConfig(ModelConfig(text=text), mesh=MeshConfig(data=2, expert=4), data=DataConfig(tokens=7))
  matrices = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 10
  attention = 4 * 2 * 8 * (7 + 1) / 2          # q.k and p.v, 2 layers, 8 channels, 4 keys on average
  devices(monkeypatch, 'NVIDIA H100 80GB HBM3')
  assert watch.mfu(config, 1e9)['mfu'] == pytest.approx(3 * (2 * matrices + attention) * 1e9 / (8 * 989e12))
  devices(monkeypatch, 'TPU v5 lite')
  assert watch.mfu(config, 1e9)['mfu'] == pytest.approx(3 * (2 * matrices + attention) * 1e9 / (8 * 197e12))
  assert watch.mfu(dataclasses.replace(config, train=TrainConfig(freeze=('vision',))), 1e9) == {}
  devices(monkeypatch, 'cpu')
  assert watch.mfu(config, 1e9) == {}


def test_memory_is_what_the_device_says(monkeypatch):
  devices(monkeypatch, 'TPU v5', {'peak_bytes_in_use': 3 * 2**29})
  assert watch.memory() == {'device_gib': 1.5}
  devices(monkeypatch, 'cpu')
  assert watch.memory() == {}


def test_a_trace_holds_three_steps_after_the_first_three(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: said.append(folder))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: said.append('stop'))

  def run(steps, wanted=True):
    said.clear()
    trace = watch.Trace(tmp_path, wanted)
    for step in range(1, steps + 1):
      trace.step()
      said.append(step)
    trace.close()
    return list(said)
  folder = str(tmp_path / 'profile')
  assert run(8) == [1, 2, 3, folder, 4, 5, 6, 'stop', 7, 8]
  assert run(5) == [1, 2, 3, folder, 4, 5, 'stop']
  assert run(2) == [1, 2] and run(5, wanted=False) == [1, 2, 3, 4, 5]
