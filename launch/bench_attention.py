"""`keye bench attention`: one layer's attention in the shape of Keye-VL-2.0-30B-A3B as the row grows, dense and sparse.

32 query and 4 KV heads of 128, an indexer of 16 heads of 64, k = 2048, float32, forward. Rows of 8192 tokens, twice as
many, ... What sparse attention costs depends on how far the picks of neighbouring queries agree: u(16), the keys that
16 neighbours select together over k, is 1 when they are the same. Inputs are made, from a seed, so that u is about 1,
2, 4 and 8 at the end of the row, and 'random' for queries that have nothing in common; what u really is stands in each
row, since short rows do not hold enough keys for a large one.

    dense     blocked dense attention
    score     all index scores, reduced to their maxima
    select    what the exact top-k adds to that
    attend    replay of a selection less its scores: the fused op never holds its parts apart
    forward   the fused op as it is used, without the indexer's loss

T tokens, S keys, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim.
"""
import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import InputError
from launch import bench_model, bench_rounds, results
from launch.bench_dsa import score_maxima
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.index_select import Selection, index_select, select_mask

SMALLEST = 8192
NEIGHBOURS = 16                # queries of u
UNIONS = (1, 2, 4, 8, 'random')
HEADLINE = 4                   # of the aims, and of the parts that do not depend on u
AIM_LENGTH, AIM_RATIO, AIM_EXPONENT = 65536, 1.2, 1.1
BYTES = 4                      # float32
CLAIM = (f'on a CPU at Keye\'s block shape and u = {HEADLINE}, sparse attention is at least {AIM_RATIO} times as fast '
         f'as blocked dense attention at {AIM_LENGTH} tokens, and its attend grows at most as S^{AIM_EXPONENT}')


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


def run(args: argparse.Namespace) -> int:
  """Called by launch/bench.py once the threads are limited."""
  sizes = lengths(args.max_length)
  rows = measure(Shape(), sizes, UNIONS, args.rounds, lambda text: print(text, file=sys.stderr, flush=True))
  out = record(rows, sizes, args.rounds)
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1) + '\n')
  print(json.dumps(out) if args.json else table(out))
  return 0


def lengths(most: int) -> list[int]:
  """8192 and its doubles up to `most`. Raises InputError when there is no growth to see."""
  sizes = [SMALLEST * 2 ** i for i in range(32) if SMALLEST * 2 ** i <= most]
  if len(sizes) < 2:
    raise InputError(f'keye bench attention: --max-length {most} leaves one length or none; it starts at {SMALLEST} '
                     'and doubles')
  return sizes


def measure(shape: Shape, sizes: Sequence[int], unions: Sequence, rounds: int,
            say: Callable[[str], None]) -> list[dict]:
  """One row a part, length and u: seconds (best and median of the rounds), FLOPs, bytes, temporaries, whether void."""
  probe, rows = bench_model.probe(), []
  for n in sizes:
    for union in unions:
      x = inputs(shape, n, union)
      u = union_factor(shape, x)
      programs = parts(shape, x, whole=union == HEADLINE)
      temporary = {name: fn.lower(*a).compile().memory_analysis().temp_size_in_bytes
                   for name, (fn, a) in programs.items()}
      for fn, a in programs.values():
        jax.block_until_ready(fn(*a))                              # compiles
      sides = {name: lambda fn=fn, a=a: bench_model.timed(fn, *a)[0] for name, (fn, a) in programs.items()}
      found = bench_rounds.alternate(sides, probe, rounds)
      rows += [{'part': part, 'tokens': n, 'union': union, 'u': round(u, 3), 'seconds': {
                    'best': min(seconds), 'median': float(np.median(seconds))},
                **work(shape, n, part, u), 'temp bytes': temporary.get(part), 'void': bench_rounds.void(found)}
               for part, seconds in differences(found.seconds).items()]
      say(f'{n} tokens, u = {u:.2f}: ' + ', '.join(f'{r["part"]} {r["seconds"]["best"]:.2f} s' for r in rows
                                                   if r['tokens'] == n and r['union'] == union))
  return rows


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


def union_factor(shape: Shape, x: Inputs, tiles: int = 4) -> float:
  """Keys that NEIGHBOURS neighbouring queries select together over k, mean of the last `tiles` tiles of a row."""
  n, count = x.iq.shape[1], tiles * NEIGHBOURS
  last = lambda a: a[:, n - count:]
  segment, order = x.place[0], x.place[2]
  return float(_union_factor(shape, last(x.iq), x.ik, last(x.gate), last(segment), segment, last(order), order))


@functools.partial(jax.jit, static_argnums=0)
def _union_factor(shape: Shape, *index) -> jax.Array:
  mask_TS = select_mask(index_select(*index, topk=shape.topk), *index)[0]
  return mask_TS.reshape(-1, NEIGHBOURS, mask_TS.shape[1]).any(1).sum(-1).mean() / shape.topk


def parts(shape: Shape, x: Inputs, whole: bool) -> dict[str, tuple[Callable, tuple]]:
  """name -> (jitted fn, its arguments). `whole`: those too that do not depend on u."""
  select = jax.jit(functools.partial(index_select, topk=shape.topk))
  sparse = lambda selection, *a: dsa_attention(*a, topk=shape.topk, want_kl=False, selection=selection).o_BTHK
  everything = x.q, x.k, x.v, *x.index
  selection = Selection(*jax.block_until_ready(select(*x.index)))
  found = {
      'score': (jax.jit(score_maxima), (x.iq[0], x.ik[0], x.gate[0], x.place[0][0], x.place[2][0])),
      'replay': (jax.jit(sparse), (selection, *everything)),
      'forward': (jax.jit(functools.partial(sparse, None)), everything)}
  if whole:
    found |= {'dense': (jax.jit(lambda *a: dense_attention(*a)[0]), (x.q, x.k, x.v, *x.place)),
              'selection': (select, x.index)}
  return found


def differences(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
  """Seconds of each part, round by round, from those of the programs that were timed."""
  less = lambda a, b: [max(x - y, 0.0) for x, y in zip(seconds[a], seconds[b])]
  out = {name: s for name, s in seconds.items() if name in ('dense', 'score', 'forward')}
  if 'selection' in seconds:
    out['select'] = less('selection', 'score')
  return out | {'attend': less('replay', 'score')}


def work(shape: Shape, n: int, part: str, u: float) -> dict[str, int]:
  """Useful FLOPs (2 a multiply-add) and least bytes of a causal row.

  Of `attend` the FLOPs are those of the selected pairs, while keys are read once for the union of 16 queries.
  `select` has no products: it reads the float32 scores once.
  """
  H, G, K, I, J, k = shape
  pairs = n * (n + 1) // 2
  selected = pairs if n <= k else k * (k + 1) // 2 + (n - k) * k
  queries, keys, index = 2 * n * H * K, 2 * n * G * K, n * (I * J + J + I)
  gathered = int(u * selected / NEIGHBOURS) * 2 * G * K
  flops = {'dense': 4 * pairs * H * K, 'score': 2 * pairs * I * J, 'select': 0, 'attend': 4 * selected * H * K}
  numbers = {'dense': queries + keys, 'score': index, 'select': pairs, 'attend': queries + gathered}
  flops['forward'] = flops['score'] + flops['attend']
  numbers['forward'] = numbers['score'] + numbers['attend']      # scores stay on the chip
  return {'flops': flops[part], 'bytes': numbers[part] * BYTES}


def record(rows: list[dict], sizes: Sequence[int], rounds: int) -> dict:
  """The evidence record: exponents of growth, the two aims, and whether the rows show them."""
  best = lambda part, union, n: next((r['seconds']['best'] for r in rows if (r['part'], r['union'], r['tokens']) ==
                                      (part, union, n)), None)
  growth = {}
  for part, union in dict.fromkeys((r['part'], r['union']) for r in rows):
    seconds = [best(part, union, n) for n in sizes]
    growth[f'{part}, u = {union}'] = bench_rounds.exponent(sizes, seconds) if min(seconds) > 0 else None
  why = sorted({r['void'] for r in rows if r['void']})
  dense, sparse = best('dense', HEADLINE, AIM_LENGTH), best('forward', HEADLINE, AIM_LENGTH)
  ratio, power = dense / sparse if dense and sparse else None, growth.get(f'attend, u = {HEADLINE}')
  if ratio is None:
    why.append(f'nothing was measured at {AIM_LENGTH} tokens')
  elif ratio < AIM_RATIO:
    why.append(f'{ratio:.2f} times as fast at {AIM_LENGTH} tokens, less than {AIM_RATIO}')
  if power is None or power > AIM_EXPONENT:
    why.append(f'attend grows as S^{power:.2f}' if power else 'attend took no measurable time')
  return {'claim': CLAIM, 'command': results.command(sys.argv[1:]), 'commit': results.commit(),
          'hardware': results.hardware(), 'versions': results.versions(), 'n': rounds, 'baselines': {}, 'arms': {},
          'intervals': {}, 'rows': rows, 'exponents': growth, f'dense over forward at {AIM_LENGTH}': ratio,
          'verdict': 'not shown' if why else 'shown', 'why': '; '.join(why)}


def table(out: dict) -> str:
  lines = [f'{"part":<8} {"u":>7} {"tokens":>8} {"best s":>9} {"GFLOP/s":>8} {"GB":>8} {"temp MiB":>9}']
  for r in out['rows']:
    s = r['seconds']['best']
    speed = f'{r["flops"] / s / 1e9:.1f}' if s > 0 and r['flops'] else '-'
    temp = f'{r["temp bytes"] / 2**20:.0f}' if r['temp bytes'] is not None else '-'
    lines.append(f'{r["part"]:<8} {r["u"]:>7.2f} {r["tokens"]:>8} {s:>9.3f} {speed:>8} {r["bytes"] / 1e9:>8.2f} '
                 f'{temp:>9}' + ('  VOID' if r['void'] else ''))
  lines += [f'{name}: S^{power:.2f}' for name, power in out['exponents'].items() if power is not None]
  return '\n'.join([*lines, f'{out["verdict"]}: {out["why"] or out["claim"]}'])
