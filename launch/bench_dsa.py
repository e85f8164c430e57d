"""`keye bench model --dsa N`: the parts of sparse attention of one layer as the sequence grows, beside dense attention.

T tokens, S keys, I indexer heads, J indexer head dim, H query heads, G KV heads, K head dim.
"""
import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from data_pipelines.errors import InputError
from keye_jax.nn import keye
from launch import bench_attention_cpu, bench_model, bench_rounds, results
from launch.bench_timing import timed
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.index_select import index_select

SMALLEST = 8192
LONG = 10.0            # seconds of a call above which the first one after compiling counts, else the better of two


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
  n, seconds = found['prefill tokens'], found['prefill seconds']
  slower = seconds['sparse'] > seconds['dense']
  return {
      'claim': f'on a CPU a prefill of {n} tokens takes no longer with sparse attention than with dense, even '
               'with random weights, whose queries have no keys in common',
      'command': results.command(sys.argv[1:]), 'commit': results.commit(), 'hardware': results.hardware(),
      'versions': results.versions(), 'n': 1, 'baselines': {'dense': {'prefill seconds': seconds['dense']}},
      'arms': {'sparse': {'0': {'prefill seconds': seconds['sparse']}}}, 'intervals': {}, **found,
      'verdict': 'not shown' if slower else 'shown',
      'why': f'sparse takes {seconds["sparse"] / seconds["dense"]:.2f} of the time of dense attention'}


def table(out: dict) -> str:
  lines = [f'{name:<10} ' + '  '.join(f'{n}: {s:.2f} s' for n, s in row.items()) +
           (f'  grows as n^{power:.2f}' if (power := out['exponents'][name]) else '')
           for name, row in out['seconds'].items()]
  return '\n'.join([*lines, f'{out["verdict"]}: {out["why"]}'])


def measure(tokens: int, say: Callable[[str], None], smallest: int = SMALLEST, config=bench_model.MODEL) -> dict:
  """Seconds of each part at `smallest`, twice that, ... up to `tokens`, the exponent of its growth, and prefill of the
  whole model at `tokens`. Raises InputError when there are not at least two lengths.

  score: all index scores, reduced to their maxima. select: what the exact top-k adds to that. attend: attention to a
  selection that is given. sparse: the fused op of the three, without the indexer's loss.
  """
  sizes = [smallest * 2 ** i for i in range(32) if smallest * 2 ** i <= tokens]
  if len(sizes) < 2:
    raise InputError(f'keye bench: --dsa {tokens} leaves one length or none; it starts at {smallest} and doubles')
  seconds = {}
  for n in sizes:
    row = parts(bench_model.sparse(config), n)
    for name, s in row.items():
      seconds.setdefault(name, {})[str(n)] = s
    say(f'{n} tokens, one layer: ' + ', '.join(f'{name} {s:.2f} s' for name, s in row.items()) +
        (f'; {sizes[-1]} in about {sum(row.values()) * (sizes[-1] / n) ** 2:.0f} s' if n < sizes[-1] else ''))
  prefill = {}
  for name, c in (('dense', config), ('sparse', bench_model.sparse(config))):
    prefill[name] = after_compiling(*bench_model.reading(c, keye.init(c, jax.random.key(0)), sizes[-1]))
    say(f'prefill of {sizes[-1]} tokens, {name}: {prefill[name]:.1f} s')
  growth = {name: bench_rounds.exponent(sizes, list(row.values())) if min(row.values()) > 0 else None
            for name, row in seconds.items()}
  return {'topk': bench_model.INDEXER.topk, 'seconds': seconds, 'exponents': growth,
          'prefill tokens': sizes[-1], 'prefill seconds': prefill}


def after_compiling(fn, *args) -> float:
  """Seconds of a jitted function, compiled before: of the first call when it is LONG, else of the better of two."""
  program = fn.lower(*args).compile()
  first = timed(program, *args)[0]
  return first if first > LONG else min(first, timed(program, *args)[0])


def parts(config, n: int) -> dict[str, float]:
  """Seconds of one layer's attention over a row of n tokens."""
  t, index = config.text, config.text.indexer
  keys = iter(jax.random.split(jax.random.key(0), 6))
  normal = lambda *shape: jax.random.normal(next(keys), (1, n, *shape))
  q, k, v = normal(t.heads, t.head_dim), normal(t.kv_heads, t.head_dim), normal(t.kv_heads, t.head_dim)
  iq, ik, gate = normal(index.heads, index.head_dim), normal(index.head_dim), normal(index.heads)
  segment, order = jnp.full((1, n), 1 << 8, jnp.int32), jnp.arange(n, dtype=jnp.int32)[None]
  place = segment, segment, order, order
  sparse = functools.partial(dsa_attention, topk=index.topk, want_kl=False)
  select = jax.jit(functools.partial(index_select, topk=index.topk))
  everything = q, k, v, iq, ik, gate, *place
  words = jax.jit(functools.partial(bench_attention_cpu.words, index.topk))(everything)

  score = after_compiling(jax.jit(bench_attention_cpu.score), *(a[0] for a in (iq, ik, gate, *place)))
  return {
      'dense': after_compiling(jax.jit(lambda *a: dense_attention(*a)[0]), q, k, v, *place),
      'score': score,
      'select': after_compiling(select, iq, ik, gate, *place) - score,
      'attend': after_compiling(jax.jit(functools.partial(bench_attention_cpu.attend, index.topk)), everything, words),
      'sparse': after_compiling(jax.jit(lambda *a: sparse(*a).o_BTHK), *everything),
  }
