"""The evidence record of `keye bench attention`, from its rows: what grew how, what is how much faster than dense
attention, the aims, and whether the rows show them."""
import importlib.metadata
import math
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence

import jax

from launch import bench_rounds, results
from launch.bench_attention_settings import DENSE, GROWING, HEADLINE, LINEAR, Aim, Part, Setting
from launch.bench_roofline import Roofline
from pallas_kernels import dispatch

OFF = 0.02             # of an output from its definition, relative; bfloat16 alone leaves some 0.004
PACKAGES = ('jax', 'jaxlib', 'jax-cuda13-plugin', 'jax-cuda12-plugin', 'nvidia-cudnn-cu13', 'nvidia-cudnn-cu12',
            'tokamax', 'numpy')
DRIVER, NUMBER = pathlib.Path('/proc/driver/nvidia/version'), r' (\d+\.\d+(\.\d+)?) '


def named(part: Part, union: int | str, tokens: int | None = None, batch: int = 1) -> str:
  return ', '.join([*part, f'u = {union}', *([f'{tokens} tokens'] if tokens else []),
                    *([f'batch {batch}'] if batch > 1 else [])])


def of_rows(rows: Sequence[dict], value: Callable[[dict], float | None]) -> dict[tuple, float]:
  """(Part, u, tokens, batch) -> value, of the rows that were measured and have one."""
  return {(Part(r['phase'], r['direction'], r['part']), r['union'], r['tokens'], r['batch']): value(r)
          for r in rows if 'error' not in r and value(r) is not None}


def best(row: dict) -> float:
  return row['seconds']['best']


def median(row: dict) -> float:
  return row['seconds']['median']


def least_favourable(row: dict) -> float:
  """Seconds of the round of a row that makes us look worst beside dense attention."""
  return row['seconds']['best' if row['part'] in DENSE else 'worst']


def steepest(rows: Sequence[dict], sizes: Sequence[int]) -> list[dict]:
  """The rows with the seconds that make the largest exponents: best of short rows, worst of long ones."""
  middle = math.exp(sum(map(math.log, sizes)) / len(sizes))
  pick = lambda row: 'worst' if row['tokens'] > middle else 'best'
  return [row if 'error' in row else row | {'seconds': {'best': row['seconds'][pick(row)]}} for row in rows]


def growth(values: dict[tuple, float], sizes: Sequence[int]) -> dict[str, float | None]:
  """Exponent of seconds or bytes of each part and u over the lengths at which they were measured."""
  out = {}
  for part, union, batch in dict.fromkeys((part, union, batch) for part, union, _, batch in values):
    of = [(n, values[part, union, n, batch]) for n in sizes if (part, union, n, batch) in values]
    fits = len(of) > 1 and min(s for _, s in of) > 0
    out[named(part, union, batch=batch)] = bench_rounds.exponent(*zip(*of)) if fits else None
  return out


def fastest_dense(seconds: dict[tuple, float]) -> dict[tuple, tuple[float, str]]:
  """(phase, direction, tokens, batch) -> (seconds, part)."""
  out: dict[tuple, tuple[float, str]] = {}
  for (part, _, tokens, batch), s in seconds.items():
    k = (*part[:2], tokens, batch)
    if part.name in DENSE:
      out[k] = min(out.get(k, (float('inf'), '')), (s, part.name))
  return out


def ratios(seconds: dict[tuple, float]) -> dict[str, float]:
  """How many times as fast as the fastest dense attention."""
  dense = fastest_dense(seconds)
  return {named(part, union, tokens, batch): dense[*part[:2], tokens, batch][0] / s
          for (part, union, tokens, batch), s in seconds.items()
          if part.name in ('masked_dense', 'sparse', 'attend', 'training') and s > 0
          and (*part[:2], tokens, batch) in dense}


def reached(aim: Aim, faster: dict[str, float]) -> float | None:
  return faster.get(named(aim.part, HEADLINE if aim.part.phase == 'prefill' else 1, aim.tokens, aim.batch))


def lacks(rows: Sequence[dict], setting: Setting, faster: dict[str, float], powers: dict[str, float | None],
          sizes: dict[str, float | None]) -> list[str]:
  """What the claim lacks; [] when the rows show it."""
  why = sorted({r['void'] for r in rows if r.get('void')})
  why += [f'{r["phase"]} at {r["tokens"]} tokens is off by {r["off"]:.2g}' for r in rows if (r.get('off') or 0) > OFF]
  for aim in setting.aims:
    ratio = reached(aim, faster)
    if ratio is None:
      why.append(f'{aim.name}: not measured')
    elif ratio < aim.least:
      why.append(f'{aim.name}: {ratio:.2f} times as fast, less than {aim.least}')
  if setting.exponent:
    for what, power in (('attend grows', powers.get(named(GROWING, LINEAR))),
                        ('temporaries grow', sizes.get(named(GROWING._replace(name='sparse'), HEADLINE)))):
      if power is None or power > setting.exponent:
        why.append(f'{what} as S^{power:.2f}' if power else f'how {what} was not measured')
  return why


def record(rows: Sequence[dict], sizes: Sequence[int], setting: Setting, roof: Roofline, rounds: int,
           left_out: Sequence[str] = (), before: Sequence[dict] = ()) -> dict:
  """What is claimed to be faster is judged by the best rounds, on a watched machine by the least favourable ones of the
  two; growth, which compares rounds that did not take turns, by the medians. before: of the runs that measured the
  first rows, see `this_run`."""
  seconds = of_rows(rows, best)
  powers, faster, bytes_ = growth(seconds, sizes), ratios(seconds), growth(of_rows(rows, temporaries), sizes)
  sure = ratios(of_rows(rows, least_favourable)) if setting.watched else faster
  medians = growth(of_rows(rows, median), sizes)
  steep = growth(of_rows(steepest(rows, sizes), best), sizes)
  why = lacks(rows, setting, sure, medians, bytes_)
  return {'claim': setting.claim, 'command': results.command(sys.argv[1:]), 'commit': results.commit(),
          'hardware': results.hardware(), 'versions': versions(), 'n': rounds,
          'earlier runs': list(before),
          'baselines': {}, 'arms': {}, 'intervals': {},
          'dtype': setting.dtype, 'roofline': roof._asdict(), 'peak bytes': peak(), 'rows': list(rows),
          'left out': list(left_out), 'platform': dispatch.platform(), 'share': setting.share, 'exponents': powers,
          'exponents of medians': medians, 'steepest': steep.get(named(GROWING, LINEAR)),
          'exponents of temporaries': bytes_,
          'fastest dense': {', '.join(map(str, k)): name for k, (_, name) in fastest_dense(seconds).items()},
          'times as fast as dense': faster,
          'aims': [{'aim': a.name, 'at least': a.least, 'reached': reached(a, sure)} for a in setting.aims],
          'verdict': 'not shown' if why else 'shown', 'why': '; '.join(why)}


def this_run(out: Mapping) -> dict:
  """What a record says of the run that wrote it last."""
  return {name: out[name] for name in ('command', 'commit', 'hardware', 'versions', 'n', 'roofline')}


def temporaries(row: dict) -> int | None:
  return row['temp bytes']


def versions() -> dict[str, str]:
  """Of what a timing depends on, as far as it is installed."""
  out = {'python': sys.version.split()[0]}
  for name in PACKAGES:
    try:
      out[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return out | ({'driver': said[1]} if DRIVER.exists() and (said := re.search(NUMBER, DRIVER.read_text())) else {})


def peak() -> int | None:
  """Most bytes of the device that were in use at a time, where it counts them."""
  return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def summary(rows: Sequence[dict]) -> str:
  """The rows of a cell in one line."""
  return ', '.join(f'{r["part"]}: {r["error"]}' if 'error' in r else f'{r["part"]} {r["seconds"]["best"] * 1e3:.2f} ms'
                   for r in rows)


def table(out: dict) -> str:
  lines = [f'{"phase":<8} {"direction":<9} {"part":<13} {"u":>7} {"tokens":>8} {"batch":>5} {"best s":>9} '
           f'{"median s":>9} {"TFLOP/s":>8} {"GB":>8} {"roofline":>8} {"temp MiB":>9}']
  for r in out['rows']:
    front = f'{r["phase"]:<8} {r["direction"]:<9} {r["part"]:<13} '
    if 'error' in r:
      lines.append(f'{front}{r["union"]:>7} {r["tokens"]:>8} {r["batch"]:>5} {r["error"]}')
      continue
    s = r['seconds']['best']
    speed = f'{r["flops"] / s / 1e12:.3f}' if s > 0 and r['flops'] else '-'
    share = f'{r["roofline"]:.2f}' if r['roofline'] is not None else '-'
    temp = f'{r["temp bytes"] / 2**20:.0f}' if r['temp bytes'] is not None else '-'
    lines.append(f'{front}{r["u"]:>7.2f} {r["tokens"]:>8} {r["batch"]:>5} {s:>9.5f} {r["seconds"]["median"]:>9.5f} '
                 f'{speed:>8} {r["bytes"] / 1e9:>8.2f} {share:>8} {temp:>9}'
                 + (f'  off {r["off"]:.1e}' if r['off'] is not None else '') + ('  VOID' if r['void'] else ''))
  lines.append('roofline: {flops:.3g} FLOP/s, {bandwidth:.3g} bytes/s'.format(**out['roofline']))
  lines += [f'{name}: S^{power:.2f}' for name, power in out['exponents'].items() if power is not None]
  lines += [f'{name}, temporaries: S^{power:.2f}' for name, power in out['exponents of temporaries'].items()
            if power is not None]
  lines += [f'{name}: {ratio:.2f} times as fast as dense' for name, ratio in out['times as fast as dense'].items()]
  lines += [f'left out: {what}' for what in out['left out']]
  value = lambda x: 'not measured' if x is None else f'{x:.2f}'
  lines += [f'aim: {a["aim"]} at least {a["at least"]} times as fast: {value(a["reached"])}' for a in out['aims']]
  return '\n'.join([*lines, f'{out["verdict"]}: {out["why"] or out["claim"]}'])
