"""The tables of `keye bench model` (docs/model_speed.md) and `keye bench video` (docs/data.md), from their records:

  keye bench model --peer transformers --json --out docs/results/model.json     (model_zen4.json on that processor)
  keye bench model --dsa 65536 --json --out docs/results/sparse.json
  keye bench video --json --out docs/results/video.json
  python -m launch.bench_page
"""
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from launch import results

DOCS = results.FOLDER.parent
SPEED = DOCS / 'model_speed.md'
PAGES = {'model': SPEED, 'model_zen4': SPEED, 'sparse': SPEED, 'video': DOCS / 'data.md'}


def block(name: str, said: Mapping[str, Any] | None) -> str:
  """The generated part of a page; None before there is a record."""
  if said is None:
    return 'Nothing is recorded yet.'
  if name == 'sparse':
    return sparse_parts(said)
  (peer, theirs), = said['baselines'].items()
  kind = name.split('_')[0]            # what comes after it says on which machine
  ours, unit, more = said['arms']['keye_jax']['0'], {'model': 'tokens', 'video': 'frames'}[kind], MORE[kind]
  head = ['', f'keye_jax, {unit}/s', f'{peer}, {unit}/s', 'times as fast', '95% interval', *more(said)]
  lines = [f'| {" | ".join(head)} |']
  lines.append('|---' * len(head) + '|')
  for task, ratio in said['medians of ratios'].items():
    rates = [f'{side[f"{task}, median {unit}/s"]:,.0f}' for side in (ours, theirs)]
    low, high = said['intervals'][task]
    cells = [task, *rates, f'{ratio:.2f}', f'{low:.2f} to {high:.2f}', *more(said, task).values()]
    lines.append(f'| {" | ".join(cells)} |')
  probes = {task: max(r['probe seconds']) / min(r['probe seconds']) - 1 for task, r in said['rounds'].items()}
  others = max(r['cores of others'] or 0 for r in said['rounds'].values())
  versions = ', '.join(f'{k} {v}' for k, v in said['versions'].items())
  return '\n'.join([
      *lines, '',
      f'`{said["command"]}`, {said["n"]} rounds, {versions}, commit {said["commit"][:10]}, on {said["hardware"]}. '
      f'Medians of the rounds, the ratio that of a round. Others used at most {others:.2f} cores; a fixed product took '
      f'{min(probes.values()):.0%} to {max(probes.values()):.0%} longer in the slowest round than in the fastest.', '',
      verdict(said)])


def verdict(said: Mapping[str, Any]) -> str:
  return f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]} ({said["why"]}).'


def sparse_parts(found: Mapping[str, Any]) -> str:
  """Lines about one layer's attention as the row grows: what launch/bench_dsa.py measured."""
  sizes = list(next(iter(found['seconds'].values())))
  head = ['one layer, seconds at', *(f'{int(n):,}' for n in sizes), 'grows as']
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  for part, row in found['seconds'].items():
    power = found['exponents'][part]
    cells = [f'{row[n]:.2f}' for n in sizes] + ['–' if power is None else f'S^{power:.2f}']
    lines.append(f'| {part} | {" | ".join(cells)} |')
  return '\n'.join([
      *lines, '',
      f'`{found["command"]}`, {found["topk"]:,} keys, the better of two calls, jax {found["versions"]["jax"]}, commit '
      f'{found["commit"][:10]}, on {found["hardware"]}.', '', verdict(found)])


def of_model(said: Mapping[str, Any], task: str = '') -> dict[str, str]:
  """{column: cell}: how near either side comes to one large product."""
  share = said['share of one large product'].get(task, {})
  return {f"{side}, of one large product's rate": f'{share[side]:.2f}' if side in share else '–'
          for side in ('keye_jax', 'transformers')}


def of_video(said: Mapping[str, Any], task: str = '') -> dict[str, str]:
  """{column: cell}: memory, and what an accelerator would need of the host."""
  feed = said['feeding']
  named = f'cores for {feed["clips a step"]} clips in {feed["step seconds"]:g} s'
  if not task:
    return dict.fromkeys(('peak MiB', 'of which frames', named), '')
  return {'peak MiB': f'{said["peak MiB"][task]:.0f}', 'of which frames': f'{said["frames MiB"][task]:.0f}',
          named: f'{feed["needs cores"][task]:.1f}'}


MORE = {'model': of_model, 'video': of_video}


def main(names: Sequence[str]) -> None:
  for name in names or PAGES:
    results.put(PAGES[name], name, block(name, results.read(name)))


if __name__ == '__main__':
  main(sys.argv[1:])
