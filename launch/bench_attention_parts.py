"""What `keye bench attention` times: seeded inputs whose picks overlap as far as asked for, the program of each part,
and the FLOPs and bytes that a part needs.

B sequences, T tokens, S keys, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim.
"""
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch import bench_attention_cpu, bench_attention_gpu
from launch import bench_attention_peers as peers
from launch.bench_attention_settings import DENSE, Cell, Part
from pallas_kernels import dispatch
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.dsa_decode import PAGE, Pages, dsa_decode
from pallas_kernels.index_select import index_select, reference
from pallas_kernels.mask import visible

NEIGHBOURS = 16                # queries of u
CHECKED = 16                   # last queries of a row that are computed as their definition
RUN = 128                      # neighbouring queries of a share of a row


class Shape(NamedTuple):
  heads: int = 32
  kv_heads: int = 4
  width: int = 128
  index_heads: int = 16
  index_width: int = 64
  topk: int = 2048


class Inputs(NamedTuple):
  """B rows of T queries and S keys."""
  q: jax.Array
  k: jax.Array
  v: jax.Array
  iq: jax.Array
  ik: jax.Array
  gate: jax.Array
  place: tuple[jax.Array, ...]      # segments of queries and keys, orders of queries and keys
  word_CMS: jax.Array | None = None       # bench_attention_cpu.words
  heads_first: tuple[jax.Array, jax.Array] | None = None     # k and v, [B, G, S, K]

  @property
  def index(self):
    return self.iq, self.ik, self.gate, *self.place

  @property
  def everything(self):
    return self.q, self.k, self.v, *self.index


def places(n: int, share: int) -> np.ndarray:
  """Orders of the queries of a share of a row of n tokens: all of them, or one in `share`, in runs of RUN spread evenly
  over the row, which cost that part of what all do."""
  at_T = np.arange(n, dtype=np.int32)
  return at_T if share == 1 else at_T.reshape(-1, share, RUN)[:, share // 2].reshape(-1)


def draw(shape: Shape, n: int, batch: int, at_T: jax.Array, dtype: str, seed: int) -> tuple[Inputs, jax.Array]:
  """Random inputs of the queries at `at_T` of n tokens, and index queries that each NEIGHBOURS queries have in common.
  One row at a time, so that nothing wider than dtype is ever held."""
  queries = len(at_T)

  def normal(n, count, *s):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), n), batch)
    return jax.lax.map(lambda key: jax.random.normal(key, (count, *s), dtype), keys)

  q, iq = normal(0, queries, shape.heads, shape.width), normal(1, queries, shape.index_heads, shape.index_width)
  k, v = (normal(i, n, shape.kv_heads, shape.width) for i in (2, 3))
  common = normal(5, -(-queries // NEIGHBOURS), shape.index_heads, shape.index_width)
  gate = jnp.full((batch, queries, shape.index_heads), shape.index_width ** -0.5)
  rows = lambda x: jnp.broadcast_to(x, (batch, len(x)))
  segment = jnp.full(n, 1 << 8, jnp.int32)
  place = rows(segment[:queries]), rows(segment), rows(at_T), rows(jnp.arange(n, dtype=jnp.int32))
  return Inputs(q, k, v, iq, normal(4, n, shape.index_width), gate, place), common


def mix(own, common, noise):
  """Index queries that are `common` to their neighbours as far as noise, 0 to 1, allows."""
  common = jnp.repeat(common.astype(jnp.float32), NEIGHBOURS, 1)[:, :own.shape[1]]
  return (common * (1 - noise ** 2) ** 0.5 + own.astype(jnp.float32) * noise).astype(own.dtype)


_draw, _mix = jax.jit(draw, static_argnums=(0, 1, 2, 4, 5)), jax.jit(mix, donate_argnums=0)


def inputs(shape: Shape, n: int, union: int | str, dtype: str = 'float32', share: int = 1, seed: int = 0) -> Inputs:
  """A row of n tokens, of its queries one in `share`; index queries of neighbours share a direction as far as
  u = `union` at the row's end asks for, found by bisection on the last queries."""
  at_T = places(n, share)
  x, common = _draw(shape, n, 1, at_T, dtype, seed)
  if union == 'random':
    return x
  T = len(at_T)
  count = min(T - T % NEIGHBOURS, 4 * NEIGHBOURS)
  cut = T - T % NEIGHBOURS - count
  end = last(x, T - cut)
  low, high = 0.0, 1.0
  for _ in range(0 if union == 1 else 12):
    middle = (low + high) / 2
    tried = end._replace(iq=mix(end.iq, common[:, cut // NEIGHBOURS:], middle))
    low, high = (middle, high) if union_factor(shape, tried) < union else (low, middle)
  return x._replace(iq=_mix(x.iq, common, low))


def decode_inputs(shape: Shape, n: int, batch: int, dtype: str = 'float32', seed: int = 0) -> Inputs:
  """The last token of `batch` rows of n tokens."""
  return _draw(shape, n, batch, np.array([n - 1], np.int32), dtype, seed)[0]


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
def _union_factor(shape: Shape, iq, ik, gate, q_segment, k_segment, q_order, k_order) -> jax.Array:
  """By a sort of the scores, of which few queries have few; keys that tie with the last one count too."""
  mask_TS = visible(q_segment[0, :, None], k_segment, q_order[0, :, None], k_order, causal=True)
  score_TS = jnp.where(mask_TS, reference.score(iq, ik, gate)[0], -jnp.inf)
  mask_TS &= score_TS >= jax.lax.top_k(score_TS, shape.topk)[0][:, -1:]
  return mask_TS.reshape(-1, NEIGHBOURS, mask_TS.shape[1]).any(1).sum(-1).mean() / shape.topk


def prepare(shape: Shape, cell: Cell, parts: Sequence[str], x: Inputs) -> Inputs:
  """x with what programs are given that is not theirs to find."""
  if 'attend' in parts:
    x = x._replace(word_CMS=_words(shape.topk, x.everything))
  if cell.phase == 'decode' and set(peers.HEADS_FIRST) & set(parts):
    x = x._replace(heads_first=_heads_first(x.k, x.v))
  return x


_words = jax.jit(bench_attention_cpu.words, static_argnums=0)
_heads_first = jax.jit(lambda k, v: (k.swapaxes(1, 2), v.swapaxes(1, 2)))


def arguments(x: Inputs, direction: str) -> tuple:
  """What the programs of a direction are called with: backward with a cotangent of o too, of the size of q."""
  return (x, x.q) if direction == 'backward' else (x,)


def programs(shape: Shape, phase: str, direction: str) -> dict[str, Callable]:
  """name -> function of `arguments`; `differences` makes parts of them."""
  dense = lambda q, k, v, *place: dense_attention(q, k, v, *place)[0]
  sparse = functools.partial(dsa_attention, topk=shape.topk, want_kl=False)
  masked = functools.partial(sparse, way='masked_dense')
  if direction == 'backward':
    return backward(shape, dense, sparse, masked)
  kernels = dispatch.platform() == 'gpu'
  scores = (bench_attention_gpu if kernels else bench_attention_cpu).score
  found = {'score': lambda x: jax.lax.map(lambda row: scores(*row), x.index),
           'selection': lambda x: index_select(*x.index, topk=shape.topk),
           'dense': lambda x: dense(x.q, x.k, x.v, *x.place), 'masked_dense': lambda x: masked(*x.everything).o_BTHK}
  if phase == 'decode':
    found |= {'sparse': lambda x: dsa_decode(x.q, *paged(x), topk=shape.topk).o_BTHK,
              'cudnn': lambda x: peers.cudnn_decode(x.q, x.k, x.v)}
    if kernels:                # one op: what its selection does not need is not computed
      found |= {'selection': lambda x: dsa_decode(x.q, *paged(x), topk=shape.topk).selection}
    return found | {name: lambda x, fn=fn: fn(x.q, *x.heads_first) for name, fn in peers.HEADS_FIRST.items()}
  found |= {'sparse': lambda x: sparse(*x.everything).o_BTHK,
            'attend': lambda x: bench_attention_cpu.attend(shape.topk, x.everything, x.word_CMS),
            'reference': lambda x: sparse(*last(x, CHECKED).everything, implementation='reference').o_BTHK}
  return found | {name: lambda x, fn=fn: fn(x.q, x.k, x.v) for name, fn in peers.PREFILL.items()}


def backward(shape: Shape, dense, sparse, masked) -> dict[str, Callable]:
  """Gradients of q, k and v (`training`: of the indexer too, through its loss) for a cotangent of o, with o itself."""
  def gradients(fn, count, also=lambda x: ()):
    def run(x, do):
      a = x.everything
      out, pullback = jax.vjp(lambda *floats: fn(*floats, *also(x)), *a[:count])
      return out, pullback(jax.tree.map(lambda y: do if y.ndim == 4 else jnp.ones_like(y), out))
    return run

  def training(*a):
    out = dsa_attention(*a, topk=shape.topk)
    return out.o_BTHK, out.kl_BT

  place = lambda x: x.place
  found = {'sparse': gradients(lambda *a: sparse(*a).o_BTHK, 3, lambda x: x.index),
           'training': gradients(training, 6, place), 'dense': gradients(dense, 3, place),
           'masked_dense': gradients(lambda *a: masked(*a).o_BTHK, 3, lambda x: x.index)}
  return found | {name: gradients(fn, 3) for name, fn in peers.PREFILL.items()}


def paged(x: Inputs) -> tuple:
  """Arguments of dsa_decode behind q: one new token of each sequence against caches in pages."""
  B, n = x.k.shape[:2]
  pages = -(-n // PAGE)

  def cut(a):
    a = jnp.pad(a, ((0, 0), (0, pages * PAGE - n), *((0, 0),) * (a.ndim - 2))) if n % PAGE else a
    return a.reshape(B * pages, PAGE, *a.shape[2:])

  table = jnp.arange(B * pages, dtype=jnp.int32).reshape(B, pages)
  return Pages(cut(x.k), cut(x.v), cut(x.ik), None), x.iq, x.gate, table, jnp.full(B, n, jnp.int32)


def differences(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
  """Seconds of each part, round by round, from those of the programs that were timed. `selection` stays one part where
  scores were not timed alone; `attend` is a difference where it was not."""
  less = lambda a, b: [max(x - y, 0.0) for x, y in zip(seconds[a], seconds[b])]
  out = dict(seconds)
  if {'selection', 'score'} <= set(seconds):
    del out['selection']
    out['select'] = less('selection', 'score')
  if 'attend' not in seconds and {'selection', 'sparse'} <= set(seconds):
    out['attend'] = less('sparse', 'selection')
  return out


def work(shape: Shape, n: int, part: Part, u: float, batch: int = 1, width: int = 4, share: int = 1) -> dict[str, int]:
  """FLOPs (2 a multiply-add) and least bytes of a part, of one in `share` queries of causal rows or of one new token
  after n - 1 in each, in numbers of `width` bytes.

  `masked_dense` multiplies every visible pair, `sparse` and `attend` the selected ones, whose keys are read once for
  the union of 16 queries. `select` has no products: it reads the float32 scores once. `selection` is `score` and
  `select`. Backward is five products of each pair beside the two of forward, the scores once more, and reads and writes
  each array and its gradient; the indexer's loss of `training` adds one product forward and the indexer's four. Scores
  stay on the chip.
  """
  H, G, K, I, J, k = shape
  seen_T = 1 + (np.array([n - 1]) if part.phase == 'decode' else places(n, share)).astype(np.int64)
  T, pairs, selected = len(seen_T), int(seen_T.sum()), int(np.minimum(seen_T, k).sum())
  queries, keys, index = 2 * T * H * K, 2 * n * G * K, T * I * (J + 1) + n * J
  gathered = (selected if T == 1 else int(u * selected / NEIGHBOURS)) * 2 * G * K
  score, product = 2 * pairs * I * J, 2 * H * K
  if part.direction == 'forward':
    dense = 2 * product * pairs, queries + keys
    found = {'score': (score, index), 'select': (0, pairs * 4 // width), 'selection': (score, index),
             'attend': (2 * product * selected, queries + gathered),
             'masked_dense': (score + dense[0], index + dense[1]),
             'sparse': (score + 2 * product * selected, index + queries + gathered)}
  else:
    ends = 3 * queries                                                 # q, o; q, o, do, dq
    dense = 7 * product * pairs, ends + 3 * keys                       # k, v; k, v, dk, dv
    sparse = 2 * score + 7 * product * selected, 2 * index + ends + 2 * gathered + keys
    found = {'masked_dense': (2 * score + dense[0], 2 * index + dense[1]), 'sparse': sparse,
             'training': (sparse[0] + (product + 4 * 2 * I * J) * selected, sparse[1] + index)}
  flops, numbers = dense if part.name in DENSE else found[part.name]
  return {'flops': batch * flops, 'bytes': batch * numbers * width}
