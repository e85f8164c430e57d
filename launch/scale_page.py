"""The tables of docs/scale.md and their evidence files, one for TPUs and one for GPUs, from plans, one a line:

  keye plan --config configs/layouts.py:stage3_v5p_4x4x8 --topology v5p:4x4x8 --json >> plans.jsonl
  python -m launch.scale_page < plans.jsonl

A table is replaced when there is a plan for it.
"""
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch import results
from pallas_kernels.aot.__main__ import versions
from pallas_kernels.aot.topology import GPUS

PAGE = results.FOLDER.parent / 'scale.md'
CLAIM = 'every program planned compiles for its slice and fits into the memory of a device'
GIB = 2**30
SHOWN = ('parameters', 'optimizer', 'arguments', 'temporaries', 'peak', 'hbm')


def name(plan: Mapping[str, Any]) -> str:
  what = '' if plan['what'] == 'train' else f', {plan["what"]}'
  return ' '.join([plan['config'].partition(':')[2] or plan['config'], *plan['overrides']]) + what


def lacks(plans: Sequence[Mapping[str, Any]]) -> str:
  """What the claim lacks; '' when the plans show it."""
  return '; '.join(f'{name(p)} does not fit on {p["topology"]}' for p in plans if not p['bytes']['fits'])


def table(plan: Mapping[str, Any]) -> str:
  """Where a plan belongs: the name of an evidence file."""
  return 'scale_gpu' if plan['topology'].partition(':')[0] in GPUS else 'scale'


def record(into: str, plans: Sequence[Mapping[str, Any]]) -> None:
  """Writes docs/results/{into}.json."""
  arms = {f'{name(p)} on {p["topology"]}': {'0': p['bytes'] | {k: p[k] for k in (
      'flops', 'masked_flops', 'hbm_bytes', 'compute_s', 'hbm_s', 'ici_s', 'step_s', 'model_flops_bound_s')}}
          for p in plans}
  results.record(into, CLAIM, len(plans), {}, arms, {}, lacks(plans),
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
    hbm = p.get('hbm_s_without_masked', p['hbm_s'])
    low = max(p['compute_s_without_masked'], hbm, p['ici_s'])
    span = lambda low, high: f'{low:.1f} to {high:.1f}' if low < high else f'{low:.1f}'
    cells = [name(p), f'{p["compute_s_without_masked"]:.1f}', f'{p["compute_s"]:.1f}', span(hbm, p['hbm_s']),
             f'{p["ici_s"]:.1f}', span(low, p['step_s']),
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
  plans = [json.loads(line) for line in sys.stdin if line.strip()]
  for into in sorted({table(p) for p in plans}):
    record(into, [p for p in plans if table(p) == into])
    results.put(PAGE, into, block(results.read(into)))


if __name__ == '__main__':
  main()
