"""What `keye bench attention` times: seeded inputs whose picks overlap as far as asked for, the program of each part,
and the FLOPs and bytes that a part needs.

T tokens, S keys, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from launch.bench_dsa import score_maxima
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.dsa_decode import PAGE, Pages, dsa_decode
from pallas_kernels.index_select import Selection, index_select, select_mask

NEIGHBOURS = 16                # queries of u
BYTES = 4                      # float32


class Part(NamedTuple):
  phase: str         # prefill or decode
  direction: str     # forward, or backward: with the forward pass it needs
  name: str


class Shape(NamedTuple):
  heads: int = 32
  kv_heads: int = 4
  width: int = 128
  index_heads: int = 16
  index_width: int = 64
  topk: int = 2048


class Inputs(NamedTuple):
  """A row of T tokens, arrays with a leading 1."""
  q: jax.Array
  k: jax.Array
  v: jax.Array
  iq: jax.Array
  ik: jax.Array
  gate: jax.Array
  place: tuple[jax.Array, ...]      # segments of queries and keys, orders of queries and keys

  @property
  def index(self):
    return self.iq, self.ik, self.gate, *self.place

  @property
  def everything(self):
    return self.q, self.k, self.v, *self.index


def inputs(shape: Shape, n: int, union: int | str, seed: int = 0) -> Inputs:
  """Random attention inputs; index queries of 16 neighbours share a direction as far as u = `union` at the row's end
  asks for, found by bisection on the last queries."""
  keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(seed), n), 7))
  normal = lambda *s: jax.random.normal(next(keys), (1, *s))
  q, k, v = (normal(n, h, shape.width) for h in (shape.heads, shape.kv_heads, shape.kv_heads))
  ik, own = normal(n, shape.index_width), normal(n, shape.index_heads, shape.index_width)
  common = jnp.repeat(normal(-(-n // NEIGHBOURS), shape.index_heads, shape.index_width), NEIGHBOURS, 1)[:, :n]
  gate = jnp.full((1, n, shape.index_heads), shape.index_width ** -0.5)
  segment, order = jnp.full((1, n), 1 << 8, jnp.int32), jnp.arange(n, dtype=jnp.int32)[None]
  make = lambda noise: Inputs(q, k, v, common * (1 - noise ** 2) ** 0.5 + own * noise, ik, gate,
                              (segment, segment, order, order))
  if union == 'random':
    return make(1.0)
  low, high = 0.0, 1.0
  for _ in range(0 if union == 1 else 12):
    middle = (low + high) / 2
    low, high = (middle, high) if union_factor(shape, make(middle)) < union else (low, middle)
  return make(low)


def last(x: Inputs, count: int) -> Inputs:
  """The last `count` queries against all keys."""
  cut = lambda a: a[:, -count:]
  q_segment, k_segment, q_order, k_order = x.place
  return x._replace(q=cut(x.q), iq=cut(x.iq), gate=cut(x.gate),
                    place=(cut(q_segment), k_segment, cut(q_order), k_order))


def union_factor(shape: Shape, x: Inputs, tiles: int = 4) -> float:
  """Keys that NEIGHBOURS neighbouring queries select together over k, mean of the last `tiles` tiles of a row."""
  return float(_union_factor(shape, *last(x, tiles * NEIGHBOURS).index))


@functools.partial(jax.jit, static_argnums=0)
def _union_factor(shape: Shape, *index) -> jax.Array:
  mask_TS = select_mask(index_select(*index, topk=shape.topk), *index)[0]
  return mask_TS.reshape(-1, NEIGHBOURS, mask_TS.shape[1]).any(1).sum(-1).mean() / shape.topk


def programs(shape: Shape, x: Inputs, phase: str, direction: str, whole: bool) -> dict[str, tuple[Callable, tuple]]:
  """name -> (function, its arguments); `differences` makes parts of them. `whole`: those too that do not depend on u.

  The selection of a replay is found here, before anything is timed.
  """
  dense = lambda *a: dense_attention(*a)[0]
  sparse = functools.partial(dsa_attention, topk=shape.topk, want_kl=False)
  masked = functools.partial(sparse, way='masked_dense')
  if direction == 'backward':
    return backward(shape, x, dense, sparse, masked, whole)
  if phase == 'decode':
    x = last(x, 1)
  found = {'score': (score_maxima, tuple(a[0] for a in x.index))}
  if phase == 'decode':
    found['sparse'] = decoding(shape, x)
  else:
    selection = Selection(*jax.block_until_ready(jax.jit(functools.partial(index_select, topk=shape.topk))(*x.index)))
    found |= {'replay': (lambda selection, *a: sparse(*a, selection=selection).o_BTHK, (selection, *x.everything)),
              'sparse': (lambda *a: sparse(*a).o_BTHK, x.everything)}
  if whole:
    found |= {'dense': (dense, (x.q, x.k, x.v, *x.place)),
              'masked_dense': (lambda *a: masked(*a).o_BTHK, x.everything),
              'selection': (functools.partial(index_select, topk=shape.topk), x.index)}
  return found


def backward(shape: Shape, x: Inputs, dense, sparse, masked, whole: bool):
  """Gradients of q, k and v (`training`: of the indexer too, through its loss) for a cotangent of o of the size of q,
  with o itself."""
  def gradients(fn, count):
    def run(do, *a):
      out, pullback = jax.vjp(lambda *floats: fn(*floats, *a[count:]), *a[:count])
      return out, pullback(jax.tree.map(lambda y: do if y.ndim == 4 else jnp.ones_like(y), out))
    return run

  def training(*a):
    out = dsa_attention(*a, topk=shape.topk)
    return out.o_BTHK, out.kl_BT

  found = {'sparse': (gradients(lambda *a: sparse(*a).o_BTHK, 3), (x.q, *x.everything)),
           'training': (gradients(training, 6), (x.q, *x.everything))}
  if whole:
    found |= {'dense': (gradients(dense, 3), (x.q, x.q, x.k, x.v, *x.place)),
              'masked_dense': (gradients(lambda *a: masked(*a).o_BTHK, 3), (x.q, *x.everything))}
  return found


def decoding(shape: Shape, x: Inputs):
  """(function, arguments) of one new token against caches in pages."""
  n = x.k.shape[1]
  pages = -(-n // PAGE)
  cut = lambda a: jnp.pad(a[0], ((0, pages * PAGE - n), *((0, 0),) * (a.ndim - 2))).reshape(pages, PAGE, *a.shape[2:])
  pool = Pages(cut(x.k), cut(x.v), cut(x.ik), None)
  fn = lambda *a: dsa_decode(*a, topk=shape.topk).o_BTHK
  return fn, (x.q, pool, x.iq, x.gate, jnp.arange(pages, dtype=jnp.int32)[None], jnp.full(1, n, jnp.int32))


def differences(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
  """Seconds of each part, round by round, from those of the programs that were timed."""
  less = lambda a, b: [max(x - y, 0.0) for x, y in zip(seconds[a], seconds[b])]
  out = {name: s for name, s in seconds.items() if name not in ('selection', 'replay')}
  if 'selection' in seconds:
    out['select'] = less('selection', 'score')
  if 'replay' in seconds:
    out['attend'] = less('replay', 'score')
  elif 'selection' in seconds:            # decoding
    out['attend'] = less('sparse', 'selection')
  return out


def work(shape: Shape, n: int, part: Part, u: float) -> dict[str, int]:
  """FLOPs (2 a multiply-add) and least bytes of a part, of a causal row or of one new token after n - 1.

  `masked_dense` multiplies every visible pair, `sparse` and `attend` the selected ones, whose keys are read once for
  the union of 16 queries. `select` has no products: it reads the float32 scores once. Backward is five products of each
  pair beside the two of forward, the scores once more, and reads and writes each array and its gradient; the indexer's
  loss of `training` adds one product forward and the indexer's four. Scores stay on the chip.
  """
  H, G, K, I, J, k = shape
  T = 1 if part.phase == 'decode' else n
  pairs = n if T == 1 else n * (n + 1) // 2
  selected = min(n, k) if T == 1 else pairs if n <= k else k * (k + 1) // 2 + (n - k) * k
  queries, keys, index = 2 * T * H * K, 2 * n * G * K, T * I * (J + 1) + n * J
  gathered = (selected if T == 1 else int(u * selected / NEIGHBOURS)) * 2 * G * K
  score, product = 2 * pairs * I * J, 2 * H * K
  if part.direction == 'forward':
    found = {'dense': (2 * product * pairs, queries + keys), 'score': (score, index), 'select': (0, pairs),
             'attend': (2 * product * selected, queries + gathered),
             'masked_dense': (score + 2 * product * pairs, index + queries + keys),
             'sparse': (score + 2 * product * selected, index + queries + gathered)}
  else:
    ends = 3 * queries                                                 # q, o; q, o, do, dq
    sparse = 2 * score + 7 * product * selected, 2 * index + ends + 2 * gathered + keys
    found = {'dense': (7 * product * pairs, ends + 3 * keys),          # k, v; k, v, dk, dv
             'masked_dense': (2 * score + 7 * product * pairs, 2 * index + ends + 3 * keys), 'sparse': sparse,
             'training': (sparse[0] + (product + 4 * 2 * I * J) * selected, sparse[1] + index)}
  flops, numbers = found[part.name]
  return {'flops': flops, 'bytes': numbers * BYTES}
