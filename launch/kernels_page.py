"""The tables of docs/kernels.md and their evidence files, from what the ahead-of-time compiler reported, or from the
record of `keye bench attention --out FILE` on a CPU or a GPU:

  python -m pallas_kernels.aot --json | python -m launch.kernels_page
  python -m launch.kernels_page FILE
"""
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch import results
from pallas_kernels.aot.rows import LIMITS, SHARDED_LENGTH, SHARDS, TARGETS

PAGE = results.FOLDER.parent / 'kernels.md'
CLAIM = (f'every row compiles, and sparse attention of S/{SHARDS} queries against {SHARDED_LENGTH} keys needs at most '
         f'2 GiB of temporaries forward and 4 GiB with its backward pass on {", ".join(TARGETS)}')
MIB = 2**20


def lacks(rows: Sequence[Mapping[str, Any]]) -> str:
  """What the claim lacks; '' when the rows show it."""
  name = lambda row: f'{row["op"]} {row["direction"]} on {row["target"]} at {row["length"]}/{row["shards"]}'
  limited = [row for row in rows if row['limit bytes']]
  missing = {(t, d) for t in TARGETS for d in LIMITS} - {(row['target'], row['direction']) for row in limited}
  wrong = [f'{name(row)} does not compile' for row in rows if 'error' in row]
  wrong += [f'{name(row)} is over its limit' for row in limited if row.get('temp bytes', 0) > row['limit bytes']]
  wrong += [f'no row of {target} {direction}' for target, direction in sorted(missing)]
  return '; '.join(wrong)


def record(said: Mapping[str, Any]) -> None:
  """Writes docs/results/kernels_aot.json. said: what `python -m pallas_kernels.aot --json` printed."""
  arms: dict[str, dict] = {}
  for row in said['rows']:
    arms.setdefault(row['target'], {'0': {}})['0'].update(
        {f'{row["op"]} {row["direction"]} {row["length"]}/{row["shards"]}: {name}': row[name]
         for name in ('temp bytes', 'vmem bytes') if name in row})
  limits = {f'limit of {direction}': {'temp bytes': limit} for direction, limit in LIMITS.items()}
  results.record('kernels_aot', CLAIM, len(said['rows']), limits, arms, {}, lacks(said['rows']),
                 command=said['command'], versions=said['versions'], rows=said['rows'])


def block(said: Mapping[str, Any]) -> str:
  """The generated part of the page, from the evidence file."""
  lines = ['| device | op | direction | keys | queries | implementation | arguments | results | temporaries | VMEM | '
           'registers | spilled bytes | compile s |', '|---' * 13 + '|']
  for row in said['rows']:
    size = lambda name, row=row: f'{row[name] / MIB:,.0f}' if name in row else '–'
    kernels = row.get('gpu kernels', {}).values()
    most = lambda name, kernels=kernels: str(max(k[name] for k in kernels)) if kernels else '–'
    cells = [row['target'], row['op'], row['direction'], f'{row["length"]:,}', f'{row["length"] // row["shards"]:,}',
             row.get('implementation', row.get('error', '')), size('argument bytes'), size('output bytes'),
             size('temp bytes') + (f' (limit {row["limit bytes"] / MIB:,.0f})' if row['limit bytes'] else ''),
             size('vmem bytes'), most('registers'), most('spill bytes'), str(row.get('seconds', '–'))]
    lines.append(f'| {" | ".join(cells)} |')
  versions = ', '.join(f'{name} {version}' for name, version in said['versions'].items())
  lines += ['', f'Sizes in MiB a device; VMEM, registers of a thread and spills are those of the kernel that '
            f'has most. `{said["command"]}`, {versions}, commit {said["commit"][:10]}, on {said["hardware"]}.', '',
            f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]}'
            + (f' ({said["why"]}).' if said['why'] else '.')]
  return '\n'.join(lines)


def record_timed(said: Mapping[str, Any]) -> str:
  """Writes what the benchmark wrote, of this commit where it ran outside a checkout, and returns the file's name."""
  name = f'kernels_{said["platform"]}'
  whole = {**said, 'commit': said['commit'] or results.commit()}
  (results.FOLDER / f'{name}.json').write_text(json.dumps(whole, indent=1) + '\n', encoding='utf-8')
  return name


def block_timed(said: Mapping[str, Any] | None) -> str:
  """The generated part about a device, from the evidence file; None before there is one."""
  if said is None:
    return 'Nothing is recorded yet.'
  lines = ['| phase | direction | part | tokens | batch | u | best ms | median ms | TFLOP/s | GB | of the roofline |',
           '|---' * 11 + '|']
  for row in said['rows']:
    front = [row['phase'], row['direction'], row['part'], f'{row["tokens"]:,}', str(row['batch'])]
    if 'error' in row:
      cells = [*front, str(row['union']), row['error'].replace('|', '/'), *[''] * 4]
    else:
      best, share = row['seconds']['best'], row['roofline']
      cells = [*front, f'{row["u"]:.2f}', f'{best * 1e3:,.2f}', f'{row["seconds"]["median"] * 1e3:,.2f}',
               number(row['flops'] / best / 1e12) if best and row['flops'] else '–', f'{row["bytes"] / 1e9:,.2f}',
               '–' if share is None else f'{share:.2f}']
    lines.append(f'| {" | ".join(cells)} |')
  lines += ['', '| aim | at least | reached |', '|---|---|---|']
  for aim in said['aims']:
    reached = 'not measured' if aim['reached'] is None else f'{aim["reached"]:.2f}'
    lines.append(f'| {aim["aim"]} | {aim["at least"]} | {reached} |')
  ratios = [f'{name}: {ratio:.2f}' for name, ratio in said['times as fast as dense'].items()]
  roof, checked = said['roofline'], [row['off'] for row in said['rows'] if row.get('off') is not None]
  versions = ', '.join(f'{name} {version}' for name, version in said['versions'].items())
  earlier = [f'`{run["command"]}` (commit {run["commit"][:10]})' for run in said.get('earlier runs', ())]
  lines += ['', f'Times as fast as the fastest dense attention of the same run: {"; ".join(ratios)}.', '',
            *(growth(said) if said['platform'] == 'cpu' else []),
            f'Roofline, measured in the same run: {roof["flops"] / 1e12:.3g} TFLOP/s in {said["dtype"]}, '
            f'{roof["bandwidth"] / 1e12:.3g} TB/s.'
            + (f' The last queries of a row are off their definition by at most {max(checked):.1g}.' if checked else '')
            + (f' Left out: {"; ".join(said["left out"])}.' if said['left out'] else ''),
            '', f'`{said["command"]}`, {versions}, commit {said["commit"][:10]}, on {said["hardware"]}'
            + (f'; its first cells are of {", ".join(earlier)}.' if earlier else '.'), '',
            f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]}'
            + (f' ({said["why"]}).' if said['why'] else '.')]
  return '\n'.join(lines)


def number(x: float) -> str:
  return f'{x:,.1f}' if x >= 1 else f'{x:.3f}'


def growth(said: Mapping[str, Any]) -> list[str]:
  """How time and temporaries grow with the row, in the record of a CPU."""
  powers = [f'{name}{what}: S^{power:.2f}' for key, what in (('exponents', ''), ('exponents of temporaries', ', bytes'))
            for name, power in said[key].items() if power is not None and name.startswith('prefill, forward')]
  attend, worst = said['exponents of medians'].get('prefill, forward, attend, u = 1'), said['steepest']
  medians = attend and worst and (f' By the medians attend at u = 1 grows as S^{attend:.2f}, by the rounds that suit '
                                  f'it least as S^{worst:.2f}.')
  return [f'One query in {said["share"]} of a row is at work. Growth, from the best rounds and of temporaries: '
          f'{"; ".join(powers)}.{medians or ""}', '']


def main(files: Sequence[str]) -> None:
  if files:
    name = record_timed(json.loads(pathlib.Path(files[0]).read_text(encoding='utf-8')))
    results.put(PAGE, name, block_timed(results.read(name)))
  else:
    record(json.load(sys.stdin))
    results.put(PAGE, 'kernels_aot', block(results.read('kernels_aot')))


if __name__ == '__main__':
  main(sys.argv[1:])
