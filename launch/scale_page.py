"""The table of docs/scale.md and its evidence file, from plans, one JSON object a line:

  keye plan --config configs/layouts.py:stage3_v5p_4x4x8 --topology v5p:4x4x8 --json >> plans.jsonl
  python -m launch.scale_page < plans.jsonl
"""
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch import results
from pallas_kernels.aot.__main__ import versions

PAGE = results.FOLDER.parent / 'scale.md'
START, END = '<!-- results:scale -->', '<!-- /results -->'
CLAIM = 'every program planned compiles for its slice and fits into the memory of a device'
GIB = 2**30
SHOWN = ('parameters', 'optimizer', 'arguments', 'temporaries', 'peak', 'hbm')


def name(plan: Mapping[str, Any]) -> str:
  what = '' if plan['what'] == 'train' else f', {plan["what"]}'
  return ' '.join([plan['config'].partition(':')[2] or plan['config'], *plan['overrides']]) + what


def lacks(plans: Sequence[Mapping[str, Any]]) -> str:
  """What the claim lacks; '' when the plans show it."""
  return '; '.join(f'{name(p)} does not fit on {p["topology"]}' for p in plans if not p['bytes']['fits'])


def record(plans: Sequence[Mapping[str, Any]]) -> None:
  """Writes docs/results/scale.json."""
  arms = {f'{name(p)} on {p["topology"]}': {'0': p['bytes'] | {k: p[k] for k in (
      'flops', 'masked_flops', 'hbm_bytes', 'compute_s', 'hbm_s', 'ici_s', 'step_s', 'model_flops_bound_s')}}
          for p in plans}
  results.record('scale', CLAIM, len(plans), {}, arms, {}, lacks(plans),
                 command='keye plan --config ... --topology ... --json, once for each row of plans',
                 versions=versions(), plans=plans)


def block(said: Mapping[str, Any]) -> str:
  """The generated part of the page, from the evidence file."""
  lines = ['| plan | slice | data x context x expert | batch | parameters | optimizer | arguments | temporaries | '
           'peak | HBM | fits | compile s |', '|---' * 12 + '|']
  for p in said['plans']:
    size = p['bytes']
    cells = [name(p), p['topology'], ' x '.join(str(n) for n in p['mesh'].values()), p['batch'],
             *(f'{size[k] / GIB:.1f}' if k in size else '–' for k in SHOWN), 'yes' if size['fits'] else '**no**',
             f'{size["compile seconds"]:.0f}']
    lines.append(f'| {" | ".join(cells)} |')
  lines += ['', 'Sizes in GiB a device.', '',
            '| plan | compute_s, selected keys alone | compute_s, every visible tile | hbm_s | ici_s | step_s | '
            'model-FLOPs bound, s | TFLOP a device | on masked places, at most | sent GiB: data, context, expert |',
            '|---' * 10 + '|']
  for p in said['plans']:
    sent = ', '.join(f'{p["sent_bytes"].get(axis, 0) / GIB:.0f}' for axis in p['mesh'])
    low = max(p['compute_s_without_masked'], p['hbm_s'], p['ici_s'])
    cells = [name(p), *(f'{p[k]:.1f}' for k in ('compute_s_without_masked', 'compute_s', 'hbm_s', 'ici_s')),
             f'{low:.1f} to {p["step_s"]:.1f}' if p['masked_flops'] else f'{low:.1f}',
             f'{p["model_flops_bound_s"]:.1f}', f'{p["flops"] / 1e12:,.0f}', f'{p["masked_flops"] / 1e12:,.0f}', sent]
    lines.append(f'| {" | ".join(cells)} |')
  assumed = ', '.join(sorted({f'{p["efficiency"]:.0%}' for p in said['plans']}))
  lines += ['', f'compute_s assumes {assumed} of the peak in matrix products. The bound is the model\'s own FLOPs at '
            'full peak: no step can be faster, and none will be as fast.', '']
  lines += ['Why a plan does not fit, in the compiler\'s words:' if lacks(said['plans']) else '']
  lines += [f'- {name(p)}: {p["bytes"].get("compiler", "its peak is above the HBM of a device")}'
            for p in said['plans'] if not p['bytes']['fits']]
  how = ', '.join(f'{op} {kind}' for op, kind in sorted({item for p in said['plans'] for item in p['ops'].items()}))
  lines += ['', f'Implementations: {how}.', '',
            f'{", ".join(f"{k} {v}" for k, v in said["versions"].items())}, commit {said["commit"][:10]}, on '
            f'{said["hardware"]}.', '',
            f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]}'
            + (f' ({said["why"]}).' if said['why'] else '.')]
  return '\n'.join(lines)


def main() -> None:
  record([json.loads(line) for line in sys.stdin if line.strip()])
  said = json.loads((results.FOLDER / 'scale.json').read_text(encoding='utf-8'))
  before, rest = PAGE.read_text(encoding='utf-8').split(START)
  PAGE.write_text(f'{before}{START}\n{block(said)}\n{END}{rest.split(END)[1]}', encoding='utf-8')


if __name__ == '__main__':
  main()
