"""Caches in pages of a pool that all sequences share, and how index keys are kept in 8 bits.

P pages of the pool, A slots of a page, N pages of a sequence, S slots of a sequence (N * A), U slots that are read,
G KV heads, K head dim, J indexer head dim.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.index_select.selection import Selection

PAGE = 64              # slots of a page; any number works
LARGEST = 448.0        # of float8_e4m3fn


class Pages(NamedTuple):
  k_PAGK: jax.Array
  v_PAGK: jax.Array
  ik_PAJ: jax.Array                 # float32 or bfloat16, or 8 bits with a scale
  ik_scale_PA: jax.Array | None     # float32, one for the index key of each token


class DecodeOutput(NamedTuple):
  o_BTHK: jax.Array
  lse_BTH: jax.Array                # float32
  selection: Selection              # thresholds of scores, places in the sequence


def eight_bits(ik: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Index keys [..., J] as (float8_e4m3fn, float32 scale [...]): the form of the published model's serving code, one
  scale a vector, a power of two, so that the product of both is exact in bfloat16."""
  ik = ik.astype(jnp.float32)
  largest = jnp.abs(ik).max(-1)
  exponent = jnp.ceil(jnp.log2(jnp.maximum(largest, 1e-30) / LARGEST))
  scale = jnp.where(largest > 0, jnp.ldexp(1.0, exponent.astype(jnp.int32)), 1.0)
  return (ik / scale[..., None]).astype(jnp.float8_e4m3fn), scale


def slots(page_N: jax.Array, index_U: jax.Array, pages: Pages) -> jax.Array:
  """Where in the flattened pool the tokens `index_U` of a sequence lie; in range whatever the table holds."""
  P, A = pages.ik_PAJ.shape[:2]
  return jnp.clip(page_N[index_U // A], 0, P - 1) * A + index_U % A


def read(x_PA: jax.Array, slot_U: jax.Array) -> jax.Array:
  """Slots of a part of the pool, [U, ...]."""
  return x_PA.reshape(-1, *x_PA.shape[2:]).at[slot_U].get(mode='promise_in_bounds')


def newest(page_BN: jax.Array, length_B: jax.Array, T: int, pages: Pages) -> jax.Array:
  """Slots [B, T] of the last T tokens of each sequence; of what is no token, out of range and each different."""
  P, A = pages.ik_PAJ.shape[:2]
  place_BT = length_B[:, None] - T + jnp.arange(T, dtype=jnp.int32)
  slot_BT = jax.vmap(lambda page_N, place_T: slots(page_N, jnp.maximum(place_T, 0), pages))(page_BN, place_BT)
  return jnp.where(place_BT >= 0, slot_BT, P * A + jnp.arange(place_BT.size, dtype=jnp.int32).reshape(place_BT.shape))


def write(pages: Pages, slot_U: jax.Array, k_UGK: jax.Array, v_UGK: jax.Array, ik_UJ: jax.Array) -> Pages:
  """The pages with tokens in these slots, all of them different; slots out of range are left out."""
  new = (k_UGK, v_UGK, *(eight_bits(ik_UJ) if pages.ik_scale_PA is not None else (ik_UJ, None)))

  def put(old_PA, new_U):
    flat = old_PA.reshape(-1, *old_PA.shape[2:])
    return flat.at[slot_U].set(new_U.astype(old_PA.dtype), mode='drop', unique_indices=True).reshape(old_PA.shape)

  return jax.tree.map(put, pages, Pages(*new))


def index_keys(pages: Pages, slot_U: jax.Array, dtype) -> jax.Array:
  """Index keys [U, J]: as they are stored, or from 8 bits in `dtype`, that of the index queries."""
  ik_UJ = read(pages.ik_PAJ, slot_U)
  if pages.ik_scale_PA is None:
    return ik_UJ
  return (ik_UJ.astype(jnp.float32) * read(pages.ik_scale_PA, slot_U)[:, None]).astype(dtype)
