"""The report of a run as one HTML file that needs nothing else: scores, curves, clips with intervals and selections."""
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from keye_jax.evals.intervals import Interval
from keye_jax.evals.scores import Score
from launch.report_plots import ANSWER, OTHER, TRUTH, Lane, Line, film, line_chart


class Check(NamedTuple):
  """One requirement: what was measured, what was asked."""
  name: str
  value: float
  least: float

  @property
  def ok(self) -> bool:
    return self.value >= self.least


class ClipView(NamedTuple):
  title: str
  question: str
  answer: str
  expected: str
  frames_FHW3: np.ndarray          # uint8, as the model saw them
  seconds_F: Sequence[float]
  duration: float
  predicted: Interval | None
  asked: Interval
  others: Sequence[Interval]
  selected_LF: np.ndarray          # share of each frame's tokens that the answer's queries selected, by layer


class Report(NamedTuple):
  title: str
  summary: str
  facts: Mapping[str, str]                        # protocol, hardware, versions
  checks: Sequence[Check]
  arms: Mapping[str, Mapping[str, Score]]         # scores by system
  curves: Sequence[tuple[str, str, Sequence[Line], Sequence[tuple[float, str]]]]   # title, x label, lines, marks
  stages: Sequence[tuple[str, float]]             # name, seconds
  clips: Sequence[ClipView]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 980px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e5e7eb; }
th:first-child, td:first-child { text-align: left; } thead th { font-weight: 600; border-bottom: 2px solid #9ca3af; }
tr.main { background: #eff6ff; font-weight: 600; } small { color: #6b7280; font-weight: 400; white-space: nowrap; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .3rem; } .pair { display: grid;
grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 1.2rem; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: #6b7280; } svg image { image-rendering: pixelated; }
.ok { color: #15803d; } .bad { color: #b91c1c; } .clip { margin: 1.4rem 0 2rem; } .note { color: #6b7280; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; } dt { color: #6b7280; } dd { margin: 0; }
"""


def write(path: pathlib.Path, report: Report) -> None:
  """Writes the file, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.tmp')
  partial.write_text(render(report), encoding='utf-8')
  partial.replace(path)


def render(report: Report) -> str:
  text = html.escape
  parts = [f'<h1>{text(report.title)}</h1><p>{text(report.summary)}</p>']
  if report.checks:
    parts += ['<h2>Required and measured</h2>', _checks(report.checks)]
  parts += ['<h2>Held-out scores</h2>', _scores(report.arms),
            '<p class="note">Small: 95% intervals (Wilson for shares, bootstrap over clips for mean IoU).</p>',
            '<h2>Training</h2><div class="pair">',
            *(line_chart(lines, title, x_label, marks) for title, x_label, lines, marks in report.curves), '</div>']
  parts += ['<h2>Clips</h2><p class="note">Each clip was never seen in training. Orange: the share of a frame’s tokens '
            'that the indexer let the answer attend to, by layer.</p>', *map(_clip, report.clips)]
  parts += ['<h2>Time</h2>', _stages(report.stages), '<h2>How it was measured</h2><dl>',
            *(f'<dt>{text(k)}</dt><dd>{text(v)}</dd>' for k, v in report.facts.items()), '</dl>']
  return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f'<title>{text(report.title)}</title><style>{STYLE}</style></head><body>{"".join(parts)}</body></html>\n')


def _checks(checks):
  rows = ''.join(f'<tr><td>{html.escape(c.name)}</td><td>{_short(c.value)}</td><td>{_short(c.least)}</td>'
                 f'<td class="{"ok" if c.ok else "bad"}">{"met" if c.ok else "not met"}</td></tr>' for c in checks)
  return f'<table><thead><tr><th>requirement</th><th>measured</th><th>at least</th><th></th></tr></thead>{rows}</table>'


def _short(value):
  return f'{value:g}' if value == int(value) and value > 1 else f'{value:.3f}'


def _scores(arms):
  names = list(dict.fromkeys(name for scores in arms.values() for name in scores))
  head = ''.join(f'<th>{html.escape(name.removeprefix("accuracy/").replace("_", " "))}</th>' for name in names)
  rows = []
  for n, (arm, scores) in enumerate(arms.items()):
    cells = ''.join(_cell(scores.get(name)) for name in names)
    rows.append(f'<tr{" class=main" if n == 0 else ""}><td>{html.escape(arm)}</td>{cells}</tr>')
  counts = next(iter(arms.values())) if arms else {}
  last = ''.join(f'<td><small>n = {counts[name].n if name in counts else 0}</small></td>' for name in names)
  return f'<table><thead><tr><th>system</th>{head}</tr></thead>{"".join(rows)}<tr><td></td>{last}</tr></table>'


def _cell(score):
  if score is None:
    return '<td>–</td>'
  return f'<td>{score.value:.3f}<br><small>{score.low:.2f} – {score.high:.2f}</small></td>'


def _stages(stages):
  rows = ''.join(f'<tr><td>{html.escape(name)}</td><td>{seconds:.1f} s</td></tr>' for name, seconds in stages)
  total = sum(seconds for _, seconds in stages)
  return f'<table>{rows}<tr class="main"><td>all</td><td>{total:.1f} s</td></tr></table>'


def _clip(clip: ClipView):
  lanes = [Lane('asked event', TRUTH, [clip.asked]),
           Lane('answer', ANSWER, [clip.predicted] if clip.predicted else [])]
  if clip.others:
    lanes.append(Lane('other events', OTHER, list(clip.others)))
  drawing = film(clip.frames_FHW3, clip.seconds_F, clip.duration, lanes, clip.selected_LF)
  return (f'<div class="clip"><strong>{html.escape(clip.title)}</strong><br>{html.escape(clip.question)}<br>'
          f'answer: <b>{html.escape(clip.answer)}</b>, true: {html.escape(clip.expected)}{drawing}</div>')
