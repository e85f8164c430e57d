"""Decoding that reads what it needs: all index keys of a sequence up to its length, then the selected keys alone.

Sequences go one after the other. Index keys are scored in blocks of pages, as many as the sequence has, into one
buffer in which the threshold is searched; keys and values are gathered from the pool for the union of the few queries.
On a CPU the pool should be float32: XLA gathers narrower floats from a float32 copy of all of it.

T new tokens, S tokens of a block, C blocks, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim,
I indexer heads, J indexer head dim, U gathered keys.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dsa_attention import union
from pallas_kernels.dsa_decode.pages import DecodeOutput, Pages, index_keys, read, slots
from pallas_kernels.index_select import search
from pallas_kernels.index_select.selection import Selection, keep_all
from pallas_kernels.index_select.xla import products, score

BLOCK = 4096           # tokens scored at a time


def dsa_decode(q_BTHK, pages: Pages, iq_BTIJ, gate_BTI, page_BN, length_B, *, topk, scale) -> DecodeOutput:
  T, G = q_BTHK.shape[1], pages.k_PAGK.shape[2]
  rows = tiles.stack_heads(q_BTHK, G), iq_BTIJ.swapaxes(1, 2), gate_BTI, page_BN, length_B
  o_BGNK, lse_BGN, selection = tiles.over_rows(functools.partial(decode_one, pages, topk, scale), rows, loop=True)
  unstack = lambda x: tiles.unstack_heads(x, T)
  return DecodeOutput(unstack(o_BGNK.astype(q_BTHK.dtype)), unstack(lse_BGN), Selection(*selection))


def decode_one(pages: Pages, topk, scale, q_GNK, iq_ITJ, gate_TI, page_N, length):
  """(o_GNK float32, lse_GN, (threshold_T, last_T)) of a sequence."""
  T, capacity = len(gate_TI), len(page_N) * pages.ik_PAJ.shape[1]
  size = min(BLOCK, capacity)
  order_CS = tiles.cut(jnp.arange(-(-capacity // size) * size, dtype=jnp.int32), 0, size)
  q_order_T = length - T + jnp.arange(T, dtype=jnp.int32)
  place = lambda index_U: slots(page_N, jnp.minimum(index_U, capacity - 1), pages)

  def fill(c, score_CTS):
    ik_SJ = index_keys(pages, place(order_CS[c]), iq_ITJ.dtype)
    score_TS = score(products(iq_ITJ, ik_SJ), gate_TI)
    return score_CTS.at[c].set(jnp.where(order_CS[c] <= q_order_T[:, None], score_TS, -jnp.inf))

  score_CTS = jnp.full((len(order_CS), T, size), -jnp.inf)
  score_CTS = jax.lax.fori_loop(0, (length + size - 1) // size, fill, score_CTS)
  selection = keep_all((T,)) if topk >= capacity else search.kth(score_CTS, order_CS, topk)
  word_S = search.words(score_CTS, order_CS, *selection).reshape(-1)

  def read_both(index_U):
    slot_U, written_U11 = place(index_U), (index_U < length)[:, None, None]
    kv_UGK = jnp.concatenate([read(x, slot_U) for x in pages[:2]], 1)
    return jnp.where(written_U11, kv_UGK, 0)

  o_GNK, lse_GN = union.attend(q_GNK, read_both, word_S, union.picks(word_S != 0), T, scale)
  return o_GNK, lse_GN, tuple(selection)
