"""Attention of a few neighbouring queries over the union of the keys they selected, gathered once for all of them.

Neighbouring queries share most of their keys (arXiv 2606.10651 §2: at 128K tokens 16 of them need about four times
the keys of one), so gathering the union costs little and the products stay large. The bit of a word says which
query of the tile selected the key.

S key time, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim, W words of 32 keys, U gathered keys.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.mask import NEG_INF

TILE = 16             # queries
GATHER = 1024         # keys of one step


class Picks(NamedTuple):
  """A set of keys as bits, with running counts, so that its n-th member is found without a list of S entries."""
  bits_W: jax.Array       # uint32
  end_W: jax.Array        # int32, members in this word and before it


def picks(flag_S: jax.Array) -> Picks:
  """From bool [S]."""
  flag_S = tiles.pad(flag_S, 0, 32, False)
  place = jnp.arange(32, dtype=jnp.uint32)
  bits_W = (flag_S.reshape(-1, 32).astype(jnp.uint32) << place).sum(-1, dtype=jnp.uint32)
  return Picks(bits_W, jnp.cumsum(jax.lax.population_count(bits_W).astype(jnp.int32)))


def nth(members: Picks, n_U: jax.Array) -> jax.Array:
  """Index of the n-th key of the set; any key in range when there are not so many."""
  word_U = jnp.searchsorted(members.end_W, n_U, side='right').astype(jnp.int32)
  word_U = jnp.minimum(word_U, len(members.bits_W) - 1)
  bits_U = members.bits_W[word_U]
  before_U = members.end_W[word_U] - jax.lax.population_count(bits_U).astype(jnp.int32)
  rank_U, place_U = (n_U - before_U).astype(jnp.uint32), jnp.zeros(n_U.shape, jnp.uint32)
  for width in (16, 8, 4, 2, 1):           # halve the span of bits that holds the one of this rank
    low_U = jax.lax.population_count((bits_U >> place_U) & jnp.uint32((1 << width) - 1))
    above_U = rank_U >= low_U
    rank_U, place_U = jnp.where(above_U, rank_U - low_U, rank_U), jnp.where(above_U, place_U + width, place_U)
  return word_U * 32 + jnp.minimum(place_U, 31).astype(jnp.int32)


def attend(q_GNK, read: Callable, word_S, members: Picks, T: int, scale) -> tuple[jax.Array, jax.Array]:
  """(o_GNK float32, lse_GN) of one tile of T queries. read(index_U): keys then values of all KV heads, [U, 2 G, K];
  those of keys that are not members must be finite."""
  G, N, K = q_GNK.shape
  bit_N = jnp.tile(jnp.arange(T, dtype=jnp.int32), N // T)
  total = members.end_W[-1]

  def step(i, heads):
    n_U = i * GATHER + jnp.arange(GATHER, dtype=jnp.int32)
    index_U = nth(members, n_U)
    kv_UX = read(index_U)
    word_U = jnp.where(n_U < total, word_S[index_U], 0)
    on_UN = ((word_U[:, None] >> bit_N) & 1) > 0
    # Keys lead: with few queries that product runs at twice the speed of the other order.
    return tuple(one_head(state, q_GNK[g], kv_UX[:, g], kv_UX[:, G + g], on_UN) for g, state in enumerate(heads))

  def one_head(state, q_NK, k_UK, v_UK, on_UN):
    m_N, l_N, acc_NK = state
    x_UN = jnp.where(on_UN, tiles.dot('UK,NK->UN', k_UK, q_NK) * scale, NEG_INF)
    new_N = jnp.maximum(m_N, x_UN.max(0))
    w_UN, fade_N = jnp.exp(x_UN - new_N), jnp.exp(m_N - new_N)
    return new_N, l_N * fade_N + w_UN.sum(0), acc_NK * fade_N[:, None] + tiles.dot('UN,UK->NK', w_UN, v_UK)

  init = tuple((jnp.full(N, NEG_INF), jnp.zeros(N), jnp.zeros((N, K))) for _ in range(G))
  heads = jax.lax.fori_loop(0, -(-total // GATHER), step, init)
  return tiles.finish(*(jnp.stack(x) for x in zip(*heads)))
