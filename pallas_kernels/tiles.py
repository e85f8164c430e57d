"""Cutting rows into tiles, and softmax attention over tiles: what the xla implementations share.

Inside this module and its users one row of the batch is at work. Query heads of a KV head are stacked into one matrix,
heads major and time minor, so that every product is a plain matmul.

B batch, T query time, S key time, H query heads, G KV heads, R query heads per KV head, N stacked queries R * T,
K head dim, Q query tiles, P key tiles.
"""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.mask import BRANCH_BITS, NEG_INF, visible

# Segments of padding: tokens that fill up a tile. Neither sees anything, not even its own kind, as real padding does.
QUERY_PAD, KEY_PAD = -1, -1 << 2 * BRANCH_BITS
KEYS = 256             # keys of a tile
LN2_HIGH = 0.693359375 # ln 2 to 9 bits, so that small integers times it are exact
BOUND = 50             # logits up to which exp(logit) needs no maximum: with 2^20 of them, e^64 of a float32's e^88
MANY = 1 << 17         # logits of a row from which the batch is a loop: what a row needs then stays in the cache
# Where there is no cache to suit and every launch of a loop is waited for, by platform: queries and keys of a tile of
# dense attention, and logits of a row, all heads, up to which sparse attention takes it as one tile, with no kernel.
LARGE = {'gpu': 2048}
ONE_TILE = {'gpu': 1 << 30}


def dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """einsum with float32 accumulation; float32 probabilities meet bfloat16 values in bfloat16."""
  dtype = jnp.promote_types(a.dtype, b.dtype) if a.dtype == b.dtype else jnp.bfloat16
  return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
  """[..., N, K], [..., N, S] -> float32 [..., K, S], the sum over N: from a transposed copy of `a` and never the other
  way round, which on a CPU takes 0.6 to 0.8 of the time that XLA's own choice takes."""
  as_is = jax.lax.optimization_barrier
  return as_is(dot('...KN,...NS->...KS', as_is(a.swapaxes(-1, -2)), b))


def transposed(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Arrays [..., A, B] as [..., B, A]."""
  return tuple(a.swapaxes(-1, -2) for a in arrays)


def stack_heads(x_BTHK: jax.Array, G: int) -> jax.Array:
  """[B, T, H, ...] -> [B, G, R * T, ...]."""
  B, T, H, *rest = x_BTHK.shape
  x = jnp.moveaxis(x_BTHK.reshape(B, T, G, H // G, *rest), 1, 3)
  return x.reshape(B, G, H // G * T, *rest)


def unstack_heads(x_BGNK: jax.Array, T: int) -> jax.Array:
  """[B, G, R * T, ...] -> [B, T, H, ...]."""
  B, G, N, *rest = x_BGNK.shape
  x = jnp.moveaxis(x_BGNK.reshape(B, G, N // T, T, *rest), 3, 1)
  return x.reshape(B, T, G * (N // T), *rest)


def large() -> int:
  """Queries and keys of a large tile, 0 where tiles are small."""
  return LARGE.get(dispatch.platform(), 0)


def one_tile(H: int, T: int, S: int) -> bool:
  """Whether the platform takes a row of H heads as one tile that is larger than a cache."""
  return H * T * S <= ONE_TILE.get(dispatch.platform(), 0)


def over_rows(fn: Callable, arrays: tuple, loop: bool):
  """`fn` on each row of the batch: in a loop, or on all rows at once."""
  B = jax.tree.leaves(arrays)[0].shape[0]
  if B == 1:
    return jax.tree.map(lambda a: a[None], fn(*jax.tree.map(lambda a: a[0], arrays)))
  return jax.lax.map(lambda a: fn(*a), arrays) if loop else jax.vmap(fn)(*arrays)


def pad(x: jax.Array, axis: int, multiple: int, value=0) -> jax.Array:
  short = -x.shape[axis] % multiple
  if not short:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, short)
  return jnp.pad(x, widths, constant_values=value)


def cut(x: jax.Array, axis: int, size: int) -> jax.Array:
  """Splits `axis` into tiles of `size` and leads with the tile."""
  n = x.shape[axis] // size
  return jnp.moveaxis(x.reshape(*x.shape[:axis], n, size, *x.shape[axis + 1:]), axis, 0)


def join(x: jax.Array, axis: int) -> jax.Array:
  """The inverse of `cut`."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2:])


def cut_heads(x_GNK: jax.Array, T: int, size: int) -> jax.Array:
  """Stacked heads [G, R * T, ...] -> [Q, G, R * size, ...]."""
  G, N, *rest = x_GNK.shape
  x_QGRTK = cut(x_GNK.reshape(G, N // T, T, *rest), 2, size)
  return x_QGRTK.reshape(T // size, G, N // T * size, *rest)


def join_heads(x_QGNK: jax.Array, size: int) -> jax.Array:
  """The inverse of `cut_heads`."""
  Q, G, N, *rest = x_QGNK.shape
  x_GRTK = join(x_QGNK.reshape(Q, G, N // size, size, *rest), 2)
  return x_GRTK.reshape(G, N * Q, *rest)


def meeting(q_segment_QT, k_segment_PS, q_order_QT, k_order_PS, causal: bool) -> jax.Array:
  """bool [Q, P]: may any query of the tile see any key of the tile? From minima and maxima, so for any layout."""
  low = lambda x: x.min(-1)
  high = lambda x: x.max(-1)
  q_sample, k_sample = q_segment_QT >> BRANCH_BITS, k_segment_PS >> BRANCH_BITS
  meet = (low(k_sample)[None] <= high(q_sample)[:, None]) & (high(k_sample)[None] >= low(q_sample)[:, None])
  return meet & (low(k_order_PS)[None] <= high(q_order_QT)[:, None]) if causal else meet


def all_visible(q_segment_QT, k_segment_PS, q_order_QT, k_order_PS, causal: bool) -> jax.Array:
  """bool [Q, P]: surely every query of the tile sees every key of the tile. Of tiles of one branch."""
  q_low, k_low, k_high = q_segment_QT.min(-1)[:, None], k_segment_PS.min(-1), k_segment_PS.max(-1)
  one = (q_segment_QT.max(-1)[:, None] == q_low) & (k_high == k_low)
  order = (q_order_QT.min(-1)[:, None], k_order_PS.max(-1)) if causal else (0, 0)
  return one & visible(q_low, k_low, *order, causal)


def whole_first(meet_QP: jax.Array, whole_QP: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(key tiles of each query tile, those seen whole before others that it meets; numbers of the former, of both)."""
  rank_QP = jnp.where(whole_QP, 0, jnp.where(meet_QP, 1, 2))
  count = lambda n: (rank_QP <= n).sum(-1, dtype=jnp.int32)
  return jnp.argsort(rank_QP, axis=-1, stable=True).astype(jnp.int32), count(0), count(1)


def front(flag: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(indices of the true entries of the last axis, in order and in front; how many there are)."""
  return jnp.argsort(~flag, axis=-1, stable=True).astype(jnp.int32), flag.sum(-1, dtype=jnp.int32)


def bias(mask_TS) -> jax.Array:
  """What is added to a logit: nothing, or NEG_INF, beside which it vanishes. A choice by the mask would be made again,
  broken into bits, for every head and in every loop that XLA fuses it into (7 times as long on a CPU)."""
  return jnp.where(mask_TS, 0, NEG_INF).astype(jnp.float32)


def logits(q_GNK, k_GSK, bias_TS, scale) -> jax.Array:
  """Masked float32 attention logits [G, N, S]."""
  x_GNS = dot('GNK,GSK->GNS', q_GNK, k_GSK) * scale
  G, N, S = x_GNS.shape
  T = bias_TS.shape[0]
  return (x_GNS.reshape(G, N // T, T, S) + bias_TS).reshape(G, N, S)


def exp(x: jax.Array) -> jax.Array:
  """e^x of float32 up to 88, to 2e-7 of it; 0 below -87. A little faster than XLA's on a CPU. Has no gradient.

  x = n ln 2 + r with |r| <= ln 2 / 2; e^r is 1 + r + r^2 q(r), q the cubic whose greatest relative error is least.
  """
  n = jax.lax.round(x * (1 / math.log(2)), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
  r = x - n * LN2_HIGH - n * (math.log(2) - LN2_HIGH)
  q = ((0.0083125243 * r + 0.0418901145) * r + 0.1666711420) * r + 0.4999923110
  bits = jax.lax.bitcast_convert_type((q * r + 1) * r + 1, jnp.int32) + (n.astype(jnp.int32) << 23)
  return jnp.where(x < -87, 0, jax.lax.bitcast_convert_type(bits, jnp.float32))


def bounded(q_GNK, k_GSK, scale) -> jax.Array:
  """Scalar bool: no logit of these queries and keys exceeds BOUND, judged by the longest of either."""
  longest = lambda x: jnp.square(x.astype(jnp.float32)).sum(-1).max()
  return longest(q_GNK) * longest(k_GSK) * scale ** 2 <= BOUND ** 2


def attend(q_GNK, k_PGSK, v_PGSK, tile_P, whole, count, mask: Callable, scale, is_bounded):
  """Softmax of one query tile over the key tiles tile_P[:count]: (o_GNK float32, lse_GN).

  mask(p) is the bool [T, S] of key tile p; every query sees all of the first `whole` tiles. A query that sees nothing
  gets 0 and NEG_INF. is_bounded: what `bounded` says of these queries and keys. Then a float32 holds every sum of
  exponentials as they are, and no maximum is taken: 0.9 of the time on a CPU. Else the softmax is online.
  """
  G, N, _ = q_GNK.shape
  logits_of = lambda p: logits(q_GNK, k_PGSK[p], bias(mask(p)), scale)
  sums = jnp.zeros((G, N)), jnp.zeros((G, N, v_PGSK.shape[-1]))

  def add(x_GNS, p, l_GN, acc_GNK):
    w_GNS = exp(x_GNS)
    return l_GN + w_GNS.sum(-1), acc_GNK + dot('GNS,GSK->GNK', w_GNS, v_PGSK[p])

  def seen(i, carry):
    return add(dot('GNK,GSK->GNS', q_GNK, k_PGSK[tile_P[i]]) * scale, tile_P[i], *carry)

  def masked(i, carry):
    return add(logits_of(tile_P[i]), tile_P[i], *carry)

  def online(i, carry):
    m_GN, l_GN, acc_GNK = carry
    x_GNS = logits_of(tile_P[i])
    new_GN = jnp.maximum(m_GN, x_GNS.max(-1))
    fade_GN = exp(m_GN - new_GN)
    return new_GN, *add(x_GNS - new_GN[..., None], tile_P[i], l_GN * fade_GN, acc_GNK * fade_GN[..., None])

  def without_maximum():
    l_GN, acc_GNK = jax.lax.fori_loop(whole, count, masked, jax.lax.fori_loop(0, whole, seen, sums))
    return jnp.where(l_GN > 0, 0, NEG_INF), l_GN, acc_GNK

  def with_maximum():
    return jax.lax.fori_loop(0, count, online, (jnp.full((G, N), NEG_INF), *sums))

  return finish(*jax.lax.cond(is_bounded, without_maximum, with_maximum))


def finish(m_GN, l_GN, acc_GNK) -> tuple[jax.Array, jax.Array]:
  """(o_GNK, lse_GN) from the running maximum, sum and weighted values of an online softmax."""
  seen_GN = m_GN > NEG_INF
  l_GN = jnp.where(seen_GN, l_GN, 1)
  return (jnp.where(seen_GN[..., None], acc_GNK / l_GN[..., None], 0),
          jnp.where(seen_GN, m_GN + jnp.log(l_GN), NEG_INF))


def probabilities(q_GNK, k_GSK, lse_GN, bias_TS, scale) -> jax.Array:
  """Attention probabilities [G, N, S] from a finished log-sum-exp."""
  safe_GN = jnp.where(lse_GN > NEG_INF, lse_GN, 0)     # a query that sees nothing has probabilities 0, not exp(0)
  return exp(logits(q_GNK, k_GSK, bias_TS, scale) - safe_GN[..., None])


def gradients(q_GNK, k_GSK, v_GSK, lse_GN, delta_GN, do_GNK, bias_TS, scale):
  """(probabilities p_GNS, dq_GNK, dk_GKS, dv_GKS) of one tile, float32. delta is the sum of do * o over K.

  dk and dv as the products leave them: whoever adds up tiles transposes the sum, not each, which on a CPU takes 0.9 of
  the time of a row of 8,192 tokens, 0.99 of one of 2,048.
  """
  p_GNS = probabilities(q_GNK, k_GSK, lse_GN, bias_TS, scale)
  dx_GNS = p_GNS * (dot('GNK,GSK->GNS', do_GNK, v_GSK) - delta_GN[..., None])
  return p_GNS, dot('GNS,GSK->GNK', dx_GNS, k_GSK) * scale, inner(q_GNK, dx_GNS) * scale, inner(do_GNK, p_GNS)
