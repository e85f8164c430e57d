"""`keye bench model --dsa N`: the parts of sparse attention of one layer of that model as the sequence grows, beside
dense attention.

    dense    blocked dense attention
    score    all index scores, reduced to their maxima
    select   what the exact top-k adds to that
    attend   attention to a selection that is given
    sparse   the fused op of the three, without the indexer's loss: what a prefill runs

Inputs are those of `keye bench attention` (launch/bench_attention_parts.py), whole rows of them: u(16) is 4, for which
the claims of that benchmark are made, and random, where neighbouring queries have nothing in common.
"""
import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable

import jax

from data_pipelines.errors import InputError
from launch import bench_attention_cpu, bench_model, bench_rounds, results
from launch.bench_attention_parts import Shape, inputs
from launch.bench_attention_settings import HEADLINE
from launch.bench_timing import timed
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.index_select import index_select

SMALLEST = 8192
UNIONS = HEADLINE, 'random'
CLAIM = 'on a CPU sparse attention with u = {} takes no longer than dense attention in a prefill of {} tokens'


def run(args: argparse.Namespace) -> int:
  """Called by launch/bench.py once the threads are limited."""
  if args.peer or args.task:
    raise InputError('keye bench model: --dsa is measured alone, without --peer and --task')
  out = record(measure(args.dsa, lambda text: print(text, file=sys.stderr, flush=True)))
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1) + '\n')
  print(json.dumps(out) if args.json else table(out))
  return 0


def record(found: dict) -> dict:
  """The evidence record of what `measure` found."""
  end = {name: list(row.values())[-1] for name, row in found['seconds'].items()}
  ratios = {union: end[f'sparse, u = {union}'] / end['dense'] for union in UNIONS}
  return {
      'claim': CLAIM.format(HEADLINE, max(map(int, found['seconds']['dense']))),
      'command': results.command(sys.argv[1:]), 'commit': results.commit(), 'hardware': results.hardware(),
      'versions': results.versions(), 'n': 1, 'baselines': {'dense': {'seconds': end['dense']}},
      'arms': {f'u = {union}': {'0': {'seconds': end[f'sparse, u = {union}']}} for union in UNIONS}, 'intervals': {},
      **found, 'verdict': 'shown' if ratios[HEADLINE] <= 1 else 'not shown',
      'why': ', '.join(f'{ratio:.2f} of its time at u = {union}' for union, ratio in ratios.items())}


def table(out: dict) -> str:
  lines = [f'{name:<20} ' + '  '.join(f'{n}: {s:.2f} s' for n, s in row.items()) +
           (f'  grows as n^{power:.2f}' if (power := out['exponents'][name]) else '')
           for name, row in out['seconds'].items()]
  return '\n'.join([*lines, f'{out["verdict"]}: {out["why"]}'])


def measure(tokens: int, say: Callable[[str], None], smallest: int = SMALLEST, config=bench_model.MODEL) -> dict:
  """Seconds of each part at `smallest`, twice that, ... up to `tokens`, and the exponent of its growth. Raises
  InputError when there are not at least two lengths."""
  sizes = [smallest * 2 ** i for i in range(32) if smallest * 2 ** i <= tokens]
  if len(sizes) < 2:
    raise InputError(f'keye bench: --dsa {tokens} leaves one length or none; it starts at {smallest} and doubles')
  t, index, seconds = config.text, bench_model.INDEXER, {}
  shape = Shape(t.heads, t.kv_heads, t.head_dim, index.heads, index.head_dim, min(index.topk, smallest // 4))
  for n in sizes:
    row = parts(shape, n)
    for name, s in row.items():
      seconds.setdefault(name, {})[str(n)] = s
    say(f'{n} tokens, one layer: ' + ', '.join(f'{name} {s:.2f} s' for name, s in row.items()) +
        (f'; {sizes[-1]} in about {2 * sum(row.values()) * (sizes[-1] / n) ** 2:.0f} s' if n < sizes[-1] else ''))
  growth = {name: bench_rounds.exponent(sizes, list(row.values())) if min(row.values()) > 0 else None
            for name, row in seconds.items()}
  return {'topk': shape.topk, 'seconds': seconds, 'exponents': growth}


def parts(shape: Shape, n: int) -> dict[str, float]:
  """Seconds of one layer's attention over a row of n tokens: the better of two after compiling."""
  def best(fn, *args):
    program = jax.jit(fn).lower(*args).compile()
    return min(timed(program, *args)[0] for _ in range(2))

  found = {}
  for union in UNIONS:
    x = inputs(shape, n, union)
    if not found:
      found['dense'] = best(lambda *a: dense_attention(*a)[0], x.q, x.k, x.v, *x.place)
      found['score'] = best(bench_attention_cpu.score, *(a[0] for a in x.index))
    words = jax.jit(functools.partial(bench_attention_cpu.words, shape.topk))(x.everything)
    found |= {
        f'select, u = {union}': best(functools.partial(index_select, topk=shape.topk), *x.index) - found['score'],
        f'attend, u = {union}': best(functools.partial(bench_attention_cpu.attend, shape.topk), x.everything, words),
        f'sparse, u = {union}': best(lambda *a: dsa_attention(*a, topk=shape.topk, want_kl=False).o_BTHK,
                                     *x.everything)}
  return found
