"""Writes a complete Hugging Face folder: weights in shards, index, configs, tokenizer, processors, model card.

Everything goes to a hidden folder beside the target, which is renamed when the last byte is on disk. A folder with the
target's name is therefore whole; what a killed export leaves behind is called `.NAME.part-PID` and is never read.
"""
import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from data_pipelines.errors import InputError
from data_pipelines.tokenizer import Tokenizer
from keye_jax.config import DataConfig, ModelConfig
from keye_jax.hf import config, names, processor
from keye_jax.hf.card import Card, render
from keye_jax.hf.reader import DTYPES, Unread

SHARD_BYTES = 5_000_000_000
TOKEN_KEYS = {'image_token_id': '<|image_pad|>', 'video_token_id': '<|video_pad|>',
              'fast_video_token_id': '<|fast_video_pad|>', 'vision_start_token_id': '<|vision_start|>',
              'vision_end_token_id': '<|vision_end|>'}


def export(folder: str, cfg: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer, fmt: names.Format,
           data: DataConfig | None = None, dtype: str = 'bfloat16', card: Card | None = None,
           shard_bytes: int = SHARD_BYTES) -> str:
  """Writes `folder`, which must not exist, and returns its path.

  params: nested dict of our parameters, numpy or jax arrays that this process holds whole, or `reader.Unread`: those
  are read when they are written, a shard at a time.
  data: media limits of the run; needed when the model sees. dtype: 'bfloat16' or 'float32', of the stored weights.
  Raises InputError when the folder exists, the model does not fit the format, a parameter has another shape than the
  config says, the tokenizer does not fit the vocabulary, or the disk is full.
  """
  if os.path.exists(folder):
    raise InputError(f'{folder}: already exists; remove it or export to another folder')
  if dtype not in DTYPES:
    raise InputError(f'dtype {dtype!r}: choose one of {", ".join(DTYPES)}')
  if cfg.vision.layers and data is None:
    raise InputError('an export of a model with vision needs the media limits it was trained with: pass data')
  if tokenizer.size > cfg.text.vocab:
    raise InputError(f'{tokenizer.name}: {tokenizer.size} tokens do not fit the model, whose vocabulary is '
                     f'{cfg.text.vocab}')
  try:
    table = names.table(cfg, fmt)
  except ValueError as e:
    raise InputError(str(e)) from None
  flat = flatten(params)
  check(flat, table)
  with renamed_when_whole(folder, sum(_bytes(t, dtype) for t in table)) as part:
    ids = token_ids(tokenizer, cfg)
    write_json(part, 'config.json', config.to_hf(cfg, fmt, dtype, ids))
    stops = list(tokenizer.stop_ids)
    write_json(part, 'generation_config.json', {k: ids[k] for k in ('bos_token_id', 'pad_token_id') if k in ids} | {
        'eos_token_id': stops, 'do_sample': False})
    write_weights(part, flat, table, dtype, shard_bytes)
    tokenizer.save(part)
    if cfg.vision.layers:
      for name, content in processor.to_hf(cfg.vision, data).items():
        write_json(part, name, content)
    count = sum(int(np.prod(leaf.shape)) for leaf in flat.values())
    with open(os.path.join(part, 'README.md'), 'w', encoding='utf-8') as f:
      f.write(render(card or Card(), cfg, fmt, count, dtype))
  return folder


def write_weights(folder: str, flat: Mapping[str, Any], table: list[names.Tensor], dtype: str,
                  shard_bytes: int = SHARD_BYTES) -> None:
  """Shards of at most `shard_bytes` (a larger tensor has its own), one in memory at a time, and their index."""
  shards: list[list[names.Tensor]] = [[]]
  used = 0
  for tensor in table:
    size = _bytes(tensor, dtype)
    if shards[-1] and used + size > shard_bytes:
      shards.append([])
      used = 0
    shards[-1].append(tensor)
    used += size
  files = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  host: dict[str, np.ndarray | Unread] = {}      # a jax array on the CPU is viewed, not copied
  for file, shard in zip(files, shards):
    for piece in (p for t in shard for p in t.pieces if p.path not in host):
      value = flat[piece.path]
      host[piece.path] = value if isinstance(value, Unread) else np.asarray(value)
    save_file({t.name: stored(t, host, dtype) for t in shard}, os.path.join(folder, file), {'format': 'pt'})
  write_json(folder, 'model.safetensors.index.json', {
      'metadata': {'total_size': sum(_bytes(t, dtype) for t in table)},
      'weight_map': {t.name: file for file, shard in zip(files, shards) for t in shard}})


def stored(tensor: names.Tensor, host: Mapping[str, np.ndarray | Unread], dtype: str) -> np.ndarray:
  """One tensor of the folder from our parameters."""
  parts = [names.to_stored(p.rule, host[p.path][p.index].astype(DTYPES[dtype]), p.rows[1] - p.rows[0])
           for p in tensor.pieces]
  whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
  return np.ascontiguousarray(whole.reshape(tensor.shape))


def check(flat: Mapping[str, Any], table: list[names.Tensor]) -> None:
  """Parameters and table agree in paths and shapes. Raises InputError."""
  want = {path: leaf.shape for path, leaf in names.leaves(table).items()}
  if odd := sorted(want.keys() ^ flat.keys()):
    side = 'is not in the parameters' if odd[0] in want else 'has no place in the checkpoint'
    raise InputError(f'parameter {odd[0]!r} {side}; the config is not that of these parameters')
  for path, shape in want.items():
    if tuple(flat[path].shape) != shape:
      raise InputError(f'parameter {path!r} has shape {tuple(flat[path].shape)}, the config says {shape}')


def flatten(params: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dict -> {'layers/attn/q': array}."""
  out: dict[str, Any] = {}
  for key, value in params.items():
    path = f'{prefix}{key}'
    out |= flatten(value, f'{path}/') if isinstance(value, Mapping) else {path: value}
  return out


def token_ids(tokenizer: Tokenizer, cfg: ModelConfig) -> dict[str, int]:
  """Special token ids under their config.json keys; vision's only for a model that sees."""
  ids = {key: tokenizer.id(token) for key, token in (TOKEN_KEYS.items() if cfg.vision.layers else ())}
  stops = tokenizer.stop_ids
  if stops:
    ids |= {'eos_token_id': stops[0], 'pad_token_id': stops[-1], 'bos_token_id': stops[-1]}
  return ids


def _bytes(tensor: names.Tensor, dtype: str) -> int:
  return int(np.prod(tensor.shape)) * DTYPES[dtype].itemsize


def write_json(folder: str, name: str, content: Mapping[str, Any]) -> None:
  with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
    json.dump(content, f, indent=2, ensure_ascii=False)
    f.write('\n')


@contextlib.contextmanager
def renamed_when_whole(folder: str, size: int) -> Iterator[str]:
  """A hidden folder beside `folder` that takes its name on success and vanishes on failure."""
  parent, name = os.path.split(os.path.abspath(folder))
  part = os.path.join(parent, f'.{name}.part-{os.getpid()}')
  try:
    os.makedirs(part)
    if (free := shutil.disk_usage(part).free) < size:
      raise InputError(f'{folder}: the weights need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room or '
                       'export elsewhere')
    yield part
    for file in [*os.listdir(part), '.']:
      fd = os.open(os.path.join(part, file), os.O_RDONLY)
      try:
        os.fsync(fd)
      finally:
        os.close(fd)
    os.rename(part, folder)
  except (OSError, SafetensorError) as e:
    raise InputError(f'{folder}: could not be written ({e}); nothing was exported, make room or export '
                     'elsewhere') from e
  finally:
    shutil.rmtree(part, ignore_errors=True)
