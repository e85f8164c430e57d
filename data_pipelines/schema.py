"""Records of the data pipeline: what a row of a file becomes on its way to the device. numpy only.

Letters: B rows, T tokens of a row, R vision rows of a token row, N patches of a vision row, C values of a patch,
P patches of one sample, M merged vision tokens of one sample.
"""
from typing import NamedTuple

import numpy as np

BRANCH_BITS = 8        # a segment id is sample << 8 | branch; 0 is padding
MAX_BRANCHES = (1 << BRANCH_BITS) - 1


class Example(NamedTuple):
  """One tokenised sample before packing. Patches lie frame after frame, in merge order (see `Batch`)."""
  token_T: np.ndarray        # int32
  target_T: np.ndarray       # int32, the token to predict at each place (0 where weight is 0)
  weight_T: np.ndarray       # float32, loss weight of target
  position_T3: np.ndarray    # int32, M-RoPE (time, height, width)
  branch_T: np.ndarray       # int32, 0 = trunk, seen by every branch; b > 0 sees the trunk and itself
  vision_T: np.ndarray       # int32, index into the sample's merged vision tokens, -1 for text
  patch_PC: np.ndarray       # uint8 pixels
  coord_P4: np.ndarray       # int32 (row, column, rows, columns) of each patch in its own frame, counted in patches
  frame_P: np.ndarray        # int32, 1-based frame number
  source: str = ''           # where it came from, for messages


class Batch(NamedTuple):
  """What the model consumes; every leaf leads with B, so sharding, accumulation and slicing are one tree map.

  A token sees another when both are of one sample, the other's branch is the trunk or its own, and the other's
  order is not larger. Frames attend inside themselves only: patches of a vision row with equal `frame_BRN`.
  Patches of a frame are in merge order: the merge x merge patches of one language token are neighbours, tokens in
  row-major order, patches row-major inside a token.
  """
  token_BT: np.ndarray       # int32
  target_BT: np.ndarray      # int32, already shifted: the next token of the same branch
  weight_BT: np.ndarray      # float32
  position_BT3: np.ndarray   # int32
  segment_BT: np.ndarray     # int32, sample << 8 | branch, samples from 1; 0 = padding
  order_BT: np.ndarray       # int32, place of the token in its row before any re-ordering for a layout
  vision_BT: np.ndarray      # int32, index into the row's R * N / merge**2 merged tokens, -1 for text
  patch_BRNC: np.ndarray     # uint8
  coord_BRN4: np.ndarray     # int32
  frame_BRN: np.ndarray      # int32, frame number inside the vision row, 0 = padding
  origin_BT: np.ndarray      # int32, which source of a mixture the token's sample is of (`mixture.Rows.sources`)


class PolicyBatch(NamedTuple):
  """Rows with responses that a policy sampled, and what learning from them needs. M responses of a row at most.

  A response lies in one row whole: a sample of its own behind its prompt, or a branch of a sample that is the prompt.
  What is not the policy's own choice (the prompt, what a tool said) belongs to none. `batch.weight_BT` is not read.
  """
  batch: Batch
  old_logp_BT: np.ndarray    # float32, log-probability (nats) of each target under the policy that sampled it
  sequence_BT: np.ndarray    # int32, which of the row's responses the target belongs to, 0 to M - 1; -1 = none
  advantage_BM: np.ndarray   # float32, of each response; an absent one has no token
