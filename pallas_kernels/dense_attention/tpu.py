"""Attention on a TPU under any mask, and dense attention by it: a scan over blocks of queries, each a kernel over the
key tiles that the block meets.

The backward pass is one kernel a block: dq stays in VMEM over the tiles, and each key tile is visited once, so that its
gradients are added to the float32 carry in place, in a fixed order.

T query time, S key time (of a tile where a P is in front), G KV heads, N stacked queries R * T
(pallas_kernels/tiles.py), R query heads of a KV head, K head dim, P key tiles, Q blocks of queries. Kernels see the
rows of one block, and of per-query numbers columns (..., 1).
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles, tpu_call
from pallas_kernels.dense_attention.gradient import Options, attend, by_row
from pallas_kernels.dense_attention.xla import cut_queries, join_queries
from pallas_kernels.mask import NEG_INF, visible
from pallas_kernels.tpu_call import LANES, float32, tiled, whole

ROWS = 8192              # rows of 128 features that a block of queries may have, all heads together
KEYS = 512, 2048         # keys of a tile at most, and rows of 128 features, all KV heads together
VMEM = 56 * 2**20        # bytes that a kernel may take, of the 64 MiB a core of v5p and tpu7x has


class Mask(NamedTuple):
  """Who meets whom in a block of queries, as kernels get it."""
  queries: list[jax.Array]   # stay on the chip for all tiles
  keys: list[jax.Array]      # lead with the key tile
  read: Callable             # references of the two -> bool [T, S]
  tile_P: jax.Array          # key tiles to visit, in front
  steps: jax.Array           # how many: at least one, whose mask may be empty

  @property
  def arrays(self) -> list[jax.Array]:
    return [*self.queries, *self.keys]

  @property
  def specs(self) -> list[pl.BlockSpec]:
    return [*map(whole, self.queries), *map(tiled, self.keys)]


def attention(scale: float, mask: Mask, q_GNK, k_PGSK, v_PGSK):
  """(o_GNK in the dtype of q, lse_GN) of a block of queries."""
  G, N, K = q_GNK.shape
  o_GNK, lse_GN1 = jax.ShapeDtypeStruct((G, N, K), q_GNK.dtype), float32(G, N, 1)
  o_GNK, lse_GN1 = tpu_call.call(
      functools.partial(_attention, read=mask.read, scale=scale), (mask.steps,), [mask.tile_P],
      [q_GNK, k_PGSK, v_PGSK, *mask.arrays], [whole(q_GNK), tiled(k_PGSK), tiled(v_PGSK), *mask.specs],
      [(o_GNK, whole(o_GNK)), (lse_GN1, whole(lse_GN1))],
      [pltpu.VMEM((G, N, 1), jnp.float32), pltpu.VMEM((G, N, 1), jnp.float32), pltpu.VMEM((G, N, K), jnp.float32)],
      parallel=(False,), vmem=VMEM)
  return o_GNK, lse_GN1[..., 0]


def _attention(tile_ref, q_ref, k_ref, v_ref, *refs, read, scale):
  *mask_refs, o_ref, lse_ref, m_ref, l_ref, acc_ref = refs
  state = m_ref, l_ref, acc_ref
  n = pl.program_id(0)

  @pl.when(n == 0)
  def _():
    begin(*state)

  mask_TS = read(*mask_refs)
  for g in range(q_ref.shape[0]):
    add(logits(q_ref[g], k_ref[0, g], mask_TS, scale), v_ref[0, g], *(ref.at[g] for ref in state))

  @pl.when(n == pl.num_programs(0) - 1)
  def _():
    for g in range(q_ref.shape[0]):
      end(o_ref.at[g], lse_ref.at[g], *(ref.at[g] for ref in state))


def begin(m_ref, l_ref, acc_ref) -> None:
  """An online softmax in scratch memory: the running maximum and sum (..., N, 1), and the weighted values."""
  m_ref[...] = jnp.full_like(m_ref, NEG_INF)
  l_ref[...] = jnp.zeros_like(l_ref)
  acc_ref[...] = jnp.zeros_like(acc_ref)


def add(x_NS, v_SK, m_ref, l_ref, acc_ref) -> None:
  """Takes in a tile of logits, NEG_INF where masked, and its values."""
  m_N1 = m_ref[...]
  new_N1 = jnp.maximum(m_N1, x_NS.max(1, keepdims=True))
  w_NS, fade_N1 = jnp.exp(x_NS - new_N1), jnp.exp(m_N1 - new_N1)
  m_ref[...], l_ref[...] = new_N1, l_ref[...] * fade_N1 + w_NS.sum(1, keepdims=True)
  acc_ref[...] = acc_ref[...] * fade_N1 + tiles.dot('NS,SK->NK', w_NS, v_SK)


def end(o_ref, lse_ref, m_ref, l_ref, acc_ref) -> None:
  """Writes the output [N, K] and its log-sum-exp [N, 1]; 0 and NEG_INF of a query that saw nothing."""
  m_N1 = m_ref[...]
  seen_N1 = m_N1 > NEG_INF
  l_N1 = jnp.where(seen_N1, l_ref[...], 1)
  o_ref[...] = jnp.where(seen_N1, acc_ref[...] / l_N1, 0).astype(o_ref.dtype)
  lse_ref[...] = jnp.where(seen_N1, m_N1 + jnp.log(l_N1), NEG_INF)


def logits(q_NK, k_SK, mask_TS, scale) -> jax.Array:
  """Masked attention logits [N, S] of the heads of one KV head."""
  x_NS = tiles.dot('NK,SK->NS', q_NK, k_SK) * scale
  (N, S), T = x_NS.shape, len(mask_TS)
  return jnp.where(mask_TS, x_NS.reshape(N // T, T, S), NEG_INF).reshape(N, S)


def probabilities(q_NK, k_SK, lse_N1, mask_TS, scale) -> jax.Array:
  safe_N1 = jnp.where(lse_N1 > NEG_INF, lse_N1, 0)     # a query that sees nothing has probabilities 0, not exp(0)
  return jnp.exp(logits(q_NK, k_SK, mask_TS, scale) - safe_N1)


def gradients(scale: float, mask: Mask, q_GNK, lse_GN1, delta_GN1, do_GNK, k_PGSK, v_PGSK, carry):
  """(carry (dk_PGSK, dv_PGSK) with the block's part added, dq_GNK), float32."""
  queries, keys, own = [q_GNK, lse_GN1, delta_GN1, do_GNK], [k_PGSK, v_PGSK, *carry], float32(*q_GNK.shape)
  dq_GNK, *carry = tpu_call.call(
      functools.partial(_gradients, read=mask.read, scale=scale), (mask.steps,), [mask.tile_P],
      [*queries, *keys, *mask.arrays], [*map(whole, queries), *map(tiled, keys), *mask.specs],
      [(own, whole(own)), *((float32(*x.shape), tiled(x)) for x in carry)], [], parallel=(False,), vmem=VMEM,
      aliases={len(queries) + 2: 1, len(queries) + 3: 2})
  return tuple(carry), dq_GNK


def _gradients(tile_ref, q_ref, lse_ref, delta_ref, do_ref, k_ref, v_ref, dk_before_ref, dv_before_ref, *refs, read,
               scale):
  *mask_refs, dq_ref, dk_ref, dv_ref = refs

  @pl.when(pl.program_id(0) == 0)
  def _():
    dq_ref[...] = jnp.zeros_like(dq_ref)

  add_gradients(scale, read(*mask_refs), (q_ref, lse_ref, delta_ref, do_ref), (k_ref, v_ref),
                (dk_before_ref, dv_before_ref), (dq_ref, dk_ref, dv_ref))


def add_gradients(scale: float, mask_TS, queries, keys, before, out) -> jax.Array:
  """Adds a tile's part to the gradients; the probabilities, summed over heads [T, S].

  References: queries q, lse, delta, do; keys k, v; before dk, dv; out dq, dk, dv, of which dq is added to in place.
  """
  (q_ref, lse_ref, delta_ref, do_ref), (k_ref, v_ref), (dq_ref, dk_ref, dv_ref) = queries, keys, out
  p_TS = jnp.zeros(mask_TS.shape)
  for g in range(q_ref.shape[0]):
    q_NK, k_SK, v_SK, do_NK = q_ref[g], k_ref[0, g], v_ref[0, g], do_ref[g]
    p_NS = probabilities(q_NK, k_SK, lse_ref[g], mask_TS, scale)
    p_TS += head_sum(p_NS, len(mask_TS))
    dx_NS = p_NS * (tiles.dot('NK,SK->NS', do_NK, v_SK) - delta_ref[g]) * scale
    dq_ref[g] += tiles.dot('NS,SK->NK', dx_NS, k_SK)
    dk_ref[0, g] = before[0][0, g] + tiles.dot('NS,NK->SK', dx_NS, q_NK)
    dv_ref[0, g] = before[1][0, g] + tiles.dot('NS,NK->SK', p_NS, do_NK)
  return p_TS


def head_sum(p_NS, T: int) -> jax.Array:
  return p_NS.reshape(-1, T, p_NS.shape[1]).sum(0)


class Places(NamedTuple):
  """Segments and orders of a row in blocks and tiles, and who meets whom."""
  queries: tuple[jax.Array, jax.Array, jax.Array, jax.Array]     # lead with Q: segment [T, 1], order, tiles, how many
  keys: list[jax.Array]                                          # lead with P: segment [1, S], order

  def mask(self, of_block, causal: bool) -> Mask:
    """Of a block, from its part of `queries`."""
    *queries, tile_P, steps = of_block

    def read(q_segment_ref, q_order_ref, k_segment_ref, k_order_ref):
      return visible(q_segment_ref[...], k_segment_ref[0], q_order_ref[...], k_order_ref[0], causal)

    return Mask(queries, self.keys, read, tile_P, steps)


def places(size: int, keys: int, q_segment_T, k_segment_S, q_order_T, k_order_S, causal: bool) -> Places:
  """In blocks of `size` queries and tiles of `keys` keys."""
  q_segment_QT, q_order_QT = cut(q_segment_T, 0, size, tiles.QUERY_PAD), cut(q_order_T, 0, size)
  k_segment_PS, k_order_PS = cut(k_segment_S, 0, keys, tiles.KEY_PAD), cut(k_order_S, 0, keys)
  tile_QP, count_Q = tiles.front(tiles.meeting(q_segment_QT, k_segment_PS, q_order_QT, k_order_PS, causal))
  queries = q_segment_QT[..., None], q_order_QT[..., None], tile_QP, jnp.maximum(count_Q, 1)
  return Places(queries, [k_segment_PS[:, None], k_order_PS[:, None]])


def cut(x: jax.Array, axis: int, size: int, value=0) -> jax.Array:
  """Fills `axis` up, splits it into parts of `size` and leads with the part."""
  return tiles.cut(tiles.pad(x, axis, size, value), axis, size)


def sizes(q_GNK, T: int) -> tuple[int, int]:
  """(queries of a block, keys of a tile) of a row."""
  G, N, K = q_GNK.shape
  most, rows = KEYS
  return block(T, G * N // T, K), max(min(most, rows // (G * -(-K // LANES)) // LANES * LANES), min(most, LANES))


def block(T: int, H: int, K: int) -> int:
  """Queries of a block, of rows of T with H heads: a multiple of 8."""
  return min(max(ROWS // (H * -(-K // LANES)) // 8, 1) * 8, -(-T // 8) * 8)


def forward_row(options: Options, q_GNK, k_GSK, v_GSK, *places_of):
  """(o_GNK, lse_GN) of a row."""
  T = len(places_of[0])
  size, keys = sizes(q_GNK, T)
  row, (k_PGSK, v_PGSK) = places(size, keys, *places_of, options.causal), (cut(x, 1, keys) for x in (k_GSK, v_GSK))

  def one(inputs):
    q_GNK, of_block = inputs
    return attention(options.scale, row.mask(of_block, options.causal), q_GNK, k_PGSK, v_PGSK)

  o_QGNK, lse_QGN = jax.lax.map(one, (cut_queries(q_GNK, T, size), row.queries))
  return join_queries(o_QGNK, T, size), join_queries(lse_QGN, T, size)


def backward_row(options: Options, q_GNK, k_GSK, v_GSK, *rest):
  """Gradients (dq_GNK, dk_GSK, dv_GSK) of a row, float32."""
  *places_of, lse_GN, delta_GN, do_GNK = rest
  T, S = len(places_of[0]), k_GSK.shape[1]
  size, keys = sizes(q_GNK, T)
  row, (k_PGSK, v_PGSK) = places(size, keys, *places_of, options.causal), (cut(x, 1, keys) for x in (k_GSK, v_GSK))
  queries = [cut_queries(x, T, size) for x in (q_GNK, lse_GN[..., None], delta_GN[..., None], do_GNK)]

  def one(carry, inputs):
    queries, of_block = inputs
    return gradients(options.scale, row.mask(of_block, options.causal), *queries, k_PGSK, v_PGSK, carry)

  init = jnp.zeros(k_PGSK.shape), jnp.zeros(v_PGSK.shape)
  (dk, dv), dq = jax.lax.scan(one, init, (queries, row.queries))
  return join_queries(dq, T, size), tiles.join(dk, 1)[:, :S], tiles.join(dv, 1)[:, :S]


dense_attention = functools.partial(attend, by_row(forward_row, backward_row))
