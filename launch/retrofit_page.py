"""What `keye retrofit` measured, as a summary, a table, the evidence file and the page docs/lossless.md."""
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keye_jax.evals import uncertainty
from launch import report_plots, results

PAGE = results.FOLDER.parent / 'lossless.md'
START, END = '<!-- results:lossless -->', '<!-- /results -->'
BASELINES = ('dense', 'oracle', 'window + 4 sinks', 'untrained indexer')
TRAINED = ('after warm-up', 'after sparse stage', 'dense, fine-tuned')
WARM, SPARSE, CONTROL = TRAINED
TOPKS = ('64', '128', '256', '512')
# (arm, k, against, largest cost)
AIMS = ((WARM, '256', 'dense', 0.03), (WARM, '512', 'dense', 0.01), (SPARSE, '256', CONTROL, 0.01))
CLAIM = ('on held-out text at places in the second half of a row, sparse attention with a retrofitted indexer costs at '
         'most 3% of perplexity at k = 256 and 1% at k = 512 after the warm-up, and at most 1% at k = 256 after the '
         'sparse stage, against dense attention fine-tuned alike')
CUT = 30               # percent: costs above are drawn at the upper edge

Summary = dict[str, dict[str, dict[str, Any]]]     # arm -> k -> name -> value


def summary(scores: Mapping[str, Any]) -> Summary:
  """Numbers of every arm and k that was measured, each against dense attention on the same windows.

  perplexity; cost: perplexity over that of dense, minus 1, with its 95% interval (bootstrap over windows); n windows;
  over: the cost over each arm that an aim names, on the windows of both; the share of attention mass and of the
  oracle's keys, by layer.
  """
  whole = lambda arm: scores['arms'].get(arm, {'k': {}})['k'].get('0', [])
  dense = whole('dense')
  out: Summary = {}
  for arm, found in scores['arms'].items():
    for k, windows in found['k'].items():
      n = min(len(windows), len(dense))
      if not n:
        continue
      low, high = interval(windows[:n], dense[:n])
      out.setdefault(arm, {})[k] = {
          'perplexity': perplexity(windows[:n]), 'cost': cost(windows[:n], dense[:n]), 'low': low, 'high': high,
          'over': {against: cost(*zip(*both)) for named, at, against, _ in AIMS
                   if (named, at) == (arm, k) and (both := list(zip(windows, whole(against))))},
          'n': n, 'tokens': sum(w['tokens'] for w in windows[:n]), 'step': found['step'],
          **{name: np.mean([w[name] for w in windows[:n]], 0).round(4).tolist() for name in ('mass', 'overlap')}}
  return out


def perplexity(windows: Sequence[Mapping[str, Any]]) -> float:
  return math.exp(sum(w['nll'] for w in windows) / sum(w['tokens'] for w in windows))


def cost(windows, against) -> float:
  return perplexity(windows) / perplexity(against) - 1


def interval(windows, against) -> tuple[float, float]:
  """95% of the cost, drawing windows. They have nearly the same number of tokens, so each counts alike."""
  nats = [(w['nll'] - a['nll']) / w['tokens'] for w, a in zip(windows, against)]
  low, high = uncertainty.bootstrap(nats, list(map(str, range(len(nats)))))
  return math.expm1(low), math.expm1(high)


def lacks(found: Summary) -> str:
  """What the claim lacks; '' when the numbers show it."""
  why = []
  for arm, k, against, most in AIMS:
    if k not in found.get(arm, {}):
      why.append(f'{arm} at k = {k} was not run')
    elif against not in (over := found[arm][k]['over']):
      why.append(f'{against} was not run')
    elif over[against] > most:
      why.append(f'{arm} at k = {k} costs {over[against]:.1%} over {against}, more than {most:.0%}')
  return '; '.join(why)


def record(scores: Mapping[str, Any]) -> None:
  """Writes docs/results/lossless.json, and from it the table and plots of docs/lossless.md."""
  found = summary(scores)
  values = lambda arm: {f'{name} k={k}': round(x[name], 5) for k, x in found.get(arm, {}).items()
                        for name in ('perplexity', 'cost')}
  intervals = {arm: {f'cost k={k}': [round(x['low'], 5), round(x['high'], 5)] for k, x in ks.items()}
               for arm, ks in found.items() if arm != 'dense'}
  results.record('lossless', CLAIM, max((x['n'] for ks in found.values() for x in ks.values()), default=0),
                 {arm: values(arm) for arm in BASELINES if arm in found},
                 {arm: {'0': values(arm)} for arm in TRAINED if arm in found}, intervals, lacks(found),
                 made_with=scores['made with'], rows=found)
  refresh()


def refresh() -> None:
  """The page from the evidence file."""
  said = json.loads((results.FOLDER / 'lossless.json').read_text(encoding='utf-8'))
  before, rest = PAGE.read_text(encoding='utf-8').split(START)
  PAGE.write_text(f'{before}{START}\n{block(said)}\n{END}{rest.split(END)[1]}', encoding='utf-8')
  for name, svg in plots(said['rows']).items():
    (PAGE.parent / name).write_text(svg + '\n', encoding='utf-8')


def table(found: Summary) -> list[str]:
  """Markdown: a line an arm, a column a k, cost over dense with its interval."""
  lines = [f'| arm | steps | n | {" | ".join(f"k = {k}" for k in TOPKS)} |', '|---' * (3 + len(TOPKS)) + '|']
  for arm in (*BASELINES, *TRAINED):
    ks = found.get(arm)
    if not ks:
      lines.append(f'| {arm} | – | 0 |{" not run |" * len(TOPKS)}')
      continue
    n, step = sorted({x['n'] for x in ks.values()}), next(iter(ks.values()))['step']
    # Dense attention has no k: its one number stands in every column.
    shown = (cell(ks.get(k) or ks.get('0'), absolute=arm == 'dense') for k in TOPKS)
    lines.append(f'| {arm} | {step} | {"–".join(map(str, sorted({n[0], n[-1]})))} | {" | ".join(shown)} |')
  return lines


def cell(x: Mapping[str, Any] | None, absolute: bool) -> str:
  if x is None:
    return 'not run'
  if absolute:
    return f'{x["perplexity"]:.3f}'
  return f'{x["cost"]:+.2%} ({x["low"]:+.1%} to {x["high"]:+.1%})'


def recall_table(found: Summary, k: str = '256') -> list[str]:
  """Markdown: means over layers, and the layer with the least, at one k."""
  lines = [f'| arm, k = {k} | attention mass | least, layer | oracle\'s keys | least, layer |', '|---' * 5 + '|']
  for arm in (*BASELINES, *TRAINED):
    if k in found.get(arm, {}):
      cells = []
      for name in ('mass', 'overlap'):
        by_layer = found[arm][k][name]
        least = int(np.argmin(by_layer))
        cells += [f'{np.mean(by_layer):.3f}', f'{by_layer[least]:.3f}, {least}']
      lines.append(f'| {arm} | {" | ".join(cells)} |')
  return lines


def block(said: Mapping[str, Any]) -> str:
  """The generated part of the page, from the evidence file."""
  found, made = said['rows'], said['made_with']
  return '\n'.join([
      *table(found), '', f'First line: perplexity. Others: cost over it on the same windows, with 95% intervals over '
      f'windows. n: held-out rows of {made["tokens"]} tokens; their second halves are scored.', '',
      '![cost by k](lossless_cost.svg)', '', *recall_table(found), '', '![mass by layer](lossless_layers.svg)', '',
      f'`{said["command"]}` on {said["hardware"]}; jax {said["versions"]["jax"]}, commit {said["commit"][:10]}. '
      f'Indexer {made["indexer"]["heads"]} heads of {made["indexer"]["head_dim"]}. Text: {made["text"]}.', '',
      f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]}'
      + (f' ({said["why"]}).' if said['why'] else '.')])


def plots(found: Summary, k: str = '256') -> dict[str, str]:
  """SVG files by name."""
  swept = [arm for arm in (*BASELINES, *TRAINED) if set(found.get(arm, {})) & set(TOPKS)]
  cost_lines = [report_plots.Line(arm, list(map(int, ks := [k for k in TOPKS if k in found[arm]])),
                                  [min(100 * found[arm][k]['cost'], CUT) for k in ks]) for arm in swept]
  layer_lines = [report_plots.Line(arm, list(range(len(found[arm][k]['mass']))), found[arm][k]['mass'])
                 for arm in swept if k in found[arm]]
  return {'lossless_cost.svg': picture(cost_lines, f'cost over dense in percent, cut at {CUT}', 'k'),
          'lossless_layers.svg': picture(layer_lines, f'share of attention mass on the chosen keys, k = {k}', 'layer')}


def picture(lines: Sequence[report_plots.Line], title: str, x_label: str) -> str:
  """A line chart as a file of its own."""
  drawn = report_plots.line_chart(lines, title, x_label, width=640, height=280)
  found = re.search('<svg.*</svg>', drawn, re.S)
  body = found.group(0) if found else f'<svg viewBox="0 0 640 40"><text x="8" y="24">{title}: nothing yet</text></svg>'
  style = f'<style>text {{ font: 11px sans-serif; fill: {report_plots.INK} }}</style>'
  head, rest = body.split('>', 1)
  return f'{head} xmlns="http://www.w3.org/2000/svg" width="640">{style}{rest}'


def main() -> None:
  """Draws the page again from the evidence file: `python -m launch.retrofit_page`."""
  refresh()


if __name__ == '__main__':
  main()
