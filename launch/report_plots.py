"""Drawings of the report as SVG text: lines over steps, and a clip's frames over time with intervals below them."""
import base64
import html
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

INK, FAINT, GRID = '#1f2937', '#6b7280', '#e5e7eb'
COLORS = ('#2563eb', '#c2410c', '#15803d', '#7c3aed', '#0e7490')
TRUTH, ANSWER, OTHER = '#15803d', '#2563eb', '#9ca3af'


class Line(NamedTuple):
  label: str
  x: Sequence[float]
  y: Sequence[float]


class Lane(NamedTuple):
  """Intervals in seconds, drawn in one row under the frames."""
  label: str
  color: str
  intervals: Sequence[tuple[float, float]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
  """Round numbers inside [low, high]."""
  raw = max(high - low, 1e-12) / about
  size = 10.0 ** math.floor(math.log10(raw))
  step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw)
  return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(lines: Sequence[Line], title: str, x_label: str, marks: Sequence[tuple[float, str]] = (),
               width: int = 460, height: int = 240) -> str:
  """Lines with direct labels. `marks` are vertical lines (x, label). Values that are not finite are left out."""
  kept = [(n, line, [(x, y) for x, y in zip(line.x, line.y) if math.isfinite(y)]) for n, line in enumerate(lines)]
  kept = [(n, line, points) for n, line, points in kept if points]
  if not kept:
    return f'<figure><figcaption>{html.escape(title)}</figcaption><p>nothing was logged</p></figure>'
  xs = [x for _, _, points in kept for x, _ in points] + [x for x, _ in marks]
  ys = [y for _, _, points in kept for _, y in points]
  x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), min(0.0, *ys), max(*ys, 1e-9) if len(ys) > 1 else ys[0] or 1.0
  labels = 12 + 6.4 * max(len(line.label) for _, line, _ in kept)           # 11 px a letter high, in a wide font
  left, right, top, bottom = 44, 12 if len(kept) == 1 else max(92, round(labels)), 12, 34
  px = lambda x: left + (x - x0) / (x1 - x0) * (width - left - right)
  py = lambda y: height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
  out = [f'<figure><figcaption>{html.escape(title)}</figcaption>'
         f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
  for y in ticks(y0, y1, 4):
    out.append(f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="{GRID}"/>'
               f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
  for x in ticks(x0, x1, 5):
    out.append(f'<text x="{px(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>')
  out.append(f'<text x="{(left + width - right) / 2:.0f}" y="{height - 2}" text-anchor="middle">'
             f'{html.escape(x_label)}</text>')
  row = 0
  for n, (x, label) in enumerate(marks):
    row = row + 1 if n and px(x) - px(marks[n - 1][0]) < 8 * len(marks[n - 1][1]) else 0     # below a close neighbour
    out.append(f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{top}" y2="{height - bottom}" stroke="{FAINT}" '
               f'stroke-dasharray="3 3"/><text x="{px(x) + 4:.1f}" y="{top + 9 + 13 * row}">'
               f'{html.escape(label)}</text>')
  labels = _spread([(py(points[-1][1]), n, line.label) for n, line, points in kept], 13)
  for n, _, points in kept:
    path = ' '.join(f'{px(x):.1f},{py(y):.1f}' for x, y in points)
    out.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[n % len(COLORS)]}" stroke-width="1.6"/>')
  if len(kept) > 1:
    out += [f'<text x="{width - right + 5}" y="{y + 4:.1f}" style="fill:{COLORS[n % len(COLORS)]}">'
            f'{html.escape(label)}</text>' for y, n, label in labels]
  return ''.join([*out, '</svg></figure>'])


def film(frames_FHW3: np.ndarray, seconds_F: Sequence[float], duration: float, lanes: Sequence[Lane],
         heat_LF: np.ndarray | None = None, width: int = 940) -> str:
  """Frames in time order; below, on one time axis, intervals and how much of each frame every layer selected.

  heat_LF: shares in [0, 1] by layer and frame.
  """
  F, left = len(frames_FHW3), 110
  h, w = frames_FHW3.shape[1:3]
  across = min(F, 8)                                   # thumbnails in a row
  thumb = (width - left) / across
  tall = thumb * h / w
  rows = -(-F // across)
  px = lambda t: left + min(max(t, 0), duration) / duration * (width - left)
  out, y = [], 0.0
  for f in range(F):
    x, top = left + f % across * thumb, y + f // across * (tall + 16)
    out.append(f'<image x="{x + 1:.1f}" y="{top:.1f}" width="{thumb - 2:.1f}" height="{tall:.1f}" '
               f'href="{jpeg(frames_FHW3[f])}"/>'
               f'<text x="{x + thumb / 2:.1f}" y="{top + tall + 12:.1f}" text-anchor="middle">'
               f'{seconds_F[f]:.1f} s</text>')
  out.append(f'<text x="0" y="{tall / 2:.0f}">frames</text>')
  y += rows * (tall + 16) + 8
  for lane in lanes:
    out.append(f'<text x="0" y="{y + 12:.1f}">{html.escape(lane.label)}</text>'
               f'<line x1="{left}" x2="{width}" y1="{y + 8:.1f}" y2="{y + 8:.1f}" stroke="{GRID}"/>')
    for a, b in lane.intervals:
      out.append(f'<rect x="{px(a):.1f}" y="{y + 1:.1f}" width="{max(px(b) - px(a), 2):.1f}" height="14" rx="2" '
                 f'fill="{lane.color}"><title>{a:g} to {b:g} s</title></rect>')
    y += 21
  if heat_LF is not None:
    # A frame stands for the time until the next one.
    edges = [*seconds_F, duration]
    for layer, shares_F in enumerate(heat_LF):
      out.append(f'<text x="0" y="{y + 11:.1f}">selected, layer {layer}</text>')
      for f, value in enumerate(shares_F):
        span = max(px(edges[f + 1]) - px(edges[f]) - 1, 1)
        out.append(f'<rect x="{px(edges[f]):.1f}" y="{y:.1f}" width="{span:.1f}" height="14" '
                   f'fill="{shade(value)}"><title>{value:.0%} of the frame at {seconds_F[f]:.1f} s</title>'
                   '</rect>')
      y += 17
  for t in ticks(0, duration, 8):
    anchor = 'start' if t == 0 else 'end' if px(t) > width - 8 else 'middle'
    out.append(f'<text x="{px(t):.1f}" y="{y + 13:.1f}" text-anchor="{anchor}">{t:g}</text>')
  out.append(f'<text x="0" y="{y + 13:.1f}">seconds</text>')
  return f'<svg viewBox="0 0 {width} {y + 18:.0f}" role="img">{"".join(out)}</svg>'


def shade(value: float) -> str:
  """White for 0 to dark orange for 1."""
  low, high = (255, 247, 237), (194, 65, 12)
  return '#' + ''.join(f'{round(a + (b - a) * min(max(float(value), 0), 1)):02x}' for a, b in zip(low, high))


def jpeg(frame_HW3: np.ndarray) -> str:
  """data: address of a frame, magnified to at least 112 pixels of height so that its pixels stay visible."""
  image = Image.fromarray(frame_HW3)
  if image.height < 112:
    times = -(-112 // image.height)
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
  data = io.BytesIO()
  image.save(data, 'JPEG', quality=80)
  return 'data:image/jpeg;base64,' + base64.b64encode(data.getvalue()).decode()


def _spread(labels, gap):
  """Moves labels (y, ...) apart so that neighbours are at least `gap` from each other."""
  out = []
  for y, *rest in sorted(labels):
    out.append((max(y, out[-1][0] + gap) if out else y, *rest))
  return out
