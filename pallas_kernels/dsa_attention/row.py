"""The arguments of sparse attention as the xla implementation carries them.

B batch, T query time, S key time, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim, I indexer
heads, J indexer head dim.
"""
from typing import NamedTuple

import jax

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


class Options(NamedTuple):
  topk: int
  scale: float
  want_kl: bool
  way: Way
