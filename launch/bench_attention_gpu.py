"""Scores and selections of the GPU kernels alone: the pieces of `index_select` and `dsa_decode` that come before
attention, for `keye bench attention`.

They write all scores, of which one of each query is returned so that nothing reads the others again.

B sequences, T query time, I indexer heads, J indexer head dim, P key tiles, S keys of a tile.
"""
import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dsa_decode import Pages
from pallas_kernels.dsa_decode import gpu as decode
from pallas_kernels.index_select import gpu as index


def score(iq_TIJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S) -> jax.Array:
  """Key of the first score of each query of a row, [T]."""
  chunks, keys = index.cut(iq_TIJ.swapaxes(0, 1), ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S)
  return jax.lax.map(lambda chunk: index.scores(chunk, keys)[:, 0], chunks).reshape(-1)[:len(q_order_T)]


def decode_scores(pages: Pages, iq_B1IJ, gate_B1I, page_BN, length_B) -> tuple[jax.Array, index.Tiles]:
  """Keys of the scores of one new token of each sequence, and the tiles they are in."""
  capacity = page_BN.shape[1] * pages.ik_PAJ.shape[1]
  order_PS = jnp.arange(-(-capacity // tiles.KEYS) * tiles.KEYS, dtype=jnp.int32).reshape(-1, tiles.KEYS)
  met = index.Tiles(order_PS, jnp.arange(len(order_PS), dtype=jnp.int32), -(-length_B // tiles.KEYS))
  return decode.scores(iq_B1IJ, gate_B1I, pages, page_BN, length_B, 1, order_PS), met


def decode_score(*args) -> jax.Array:
  """Key of the first score of each sequence, [B]."""
  return decode_scores(*args)[0][:, 0]


def decode_selection(*args, topk: int) -> tuple[jax.Array, jax.Array]:
  """(key of the threshold, place of the last key kept at it) of each sequence, [B]."""
  key_BN, met = decode_scores(*args)
  return index.kth(key_BN, met, topk)
