"""The committed numbers of other implementations, as models of ours."""
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Batch
from keye_jax.config import ModelConfig
from keye_jax.hf import reader
from keye_jax.hf.config import from_hf

FOLDER = pathlib.Path(__file__).parent.parent / 'fixtures'


def source_of(tensors: dict[str, np.ndarray], where: str = 'fixture') -> reader.Source:
  """Arrays under their checkpoint names, as the reader takes them."""
  return reader.Source({k: v.shape for k, v in tensors.items()}, lambda name, index: tensors[name][index], where)


def load(name: str, attention: str = 'dense') -> tuple[ModelConfig, dict, dict[str, np.ndarray]]:
  """(config, parameters, everything in the file) of a fixture with `config` and `w/...`."""
  with np.load(FOLDER / name) as f:
    data = {k: f[k] for k in f}
  cfg, fmt = from_hf(json.loads(str(data['config'])))
  tensors = {k[2:]: v for k, v in data.items() if k.startswith('w/')}
  params = reader.load(source_of(tensors), cfg, fmt)
  return dataclasses.replace(cfg, attention=attention), jax.tree.map(jnp.asarray, params), data


def text_batch(token_BT: np.ndarray, position_BT3: np.ndarray | None = None) -> Batch:
  """One sample a row, next-token targets, no vision."""
  B, T = token_BT.shape
  order_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  position_BT3 = np.repeat(order_BT[..., None], 3, -1) if position_BT3 is None else position_BT3
  weight_BT = np.ones((B, T), np.float32)
  weight_BT[:, -1] = 0
  segment_BT, no_vision_BT = np.full((B, T), 1 << 8, np.int32), np.full((B, T), -1, np.int32)
  return Batch(token_BT.astype(np.int32), np.roll(token_BT, -1, 1).astype(np.int32), weight_BT,
               position_BT3.astype(np.int32), segment_BT, order_BT, no_vision_BT,
               np.zeros((B, 0, 0, 588), np.uint8), np.zeros((B, 0, 0, 4), np.int32), np.zeros((B, 0, 0), np.int32),
               np.zeros((B, T), np.int32))
