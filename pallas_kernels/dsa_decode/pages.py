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


def index_keys(pages: Pages, slot_U: jax.Array, dtype) -> jax.Array:
  """Index keys [U, J]: as they are stored, or from 8 bits in `dtype`, that of the index queries."""
  ik_UJ = read(pages.ik_PAJ, slot_U)
  if pages.ik_scale_PA is None:
    return ik_UJ
  return (ik_UJ.astype(jnp.float32) * read(pages.ik_scale_PA, slot_U)[:, None]).astype(dtype)
