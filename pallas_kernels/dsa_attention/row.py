"""The arguments of sparse attention as the xla implementation carries them.

B batch, T query time, S key time, H query heads, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim,
I indexer heads, J indexer head dim.
"""
from typing import NamedTuple

import jax

from pallas_kernels import tiles
from pallas_kernels.dsa_attention.way import Way


class Row(NamedTuple):
  """The arrays of one row, or with a leading B of all rows."""
  q_GNK: jax.Array
  k_GSK: jax.Array
  v_GSK: jax.Array
  iq_ITJ: jax.Array
  ik_SJ: jax.Array
  gate_TI: jax.Array
  q_segment_T: jax.Array
  k_segment_S: jax.Array
  q_order_T: jax.Array
  k_order_S: jax.Array


def stacked(q_BTHK, k_BSGK, v_BSGK, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT,
            k_order_BS) -> Row:
  """All rows of a batch, heads in front."""
  return Row(tiles.stack_heads(q_BTHK, k_BSGK.shape[2]), k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2),
             iq_BTIJ.swapaxes(1, 2), ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS)


class Options(NamedTuple):
  topk: int
  scale: float
  want_kl: bool
  way: Way
