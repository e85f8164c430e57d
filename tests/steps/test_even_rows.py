"""Rows moved over a mesh of eight devices are the rows of the batch, in the order that the assignment says."""
import functools

import jax
import numpy as np
import pytest

from data_pipelines.schema import Batch
from keye_jax import balance, feed
from keye_jax.steps.even_rows import even_rows
from tests.steps.test_mesh import mesh
from tests.test_feed import numbered

COST_B = np.random.default_rng(0).permutation(16).astype(np.float32)


@pytest.mark.parametrize('shape, micro', [((2, 2, 2), 2), ((4, 1, 2), 1), ((8, 1, 1), 2), ((1, 4, 2), 4)])
def test_every_row_comes_whole_to_its_place(shape, micro):
  batch, ranks = numbered(16), shape[0] * shape[2]
  row_B = np.asarray(balance.rows(COST_B, ranks, micro))
  assert sorted(row_B) == list(range(16)) and (row_B // (16 // ranks) != np.arange(16) // (16 // ranks)).any()
  with mesh(*shape):
    placed, cost_B = feed.place('train', batch, 0, 1), feed.place_rows('train', ('batch',), COST_B, 0, 1)
    even = jax.jit(functools.partial(even_rows, 'train', micro))(placed, cost_B)
    for name, got, before in zip(Batch._fields, even, placed):
      assert got.sharding == before.sharding
      np.testing.assert_array_equal(got, np.asarray(before)[row_B], err_msg=name)


def test_micro_batches_of_one_device():
  batch = numbered(16)
  even = even_rows('train', 4, feed.place('train', batch, 0, 1), COST_B)
  np.testing.assert_array_equal(even.token_BT, batch.token_BT[np.asarray(balance.rows(COST_B, 1, 4))])
  assert COST_B[np.asarray(balance.rows(COST_B, 1, 4))][::4].tolist() == [15, 14, 13, 12]


def test_rows_that_do_not_divide():
  with pytest.raises(ValueError, match='16 rows cannot be divided over 1 ranks and 3 micro-batches'):
    even_rows('train', 3, feed.place('train', numbered(16), 0, 1), COST_B)
