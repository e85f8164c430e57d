"""The function and the argument shapes of a row, in the shape of Keye-VL-2.0-30B-A3B, bfloat16.

B batch, T query time, S key time, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim; of
experts: N rows, D features, F hidden features, E experts, K picks of a row.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.aot.rows import Row
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.dsa_decode import PAGE, Pages, dsa_decode
from pallas_kernels.grouped_matmul import grouped_matmul, routed_swiglu
from pallas_kernels.index_select import index_select
from pallas_kernels.indexer_warmup import indexer_warmup

H, G, K, I, J, TOPK = 32, 4, 128, 16, 64, 2048
E, PICKS, D, F = 128, 8, 2048, 768


def program(row: Row) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
  """(fn, its arguments). Backward is the gradient of all differentiable inputs, the forward pass it needs included;
  the cotangents are arguments."""
  fn, floats, others = PARTS.get(row.op, attention)(row)
  if row.direction == 'forward':
    return fn, [*floats, *others]
  n = len(floats)
  outputs = jax.eval_shape(fn, *floats, *others)

  def gradients(*arrays):
    _, pullback = jax.vjp(lambda *x: fn(*x, *arrays[n:-1]), *arrays[:n])
    return pullback(arrays[-1])

  return gradients, [*floats, *others, outputs]


def attention(row: Row):
  """(fn of the differentiable arrays and the rest, shapes of the former, of the latter)."""
  T, S = row.length // row.shards, row.length
  shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, *s), dtype)
  q, k, v = shape(T, H, K), shape(S, G, K), shape(S, G, K)
  index = [shape(T, I, J), shape(S, J), shape(T, I, dtype=jnp.float32)]
  queries, keys = shape(T, dtype=jnp.int32), shape(S, dtype=jnp.int32)
  places = [queries, keys, queries, keys]          # segments, then orders
  if row.op == 'index_select':
    return lambda *x: index_select(*x, topk=TOPK), index, places
  if row.op == 'dense_attention':
    return lambda *x: dense_attention(*x)[0], [q, k, v], places
  if row.op == 'indexer_warmup':
    lse = shape(T, H, dtype=jnp.float32)
    return lambda iq, ik, gate, *x: indexer_warmup(*x[:3], iq, ik, gate, *x[3:]), index, [q, k, lse, *places]
  differentiable = lambda out: (out.o_BTHK, out.kl_BT)
  return lambda *x: differentiable(dsa_attention(*x, topk=TOPK)), [q, k, v, *index], places


def decoding(row: Row):
  """One new token of each sequence, index keys in 8 bits with a scale, as a server keeps them."""
  B, N = row.length // row.shards, -(-row.length // PAGE)
  shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
  pool = lambda *s, dtype=jnp.bfloat16: shape(B * N, PAGE, *s, dtype=dtype)
  pages = Pages(pool(G, K), pool(G, K), pool(J, dtype=jnp.float8_e4m3fn), pool(dtype=jnp.float32))
  fn = lambda *x: dsa_decode(*x, topk=TOPK)
  queries = [shape(B, 1, H, K), pages, shape(B, 1, I, J), shape(B, 1, I, dtype=jnp.float32)]
  return fn, queries, [shape(B, N, dtype=jnp.int32), shape(B, dtype=jnp.int32)]


def expert(row: Row):
  N = row.length // row.shards
  shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
  if row.op == 'grouped_matmul':
    return grouped_matmul, [shape(N, D), shape(E, D, 2 * F)], [shape(E, dtype=jnp.int32)]
  floats = [shape(N, D), shape(N, PICKS, dtype=jnp.float32), shape(E, D, 2 * F), shape(E, F, D)]
  fn = lambda x, weight, up, down, expert: routed_swiglu(x, expert, weight, up, down)
  return fn, floats, [shape(N, PICKS, dtype=jnp.int32)]


PARTS = {'dsa_decode': decoding, 'grouped_matmul': expert, 'routed_swiglu': expert}
