"""Dense attention on a GPU: kernels over the tiles in which a query sees a key, forward, for dq, and for dk and dv.

Tiles in which all is visible come first and need no mask; between samples, at the diagonal and in branches the mask is
formed in registers from segments and orders. Each gradient is summed by the one program that it belongs to, in a fixed
order: no atomics, the same bits every time.

T query time, S key time (in a kernel: of a block or step), H query heads, G KV heads, K head dim, Q and P tiles of
queries and keys.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu_call, tiles
from pallas_kernels.dense_attention.gradient import Options, attend, by_row
from pallas_kernels.gpu_call import LOG2E, dot, float32
from pallas_kernels.mask import NEG_INF, visible

QUERIES, KEYS = 128, 128     # of a block: its queries meet keys, its keys meet queries, a step at a time
STEP = {2: 64, 4: 32}        # by bytes of a number
WARPS = 8
STAGES = {2: 3, 4: 2}
LEAST = NEG_INF / 2          # running maximum of a query that has seen nothing: a masked logit then weighs 0


class Places(NamedTuple):
  """Segments and orders, each of a whole number of blocks."""
  q_segment_T: jax.Array
  k_segment_S: jax.Array
  q_order_T: jax.Array
  k_order_S: jax.Array

  def met(self, queries: int, keys: int, causal: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """bool [Q, P], of tiles of so many: do they meet, is everything visible."""
    cut = lambda x, size: x.reshape(-1, size)
    places = (cut(self.q_segment_T, queries), cut(self.k_segment_S, keys), cut(self.q_order_T, queries),
              cut(self.k_order_S, keys), causal)
    return tiles.meeting(*places), tiles.all_visible(*places)


def lists(meet: jax.Array, whole: jax.Array) -> list[jax.Array]:
  """[tiles of the last axis to visit, in front those where all is visible; how many of those; how many in all]."""
  whole &= meet
  order = jnp.argsort(2 - meet - whole.astype(jnp.int32), axis=-1, stable=True)
  return [order.astype(jnp.int32), whole.sum(-1, dtype=jnp.int32), meet.sum(-1, dtype=jnp.int32)]


def cut(q_GNK, k_GSK, v_GSK, q_segment_T, k_segment_S, q_order_T, k_order_S):
  """(q_HTK, k_GSK, v_GSK, Places), filled up to whole blocks and a power of two of features."""
  fill = lambda x, size, value=0: tiles.pad(x, 0, size, value)
  places = Places(fill(q_segment_T, QUERIES, tiles.QUERY_PAD), fill(k_segment_S, KEYS, tiles.KEY_PAD),
                  fill(q_order_T, QUERIES), fill(k_order_S, KEYS))
  return heads(q_GNK, len(q_order_T), QUERIES), *(features(tiles.pad(x, 1, KEYS)) for x in (k_GSK, v_GSK)), places


def features(x: jax.Array) -> jax.Array:
  return tiles.pad(x, x.ndim - 1, max(gpu_call.ceil_pow2(x.shape[-1]), gpu_call.SMALLEST))


def heads(x_GNK: jax.Array, T: int, size: int) -> jax.Array:
  """Stacked [G, R * T, K] -> [H, T, K] of whole blocks of `size`."""
  return features(tiles.pad(x_GNK.reshape(-1, T, x_GNK.shape[2]), 1, size))


def numbers(x_GN: jax.Array, T: int, size: int) -> jax.Array:
  """Stacked [G, R * T] -> [H, T] of whole blocks."""
  return tiles.pad(x_GN.reshape(-1, T), 1, size)


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def call(kernel, grid, arrays, outputs):
  width = arrays[0].dtype.itemsize
  return gpu_call.call(functools.partial(kernel, size=STEP[width]), grid, arrays, outputs, warps=WARPS,
                       stages=STAGES[width])


def forward_row(options: Options, q_GNK, *row):
  """(o_GNK in the dtype of q, lse_GN) of a row."""
  (G, N, K), T = q_GNK.shape, len(row[-2])
  q_HTK, k_GSK, v_GSK, places = cut(q_GNK, *row)
  H, size, _ = q_HTK.shape
  visit = lists(*places.met(QUERIES, STEP[q_HTK.dtype.itemsize], options.causal))
  o_HTK, lse_HT = call(functools.partial(_forward, options=options, R=H // G), (H, size // QUERIES),
                       [q_HTK, k_GSK, v_GSK, *places, *visit], [like(q_HTK), float32(H, size)])
  return o_HTK[:, :T, :K].reshape(G, N, K), lse_HT[:, :T].reshape(G, N)


def block_of(Q: int):
  """The block of queries that a program is for: those that meet most keys of a causal row begin."""
  return Q - 1 - pl.program_id(1)


def _forward(q_ref, k_ref, v_ref, q_segment_ref, k_segment_ref, q_order_ref, k_order_ref, tile_ref, whole_ref,
             count_ref, o_out, lse_out, *, options, R, size):
  h, i = pl.program_id(0), block_of(len(count_ref))
  g, queries, unit = h // R, pl.ds(i * QUERIES, QUERIES), options.scale * LOG2E
  q_TK, q_segment_T, q_order_T = q_ref[h, queries], q_segment_ref[queries], q_order_ref[queries]

  def step(n, state, masked):
    m_T, l_T, acc_TK = state
    keys = pl.ds(tile_ref[i, n] * size, size)
    x_TS = dot(q_TK, k_ref[g, keys].T)
    if masked:
      x_TS = jnp.where(visible(q_segment_T[:, None], k_segment_ref[keys], q_order_T[:, None], k_order_ref[keys],
                               options.causal), x_TS, NEG_INF)
    new_T = jnp.maximum(m_T, x_TS.max(1))
    w_TS, fade_T = jnp.exp2(x_TS * unit - (new_T * unit)[:, None]), jnp.exp2((m_T - new_T) * unit)
    v_SK = v_ref[g, keys]
    return new_T, l_T * fade_T + w_TS.sum(1), acc_TK * fade_T[:, None] + dot(w_TS.astype(v_SK.dtype), v_SK)

  init = (jnp.full(QUERIES, LEAST, jnp.float32), jnp.zeros(QUERIES, jnp.float32),
          jnp.zeros(q_TK.shape, jnp.float32))
  m_T, l_T, acc_TK = over(whole_ref[i], count_ref[i], step, init)
  seen_T = l_T > 0
  l_T = jnp.where(seen_T, l_T, 1)
  o_out[h, queries] = (acc_TK / l_T[:, None]).astype(o_out.dtype)
  lse_out[h, queries] = jnp.where(seen_T, m_T * options.scale + jnp.log(l_T), NEG_INF)


def over(whole, count, step, state):
  """`step` over a list of tiles, without a mask as long as all is visible."""
  state = jax.lax.fori_loop(0, whole, functools.partial(step, masked=False), state)
  return jax.lax.fori_loop(whole, count, functools.partial(step, masked=True), state)


def backward_row(options: Options, q_GNK, *rest):
  """Gradients (dq_GNK, dk_GSK, dv_GSK) of a row, in the dtype of each."""
  *row, lse_GN, delta_GN, do_GNK = rest
  (G, N, K), T, S = q_GNK.shape, len(row[-2]), len(row[-1])
  q_HTK, k_GSK, v_GSK, places = cut(q_GNK, *row)
  (H, size, _), step = q_HTK.shape, STEP[q_HTK.dtype.itemsize]
  lse_HT, delta_HT = (numbers(x, T, QUERIES) for x in (lse_GN, delta_GN))
  arrays = [q_HTK, k_GSK, v_GSK, heads(do_GNK, T, QUERIES), lse_HT, delta_HT, *places]
  visit = lists(*places.met(QUERIES, step, options.causal))
  dq_HTK, = call(functools.partial(_of_queries, options=options, R=H // G), (H, size // QUERIES), [*arrays, *visit],
                 [like(q_HTK)])
  visit = lists(*(x.T for x in places.met(step, KEYS, options.causal)))
  dk_GSK, dv_GSK = call(functools.partial(_of_keys, options=options, R=H // G), (G, k_GSK.shape[1] // KEYS),
                        [*arrays, *visit], [like(k_GSK), like(v_GSK)])
  return dq_HTK[:, :T, :K].reshape(G, N, K), dk_GSK[:, :S, :K], dv_GSK[:, :S, :K]


def _of_queries(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, q_segment_ref, k_segment_ref, q_order_ref, k_order_ref,
                tile_ref, whole_ref, count_ref, dq_out, *, options, R, size):
  h, i = pl.program_id(0), block_of(len(count_ref))
  g, queries = h // R, pl.ds(i * QUERIES, QUERIES)
  q_TK, do_TK = q_ref[h, queries], do_ref[h, queries]
  lse_T1, delta_T1 = lse_ref[h, queries][:, None] * LOG2E, delta_ref[h, queries][:, None]
  q_segment_T1, q_order_T1 = q_segment_ref[queries][:, None], q_order_ref[queries][:, None]

  def step(n, dq_TK, masked):
    keys = pl.ds(tile_ref[i, n] * size, size)
    k_SK = k_ref[g, keys]
    p_TS = jnp.exp2(dot(q_TK, k_SK.T) * (options.scale * LOG2E) - lse_T1)
    if masked:
      p_TS = jnp.where(visible(q_segment_T1, k_segment_ref[keys], q_order_T1, k_order_ref[keys], options.causal),
                       p_TS, 0)
    dx_TS = p_TS * (dot(do_TK, v_ref[g, keys].T) - delta_T1)
    return dq_TK + dot(dx_TS.astype(k_SK.dtype), k_SK)

  dq_TK = over(whole_ref[i], count_ref[i], step, jnp.zeros(q_TK.shape, jnp.float32))
  dq_out[h, queries] = (dq_TK * options.scale).astype(dq_out.dtype)


def _of_keys(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, q_segment_ref, k_segment_ref, q_order_ref, k_order_ref,
             tile_ref, whole_ref, count_ref, dk_out, dv_out, *, options, R, size):
  g, i = pl.program_id(0), pl.program_id(1)
  keys = pl.ds(i * KEYS, KEYS)
  k_SK, v_SK = k_ref[g, keys], v_ref[g, keys]
  k_segment_S1, k_order_S1 = k_segment_ref[keys][:, None], k_order_ref[keys][:, None]

  def head(r, state):
    h = g * R + r

    def step(n, state, masked):
      dk_SK, dv_SK = state
      queries = pl.ds(tile_ref[i, n] * size, size)
      q_TK, do_TK = q_ref[h, queries], do_ref[h, queries]
      p_ST = jnp.exp2(dot(k_SK, q_TK.T) * (options.scale * LOG2E) - lse_ref[h, queries] * LOG2E)
      if masked:
        p_ST = jnp.where(visible(q_segment_ref[queries], k_segment_S1, q_order_ref[queries], k_order_S1,
                                 options.causal), p_ST, 0)
      dv_SK += dot(p_ST.astype(do_TK.dtype), do_TK)
      dx_ST = p_ST * (dot(v_SK, do_TK.T) - delta_ref[h, queries])
      return dk_SK + dot(dx_ST.astype(q_TK.dtype), q_TK), dv_SK

    return over(whole_ref[i], count_ref[i], step, state)

  zeros_SK = jnp.zeros(k_SK.shape, jnp.float32)
  dk_SK, dv_SK = jax.lax.fori_loop(0, R, head, (zeros_SK, zeros_SK))
  dk_out[g, keys] = (dk_SK * options.scale).astype(dk_out.dtype)
  dv_out[g, keys] = dv_SK.astype(dv_out.dtype)


dense_attention = functools.partial(attend, by_row(forward_row, backward_row))
