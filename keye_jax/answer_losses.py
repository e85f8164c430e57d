"""The loss of each answer of a file, teacher-forced: what pairs two models finer than right and wrong."""
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines import pipeline
from data_pipelines.schema import Batch
from keye_jax.config import DataConfig, ModelConfig
from keye_jax.nn import head, keye


class Losses(NamedTuple):
  """Of N answers in file order, those of one row after each other."""
  nats: list[float]           # -log probability, summed over the answer's tokens
  tokens: list[int]
  clips: list[str]            # what each belongs to: the number of its row


def losses(config: ModelConfig, params: Any, data: DataConfig, batch: int = 16) -> Losses:
  """Of the answers in `data.path`, on one device; a branch is one answer. Raises InputError at a row that cannot be
  used."""
  load = pipeline.Load(data, config.vision.patch, config.vision.merge, strict=True)
  forward, found, row = _forward(config), Losses([], [], []), 0
  for rows in pipeline.heldout_batches(load, batch, 0, 1, together=False):
    logp_BT = np.asarray(forward(params, rows), np.float64)
    for b in range(batch):
      for segment in np.unique(rows.segment_BT[b][rows.weight_BT[b] > 0]):
        mine_T = (rows.segment_BT[b] == segment) & (rows.weight_BT[b] > 0)
        found.nats.append(float(-logp_BT[b][mine_T].sum()))
        found.tokens.append(int(mine_T.sum()))
        found.clips.append(str(row + b))
    row += batch
  return found


@functools.cache
def _forward(config: ModelConfig):
  def forward(params, batch: Batch):
    out = keye.apply(config, params, batch)
    return head.token_stats(config.layout, out.hidden_BTD, out.head_DV, batch.target_BT).logp_BT
  return jax.jit(forward)
