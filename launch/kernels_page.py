"""The table of docs/kernels.md and its evidence file, from what the ahead-of-time compiler reported:

  python -m pallas_kernels.aot --json | python -m launch.kernels_page
"""
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch import results
from pallas_kernels.aot.rows import LIMITS, SHARDED_LENGTH, SHARDS

PAGE = results.FOLDER.parent / 'kernels.md'
START, END = '<!-- results:kernels_aot -->', '<!-- /results -->'
TPUS = ('v5p', 'v6e', 'tpu7x')
CLAIM = (f'every row compiles, and sparse attention of S/{SHARDS} queries against {SHARDED_LENGTH} keys needs at most '
         '2 GiB of temporaries forward and 4 GiB with its backward pass on v5p, v6e and tpu7x')
MIB = 2**20


def lacks(rows: Sequence[Mapping[str, Any]]) -> str:
  """What the claim lacks; '' when the rows show it."""
  name = lambda row: f'{row["op"]} {row["direction"]} on {row["target"]} at {row["length"]}/{row["shards"]}'
  limited = [row for row in rows if row['limit bytes']]
  missing = {(t, d) for t in TPUS for d in LIMITS} - {(row['target'], row['direction']) for row in limited}
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
           'compile s |', '|---' * 11 + '|']
  for row in said['rows']:
    size = lambda name, row=row: f'{row[name] / MIB:,.0f}' if name in row else '–'
    cells = [row['target'], row['op'], row['direction'], f'{row["length"]:,}', f'{row["length"] // row["shards"]:,}',
             row.get('implementation', row.get('error', '')), size('argument bytes'), size('output bytes'),
             size('temp bytes') + (f' (limit {row["limit bytes"] / MIB:,.0f})' if row['limit bytes'] else ''),
             size('vmem bytes'), str(row.get('seconds', '–'))]
    lines.append(f'| {" | ".join(cells)} |')
  versions = ', '.join(f'{name} {version}' for name, version in said['versions'].items())
  lines += ['', f'Sizes in MiB a device, VMEM that of the largest kernel. `{said["command"]}`, {versions}, commit '
            f'{said["commit"][:10]}, on {said["hardware"]}.', '',
            f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]}'
            + (f' ({said["why"]}).' if said['why'] else '.')]
  return '\n'.join(lines)


def main() -> None:
  record(json.load(sys.stdin))
  said = json.loads((results.FOLDER / 'kernels_aot.json').read_text(encoding='utf-8'))
  before, rest = PAGE.read_text(encoding='utf-8').split(START)
  PAGE.write_text(f'{before}{START}\n{block(said)}\n{END}{rest.split(END)[1]}', encoding='utf-8')


if __name__ == '__main__':
  main()
