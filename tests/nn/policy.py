"""Responses in the rows of `batches.mixed`."""
import numpy as np

from data_pipelines.schema import Batch, PolicyBatch

SEGMENTS = (1 << 8 | 1, 1 << 8 | 2, 2 << 8, 3 << 8)      # two branches of the first sample, and the other two samples


def responses(batch: Batch, seed: int = 0) -> PolicyBatch:
  """`batch` of `batches.mixed` with its text after the first sample's trunk as four responses a row."""
  rng = np.random.default_rng(seed)
  said_BT = np.asarray(batch.vision_BT) < 0
  sequence_BT = np.full(said_BT.shape, -1, np.int32)
  for m, segment in enumerate(SEGMENTS):
    sequence_BT[(np.asarray(batch.segment_BT) == segment) & said_BT] = m
  old_BT = (-np.log(64) + 0.5 * rng.normal(size=said_BT.shape)).astype(np.float32)
  return PolicyBatch(batch, old_BT, sequence_BT, rng.normal(size=(len(said_BT), 4)).astype(np.float32))
