"""`keye bench attention`: one layer's attention in the shape of Keye-VL-2.0-30B-A3B as the row grows: dense, masked
dense and sparse.

32 query and 4 KV heads of 128, an indexer of 16 heads of 64, k = 2048, float32. What sparse attention costs depends on
how far the picks of neighbouring queries agree: u(16), the keys that 16 neighbours select together over k, is 1 when
they are the same. Inputs are made, from a seed, so that u is about 1, 2, 4 and 8 at the end of the row, and 'random'
for queries that have nothing in common; what u really is stands in each row, since short rows do not hold enough keys
for a large one.

    dense          blocked dense attention
    masked_dense   the fused op over every key tile that holds a selected key, under the mask of the selection
    sparse         the fused op by the way that the lengths choose (pallas_kernels/dsa_attention/way.py), without the
                   indexer's loss; in decoding caches in pages (pallas_kernels/dsa_decode)
    score          all index scores, reduced to their maxima
    select         what the exact top-k adds to that
    attend         replay of a selection less its scores; in decoding `sparse` less a selection
    training       backward only: the fused op with the indexer's loss and all gradients, what an update runs

Backward is the forward pass and the gradients of q, k and v; decode one new token after the others. Rows that do not
depend on u are measured once, beside the inputs of u = 4, or beside the first when that is not asked for. Each has its
FLOPs, least bytes and the fraction of this device's roofline, which is measured in the same run.
"""
import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines.errors import InputError
from launch import bench_attention_parts as parts
from launch import bench_model, bench_roofline, bench_rounds, results
from launch.bench_attention_parts import Part, Shape

LENGTHS = (8192, 16384, 32768, 65536)
UNIONS = (1, 2, 4, 8, 'random')
KINDS = (('prefill', 'forward'), ('prefill', 'backward'), ('decode', 'forward'))
HEADLINE = 4                   # of the aims
AIM_LENGTH, AIM_RATIO, AIM_EXPONENT = 65536, 1.2, 1.1
CLAIM = (f'on a CPU at Keye\'s block shape and u = {HEADLINE}, sparse attention is at least {AIM_RATIO} times as fast '
         f'as blocked dense attention at {AIM_LENGTH} tokens, and its attend grows at most as S^{AIM_EXPONENT}')


class What(NamedTuple):
  lengths: Sequence[int] = LENGTHS
  unions: Sequence[int | str] = UNIONS
  kinds: Sequence[tuple[str, str]] = KINDS       # (phase, direction)


def run(args: argparse.Namespace) -> int:
  """Called by launch/bench.py once the threads are limited."""
  what, shape = chosen(args), Shape()
  roof = bench_roofline.measure()
  rows = measure(shape, what, roof, args.rounds, lambda text: print(text, file=sys.stderr, flush=True))
  out = record(rows, what.lengths, roof, args.rounds)
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1) + '\n')
  print(json.dumps(out) if args.json else table(out))
  return 0


def chosen(args: argparse.Namespace) -> What:
  """Raises InputError for a length at which nothing is left out, or when no row is left."""
  lengths = sorted(set(args.length or LENGTHS))
  if lengths[0] <= Shape().topk:
    raise InputError(f'--length {lengths[0]}: a row needs more than k = {Shape().topk} tokens, '
                     'else all of them are selected')
  kinds = [k for k in KINDS if k[0] in (args.phase or k) and k[1] in (args.direction or k)]
  if not kinds:
    raise InputError('decoding has no backward pass; choose another --phase or --direction')
  return What(lengths, [u for u in UNIONS if str(u) in (args.union or map(str, UNIONS))], kinds)


def measure(shape: Shape, what: What, roof: bench_roofline.Roofline, rounds: int,
            say: Callable[[str], None]) -> list[dict]:
  """One row a part, length and u: seconds (best and median of the rounds), FLOPs, bytes, fraction of the roofline,
  temporaries, whether void."""
  probe, rows = bench_model.probe(), []
  once = HEADLINE if HEADLINE in what.unions else what.unions[0]
  for n in what.lengths:
    for union in what.unions:
      x = parts.inputs(shape, n, union)
      u = parts.union_factor(shape, x)
      for phase, direction in what.kinds:
        if phase == 'decode' and union != once:         # one query shares with nobody
          continue
        made = {name: (jax.jit(fn).lower(*a).compile(), a) for name, (fn, a) in
                parts.programs(shape, x, phase, direction, union == once).items()}
        warm = sum(bench_model.timed(fn, *a)[0] for fn, a in made.values())
        say(f'{n} tokens, u = {u:.2f}, {phase} {direction}: about {warm * rounds:.0f} s')
        sides = {name: lambda fn=fn, a=a: bench_model.timed(fn, *a)[0] for name, (fn, a) in made.items()}
        found = bench_rounds.alternate(sides, probe, rounds)
        for name, seconds in parts.differences(found.seconds).items():
          need = parts.work(shape, n, Part(phase, direction, name), u)
          best, program = min(seconds), made.get(name)
          rows.append({'phase': phase, 'direction': direction, 'part': name, 'tokens': n, 'union': union,
                       'u': round(u, 3), 'seconds': {'best': best, 'median': float(np.median(seconds))}, **need,
                       'roofline': bench_roofline.fraction(roof, need['flops'], need['bytes'], best),
                       'temp bytes': program and program[0].memory_analysis().temp_size_in_bytes,
                       'void': bench_rounds.void(found)})
  return rows


def record(rows: list[dict], sizes: Sequence[int], roof: bench_roofline.Roofline, rounds: int) -> dict:
  """The evidence record: exponents of growth, how much faster than dense attention, the two aims, and whether the rows
  show them."""
  seconds = {(Part(r['phase'], r['direction'], r['part']), r['union'], r['tokens']): r['seconds']['best'] for r in rows}
  growth = {}
  for part, union in dict.fromkeys((part, union) for part, union, _ in seconds):
    of = [seconds[part, union, n] for n in sizes]
    growth[', '.join(part) + f', u = {union}'] = (
        bench_rounds.exponent(sizes, of) if len(sizes) > 1 and min(of) > 0 else None)
  dense = {(part[:2], n): s for (part, _, n), s in seconds.items() if part.name == 'dense'}
  faster = {f'{", ".join(part)}, u = {union}, {n} tokens': dense[part[:2], n] / s
            for (part, union, n), s in seconds.items()
            if part.name in ('masked_dense', 'sparse') and s > 0 and (part[:2], n) in dense}
  why = sorted({r['void'] for r in rows if r['void']})
  name = f'prefill, forward, {{}}, u = {HEADLINE}'
  ratio, power = faster.get(f'{name.format("sparse")}, {AIM_LENGTH} tokens'), growth.get(name.format('attend'))
  if ratio is None:
    why.append(f'nothing was measured at {AIM_LENGTH} tokens and u = {HEADLINE}')
  elif ratio < AIM_RATIO:
    why.append(f'{ratio:.2f} times as fast at {AIM_LENGTH} tokens, less than {AIM_RATIO}')
  if power is None or power > AIM_EXPONENT:
    why.append(f'attend grows as S^{power:.2f}' if power else 'the growth of attend was not measured')
  return {'claim': CLAIM, 'command': results.command(sys.argv[1:]), 'commit': results.commit(),
          'hardware': results.hardware(), 'versions': results.versions(), 'n': rounds, 'baselines': {}, 'arms': {},
          'intervals': {}, 'roofline': roof._asdict(), 'rows': rows, 'exponents': growth,
          'times as fast as dense': faster, 'verdict': 'not shown' if why else 'shown', 'why': '; '.join(why)}


def table(out: dict) -> str:
  lines = [f'{"phase":<8} {"direction":<9} {"part":<13} {"u":>7} {"tokens":>8} {"best s":>9} {"GFLOP/s":>8} {"GB":>8} '
           f'{"roofline":>8} {"temp MiB":>9}']
  for r in out['rows']:
    s = r['seconds']['best']
    speed = f'{r["flops"] / s / 1e9:.1f}' if s > 0 and r['flops'] else '-'
    share = f'{r["roofline"]:.2f}' if r['roofline'] is not None else '-'
    temp = f'{r["temp bytes"] / 2**20:.0f}' if r['temp bytes'] is not None else '-'
    lines.append(f'{r["phase"]:<8} {r["direction"]:<9} {r["part"]:<13} {r["u"]:>7.2f} {r["tokens"]:>8} {s:>9.3f} '
                 f'{speed:>8} {r["bytes"] / 1e9:>8.2f} {share:>8} {temp:>9}' + ('  VOID' if r['void'] else ''))
  lines.append('roofline: {flops:.3g} FLOP/s, {bandwidth:.3g} bytes/s'.format(**out['roofline']))
  lines += [f'{name}: S^{power:.2f}' for name, power in out['exponents'].items() if power is not None]
  lines += [f'{name}: {ratio:.2f} times as fast as dense' for name, ratio in out['times as fast as dense'].items()]
  return '\n'.join([*lines, f'{out["verdict"]}: {out["why"] or out["claim"]}'])
