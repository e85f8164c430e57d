"""What `keye retrofit` measured, as a summary, a table, the evidence file and the page docs/lossless.md."""
import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keye_jax.evals import uncertainty
from launch import report_plots, results

PAGE = results.FOLDER.parent / 'lossless.md'
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
QUARTERS = 4           # of the depths of pairs


def results_of(contents: Mapping[int, tuple[Mapping, Mapping]]) -> dict[str, dict[str, Summary]]:
  """{'rows': {tokens: summary}, 'answers': {tokens: summary}}, shortest rows first. contents: (scores, answers)."""
  return {'rows': {str(n): summary(contents[n][0]) for n in sorted(contents)},
          'answers': {str(n): answers(contents[n][1]) for n in sorted(contents)}}


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
          'over': {against: cost(*zip(*both)) for named, _, against, _ in AIMS
                   if named == arm and (both := list(zip(windows, whole(against))))},
          'n': n, 'tokens': sum(w['tokens'] for w in windows[:n]), 'step': found['step'],
          **{name: np.mean([w[name] for w in windows[:n]], 0).round(4).tolist() for name in ('mass', 'overlap')}}
  return out


def answers(scores: Mapping[str, Any]) -> Summary:
  """Of every arm and k: the share of questions whose answer has every token right; how much less that is than dense
  attention's, on the same questions, with its 95% interval (bootstrap over rows); nats of an answer; the share by the
  quarter of the row in which the pair lies, the newest last."""
  dense = scores['arms'].get('dense', {'k': {}})['k'].get('0', [])
  out: Summary = {}
  for arm, found in scores['arms'].items():
    for k, rows in found['k'].items():
      rows, same = rows[:len(dense)], dense[:len(rows)]
      if not rows:
        continue
      flat = lambda rows, name: [x for row in rows for x in row[name]]
      clips = [str(i) for i, row in enumerate(rows) for _ in row['exact']]
      exact, quarter = np.array(flat(rows, 'exact')), (np.array(flat(rows, 'depth')) * QUARTERS).astype(int)
      against = uncertainty.paired(flat(same, 'exact'), exact, clips)
      out.setdefault(arm, {})[k] = {
          'exact': float(exact.mean()), 'less': against.value, 'low': against.low, 'high': against.high,
          'nats': -float(np.mean(flat(rows, 'logp'))), 'n': len(exact), 'step': found['step'],
          'by_depth': [round(float(exact[quarter == q].mean()), 4) if (quarter == q).any() else None
                       for q in range(QUARTERS)]}
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


def record(contents: Mapping[int, tuple[Mapping, Mapping]]) -> None:
  """Writes docs/results/lossless.json, and from it the tables and plots of docs/lossless.md. The claim is about the
  shortest rows. contents: as of results_of."""
  found, first = results_of(contents), min(contents)
  values, intervals = {}, {}
  for n, summary_ in found['rows'].items():
    of = '' if n == str(first) else f' in rows of {n}'
    for arm, ks in summary_.items():
      values.setdefault(arm, {}).update({f'{name} k={k}{of}': round(x[name], 5) for k, x in ks.items()
                                         for name in ('perplexity', 'cost')})
      if arm != 'dense':
        intervals.setdefault(arm, {}).update({f'cost k={k}{of}': [round(x['low'], 5), round(x['high'], 5)]
                                              for k, x in ks.items()})
  for n, summary_ in found['answers'].items():
    for arm, ks in summary_.items():
      values.setdefault(arm, {}).update({f'answers right k={k} in rows of {n}': round(x['exact'], 5)
                                         for k, x in ks.items()})
  rows = found['rows'][str(first)]
  results.record('lossless', CLAIM, max((x['n'] for ks in rows.values() for x in ks.values()), default=0),
                 {arm: values[arm] for arm in BASELINES if arm in values},
                 {arm: {'0': values[arm]} for arm in TRAINED if arm in values}, intervals, lacks(rows),
                 made_with=contents[first][0]['made with'], **found)
  refresh()


def refresh() -> None:
  """The page from the evidence files."""
  said = results.read('lossless')
  results.put(PAGE, 'lossless', block(said))
  if control := results.read('lossless_control'):
    results.put(PAGE, 'lossless_control', control_block(control))
  for name, svg in plots(next(iter(said['rows'].values()))).items():
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
    windows = '–'.join(map(str, sorted({n[0], n[-1]})))
    lines.append(f'| {arm} | {step} | {windows} | {" | ".join(shown)} |')
    if arm == SPARSE and any(CONTROL in x['over'] for x in ks.values()):
      shown = (f'{ks[k]["over"][CONTROL]:+.2%}' if k in ks and CONTROL in ks[k]['over'] else 'not run' for k in TOPKS)
      lines.append(f'| the same over {CONTROL} | {step} | {windows} | {" | ".join(shown)} |')
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


def answers_table(found: Summary) -> list[str]:
  """Markdown: a line an arm, a column a k, answers that are right and how many fewer than dense attention's."""
  lines = [f'| arm | n | {" | ".join(f"k = {k}" for k in TOPKS)} | k = 256, by quarter of the row |',
           '|---' * (3 + len(TOPKS)) + '|']
  share = lambda x: '–' if x is None else f'{x:.0%}'
  for arm in (*BASELINES, *TRAINED):
    if ks := found.get(arm):
      at = ks.get('256') or ks.get('0')
      cells = [answers_cell(ks.get(k) or ks.get('0'), absolute='0' in ks) for k in TOPKS]
      lines.append(f'| {arm} | {next(iter(ks.values()))["n"]} | {" | ".join(cells)} | '
                   f'{", ".join(map(share, at["by_depth"])) if at else "not run"} |')
  return lines


def answers_cell(x: Mapping[str, Any] | None, absolute: bool) -> str:
  if x is None:
    return 'not run'
  more = lambda name: f'{0 - x[name]:+.0%}'            # 0 less is no more, not -0
  less = '' if absolute else f' ({more("less")}, {more("high")} to {more("low")})'
  return f'{x["exact"]:.0%}{less}'


def tables(found: Mapping[str, Mapping[str, Summary]]) -> list[str]:
  """What was measured, for every length: cost in perplexity, then answers where there are some."""
  lines = []
  for n, rows in found['rows'].items():
    lines += [f'### Rows of {n} tokens', '', *table(rows), '']
    if asked := found['answers'].get(n):
      lines += [f'Answers right about pairs hidden all over rows of {n} tokens:', '', *answers_table(asked), '']
  return lines


def block(said: Mapping[str, Any]) -> str:
  """The generated part of the page, from the evidence file."""
  first, made = next(iter(said['rows'].values())), said['made_with']
  return '\n'.join([
      *tables(said), 'Costs. First line: perplexity. Others: cost over it on the same windows, with 95% intervals over '
      'windows. n: held-out rows; their second halves are scored.', *([
          'Answers. In parentheses: how many more than the first line on the same questions, in points, with 95% '
          'intervals over rows. n: questions.'] if any(said['answers'].values()) else []), '',
      '![cost by k](lossless_cost.svg)', '', *recall_table(first), '', '![mass by layer](lossless_layers.svg)', '',
      f'Plots and the table above them are of rows of {made["tokens"]} tokens, and so is what follows.', '',
      f'{made_by(said)} Indexer {made["indexer"]["heads"]} heads of {made["indexer"]["head_dim"]}. '
      f'Text: {made["text"]}.', '',
      f'{said["claim"][0].upper()}{said["claim"][1:]}: {said["verdict"]}'
      + (f' ({said["why"]}).' if said['why'] else '.')])


def control_block(said: Mapping[str, Any]) -> str:
  """What the page says of the control where it was measured by itself: `keye retrofit --arm dense --arm 'dense,
  fine-tuned' --json`."""
  lines = []
  for n, rows in said['rows'].items():
    x, asked = rows[CONTROL]['0'], [said['answers'][n][arm]['0'] for arm in ('dense', CONTROL)]
    lines += [f'{x["n"]} rows of {n} tokens, {x["step"]} steps: perplexity {rows["dense"]["0"]["perplexity"]:.3f} of '
              f'dense and {x["perplexity"]:.3f} of {CONTROL}, {cell(x, absolute=False)}; of {asked[0]["n"]} answers '
              f'{asked[0]["exact"]:.0%} and {asked[1]["exact"]:.0%} right.', '']
  return '\n'.join([*lines, made_by(said)])


def made_by(said: Mapping[str, Any]) -> str:
  return f'`{said["command"]}` on {said["hardware"]}; jax {said["versions"]["jax"]}, commit {said["commit"][:10]}.'


def plots(found: Summary, k: str = '256') -> dict[str, str]:
  """SVG files by name."""
  swept = [arm for arm in (*BASELINES, *TRAINED) if set(found.get(arm, {})) & set(TOPKS)]
  over_control = lambda x: x['over'].get(CONTROL, x['cost'])          # fine-tuning alone lowers perplexity
  cost_lines = [report_plots.Line(arm, list(map(int, ks := [k for k in TOPKS if k in found[arm]])),
                                  [min(100 * over_control(found[arm][k]), CUT) for k in ks]) for arm in swept]
  layer_lines = [report_plots.Line(arm, list(range(len(found[arm][k]['mass']))), found[arm][k]['mass'])
                 for arm in swept if k in found[arm]]
  title = f'cost over dense, after the sparse stage over {CONTROL}; in percent, cut at {CUT}'
  return {'lossless_cost.svg': picture(cost_lines, title, 'k'),
          'lossless_layers.svg': picture(layer_lines, f'share of attention mass on the chosen keys, k = {k}', 'layer')}


def picture(lines: Sequence[report_plots.Line], title: str, x_label: str) -> str:
  """A line chart with its title as a file of its own."""
  drawn = report_plots.line_chart(lines, title, x_label, width=640, height=280)
  found = re.search('<svg.*</svg>', drawn, re.S)
  body = found.group(0) if found else f'<svg viewBox="0 0 640 40"><text x="8" y="24">{title}: nothing yet</text></svg>'
  style = f'<style>text {{ font: 11px sans-serif; fill: {report_plots.INK} }}</style>'
  head, rest = body.replace('viewBox="0 0 640 280"', 'viewBox="0 -20 640 300"').split('>', 1)
  caption = f'<text x="8" y="-8">{html.escape(title)}</text>' if found else ''
  return f'{head} xmlns="http://www.w3.org/2000/svg" width="640">{style}{caption}{rest}'


def main() -> None:
  """Draws the page again from the evidence file: `python -m launch.retrofit_page`."""
  refresh()


if __name__ == '__main__':
  main()
