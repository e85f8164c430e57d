"""A dataset of one-line sums and a run config that trains on it in seconds: what loop and command tests share."""
import dataclasses
import json
import pathlib

import numpy as np

from data_pipelines import tokenizer
from keye_jax.config import (
  DataConfig,
  IndexerConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TextConfig,
  TrainConfig,
)

VOCAB = 320


def dataset(folder: pathlib.Path, rows: int = 40, seed: int = 0) -> pathlib.Path:
  """Writes sums.jsonl and tokenizer.json; row 3 is not JSON."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  lines = []
  for i in range(rows):
    a, b = rng.integers(0, 10, 2)
    messages = [{'role': 'user', 'content': f'{a} + {b}'}, {'role': 'assistant', 'content': str(a + b)}]
    lines.append(json.dumps({'id': str(i), 'messages': messages}))
  lines[2] = '{"id": '
  path = folder / 'sums.jsonl'
  path.write_text('\n'.join(lines) + '\n')
  tokenizer.train_bpe([line for line in lines], VOCAB).save(folder)
  return path


def config(path: pathlib.Path, **train) -> RunConfig:
  """One small dense layer, 12 steps, unless told otherwise."""
  text = TextConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, vocab=VOCAB, ffn=16)
  return RunConfig(
      model=ModelConfig(text=text),
      optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2),
      data=DataConfig(path=str(path), tokens=48),
      train=dataclasses.replace(TrainConfig(steps=12, batch=4, log_every=2, save_every=5), **train))


def with_indexer(config: RunConfig) -> RunConfig:
  """The same model with DSA."""
  text = dataclasses.replace(config.model.text, indexer=IndexerConfig(heads=2, head_dim=8, topk=8))
  return dataclasses.replace(config, model=dataclasses.replace(config.model, text=text, attention='sparse'))
