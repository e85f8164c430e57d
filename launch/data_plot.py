"""The report of `keye data stats` as a picture: histograms of lengths and durations, kinds, and what is bad."""
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_pipelines.errors import InputError
from launch.report_plots import COLORS, FAINT, GRID, INK, ticks

WIDTH, HEIGHT, MARGIN = 520, 300, 20       # pixels of a panel, and around it
MOST_BARS, MOST_LETTERS = 16, 9


def draw(made: dict[str, Any], path: str | os.PathLike) -> None:
  """Writes a PNG of what `data_check.check` returned. Raises InputError when the file cannot be written."""
  panels = [(title, [(f'{_short(a)}-{_short(b)}', n) for a, b, n in made[name]['histogram']], COLORS[0])
            for name, title in (('tokens', 'rows by tokens'), ('seconds', 'videos by seconds')) if made[name]]
  panels += [(title, list(made[name].items()), color)
             for name, title, color in (('kinds', 'questions by kind', COLORS[2]),
                                        ('reasons', 'rows that cannot be used, by reason', COLORS[1])) if made[name]]
  across = min(len(panels), 2)
  down = -(-len(panels) // 2)
  sheet = Image.new('RGB', (across * WIDTH + MARGIN, down * HEIGHT + 2 * MARGIN), 'white')
  pen = ImageDraw.Draw(sheet)
  shown = f'{made["usable"]} of {made["rows"]} rows usable, {made["images"]} images, {made["videos"]} videos'
  pen.text((MARGIN, 12), shown, INK, _font(15))
  for n, panel in enumerate(panels):
    _panel(pen, MARGIN + n % 2 * WIDTH, 2 * MARGIN + n // 2 * HEIGHT, *panel)
  try:
    sheet.save(path, 'PNG')
  except OSError as e:
    raise InputError(f'--plot {path}: cannot be written ({e.strerror or e})') from None


def _panel(pen, left: int, top: int, title: str, bars: Sequence[tuple[str, int]], color: str) -> None:
  """Bars with their numbers above and their names below; what is beyond MOST_BARS is one bar."""
  if len(bars) > MOST_BARS:
    bars = [*bars[:MOST_BARS - 1], ('others', sum(n for _, n in bars[MOST_BARS - 1:]))]
  pen.text((left, top), title, INK, _font(14))
  x0, x1, y0, y1 = left + 48, left + WIDTH - MARGIN, top + HEIGHT - 44, top + 42
  most = max(n for _, n in bars)
  height = lambda n: n / most * (y0 - y1)
  for tick in (t for t in ticks(0, most, 4) if t == int(t)):
    pen.line([(x0, y0 - height(tick)), (x1, y0 - height(tick))], GRID)
    pen.text((x0 - 6, y0 - height(tick)), f'{tick:g}', FAINT, _font(11), anchor='rm')
  step = (x1 - x0) / len(bars)
  wide = min(step * 0.8, 60)
  for i, (name, n) in enumerate(bars):
    center = x0 + (i + 0.5) * step
    pen.rectangle([center - wide / 2, y0 - height(n), center + wide / 2, y0], color)
    pen.text((center, y0 - height(n) - 3), str(n), INK, _font(11), anchor='mb')
    # Neighbouring names alternate between two lines, so that they have twice the room.
    name = name if len(name) <= 2 * step / 7 else name[:max(int(2 * step / 7), MOST_LETTERS)] + '…'
    pen.text((center, y0 + 6 + (14 * (i % 2) if len(bars) > 5 else 0)), name, FAINT, _font(11), anchor='mt')
  pen.line([(x0, y0), (x1, y0)], INK)


def _short(bound: int) -> str:
  return str(bound) if bound < 1024 else f'{bound >> 10}K'


def _font(size: int):
  return ImageFont.load_default(size)
