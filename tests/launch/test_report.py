import html.parser
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from keye_jax.evals.scores import Score
from launch import report, report_plots
from launch.report import Check, ClipView, Report

VOID = {'meta', 'br', 'image', 'rect', 'line', 'polyline'}


class Outline(html.parser.HTMLParser):
  """Collects tags, attributes and text, and fails on tags that do not nest."""

  def __init__(self):
    super().__init__()
    self.open, self.seen, self.text = [], [], []

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    while self.open and self.open[-1] != tag and self.open[-1] in ('tr', 'td', 'th'):
      self.open.pop()
    if tag not in VOID:
      assert self.open and self.open.pop() == tag, f'</{tag}>'

  def handle_data(self, data):
    self.text.append(data)


def sample() -> Report:
  rng = np.random.default_rng(0)
  x = list(range(0, 300, 10))
  lines = [report_plots.Line('dense', x, [3 / (1 + t / 50) for t in x]), report_plots.Line('sparse', x, [0.5] * len(x))]
  clip = ClipView('carphone <0>', 'When does the digit 3 & 4 appear?', '2.0 - 3.5', '2.0 - 4.0',
                  rng.integers(0, 255, (16, 56, 56, 3), np.uint8), [n / 2 for n in range(16)], 8.0, (2.0, 3.5),
                  (2.0, 4.0), [(6.0, 7.0)], rng.uniform(size=(3, 16)))
  arms = {'sparse': {'accuracy/digit': Score(0.9, 0.87, 0.93, 300), 'miou': Score(0.7, 0.6, 0.8, 150)},
          'majority': {'accuracy/digit': Score(0.1, 0.07, 0.13, 300)}}
  return Report('Quickstart', 'A tiny Keye, trained here.', {'frames': '16 at 2 a second'},
                [Check('digit', 0.9, 0.7), Check('mIoU', 0.4, 0.6)], arms, [('loss', 'step', lines, [(150, 'sparse')])],
                [('data', 12.0), ('training', 200.5)], [clip, clip._replace(predicted=None, answer='none', others=[])])


def test_report_is_one_well_formed_page(tmp_path):
  path = tmp_path / 'deep' / 'report.html'
  report.write(path, sample())
  assert [p.name for p in path.parent.iterdir()] == ['report.html']
  outline = Outline()
  outline.feed(path.read_text(encoding='utf-8'))
  assert not outline.open
  links = [v for _, attrs in outline.seen for k, v in attrs.items() if k in ('href', 'src')]
  assert len(links) == 32 and all(v.startswith('data:image/jpeg;base64,') for v in links)   # nothing from outside
  text = ' '.join(outline.text)
  for wanted in ('Required and measured', 'met', 'not met', '0.900', '0.87 – 0.93', 'n = 150', '212.5 s',
                 'carphone <0>', 'digit 3 & 4', '2.0 - 3.5', 'selected, layer 2', '16 at 2 a second'):
    assert wanted in text, wanted


def parse(svg: str):
  return ElementTree.fromstring(svg[svg.index('<svg'):svg.index('</svg>') + 6])


def test_intervals_lie_at_their_place_on_the_time_axis():
  frames = np.zeros((2, 28, 28, 3), np.uint8)
  svg = report_plots.film(frames, [0.0, 5.0], 10.0, [report_plots.Lane('x', '#123456', [(2.5, 5.0)])],
                          np.array([[0.0, 1.0]]), width=1110)
  rects = {r.get('fill'): (float(r.get('x')), float(r.get('width'))) for r in parse(svg).iter('rect')}
  assert rects['#123456'] == (110 + 250, 250)
  assert rects[report_plots.shade(1.0)] == (110 + 500, 499)
  assert report_plots.shade(0.0) == '#fff7ed' and report_plots.shade(1.0) == '#c2410c'


def test_line_chart_scales_and_leaves_out_what_is_not_finite():
  svg = report_plots.line_chart([report_plots.Line('a', [0, 1, 2], [2.0, float('nan'), 0.0])], 't', 'step')
  (line,) = parse(svg).iter('polyline')
  assert line.get('points').split() == ['44.0,12.0', '448.0,206.0']
  marked = report_plots.line_chart([report_plots.Line('a', [1, 2], [2.0, 0.0])], 't', 'step', [(0, 'begin')])
  (line,) = parse(marked).iter('polyline')
  assert line.get('points').split()[0] == '246.0,12.0'       # the mark at 0 is inside the axes
  assert 'nothing was logged' in report_plots.line_chart([report_plots.Line('a', [], [])], 't', 'step')


@pytest.mark.parametrize('low, high, expected', [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 1800, [0, 500, 1000, 1500])])
def test_ticks_are_round(low, high, expected):
  assert report_plots.ticks(low, high) == pytest.approx(expected)
