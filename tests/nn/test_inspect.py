"""The inspected forward pass is the model's own, and its selections obey the rules of DSA."""
import dataclasses

import jax
import numpy as np
import pytest

from keye_jax.nn import inspect, keye
from tests.nn.batches import CONFIG, forward, mixed
from tests.tolerances import assert_close


@pytest.mark.slow
def test_selections_belong_to_the_forward_pass():
  config = dataclasses.replace(CONFIG, attention='sparse')
  params = keye.init(config, jax.random.key(0))
  batch = mixed(B=2)
  mask_LBTS, hidden_BTD = inspect.selections(config, params, batch)
  assert_close(hidden_BTD, forward(config, params, batch).hidden_BTD)

  mask = np.asarray(mask_LBTS)
  segment, order = np.asarray(batch.segment_BT), np.asarray(batch.order_BT)
  q, k = segment[:, :, None], segment[:, None]
  visible = (q >> 8 == k >> 8) & ((k & 255 == 0) | (k == q)) & (order[:, :, None] >= order[:, None])
  real = segment > 0
  assert not (mask & ~visible)[:, real].any()
  expected = np.minimum(visible.sum(-1), config.text.indexer.topk)[real]
  np.testing.assert_array_equal(mask.sum(-1)[:, real], np.stack([expected] * len(mask)))
  assert (mask[0] != mask[1]).any()      # layers choose for themselves
