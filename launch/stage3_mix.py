"""What the third stage of pre-training reads, drawn at random: sizes of samples, without a file or a pixel.

Kinds and weights are `data.sources` of `configs/pretrain.py:30b,stage=3`; frames, sizes of frames and budgets come from
the pipeline's own functions, rows are packed as it packs them. No distribution of the published data is known, so these
are assumptions; every range is log-uniform:

    long_video               15 min (the longest of stage 2) to 2 h (of stage 3), and 256 to 4,096 tokens of text
    documents                scanned, 4 to 48 pages of 1240 x 1754 pixels (A4 at 150 dpi), 512 to 8,192 tokens
    multi_document           2 to 4 of them with 4 to 16 pages each, 512 to 8,192 tokens
    multi_image              2 to 32 pictures, sides of 256 to 2,048 pixels, 256 to 4,096 tokens
    code, agent              text of 8,192 to 262,144 tokens
    short                    samples of stage 2 by its weights:
      temporal_grounding, video_captions     5 s to 15 min, 64 to 2,048 tokens
      math_stem, text_math_code, tool_use, search      text of 256 to 32,768 tokens
      others                 one picture with sides of 224 to 2,048 pixels, 64 to 2,048 tokens

Clips are 1280 x 720 pixels at 30 frames a second, a third of them upright.
"""
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from configs import pretrain
from data_pipelines import images, packing, pipeline, video
from keye_jax.config import DataConfig

RATE = 30.0                    # frames a second of a clip's file
PAGE = 1754, 1240              # pixels
UNIT = 28                      # pixels of a side of one language token
Frames = list[tuple[int, int]]     # (patches of a frame, how many of them follow each other)


class Sample(NamedTuple):
  tokens: int
  frames: Frames


class Row(NamedTuple):
  """A packed row."""
  samples: tuple[int, ...]       # tokens of each
  frames: np.ndarray             # merged tokens of each frame
  places: np.ndarray             # vision row that each lies in


def mixture(stage: str) -> tuple[list[str], np.ndarray]:
  """(names, shares) of a stage's sources."""
  found = pretrain.full(stage).data.sources
  weight = np.array([s.weight for s in found])
  return [s.name for s in found], weight / weight.sum()


def between(rng: np.random.Generator, low: float, high: float) -> float:
  return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def text(rng: np.random.Generator, low: int, high: int) -> int:
  return int(between(rng, low, high))


def picture(height: float, width: float, data: DataConfig) -> int:
  """Patches of a picture, as `data_pipelines/images.py` sizes it."""
  h, w = images.smart_resize(round(height), round(width), UNIT, data.image_tokens_min * UNIT**2,
                             data.image_tokens_max * UNIT**2)
  return 4 * (h // UNIT) * (w // UNIT)


def clip(seconds: float, upright: bool, data: DataConfig) -> Sample:
  """A clip as `data_pipelines/video.py` samples it; before each frame a mark and its time, a token a character."""
  size = (1280, 720) if upright else (720, 1280)
  plan = video.plan_frames(seconds, int(seconds * RATE), *size, data.fps, data.min_frames, data.frame_tokens_min,
                           data.frame_tokens_max, video.adaptive_tokens(data.video_tokens, seconds, data.adaptive))
  tokens = (plan.height // UNIT) * (plan.width // UNIT)
  times = sum(1 + len(f'{i / RATE:.1f}') for i in plan.index_F)
  return Sample(2 + times + len(plan.index_F) * tokens, [(4 * tokens, len(plan.index_F))])


def draw(rng: np.random.Generator, data: DataConfig) -> Sample:
  names, share = mixture_cached('3')
  name = str(rng.choice(names, p=share))
  if name == 'short':
    names, share = mixture_cached('2')
    name = str(rng.choice(names, p=share))
  seen: list[int] = []
  match name:
    case 'long_video':
      one, words = clip(between(rng, 900, 7200), rng.random() < 1 / 3, data), text(rng, 256, 4096)
      return Sample(one.tokens + words, one.frames)
    case 'temporal_grounding' | 'video_captions':
      one, words = clip(between(rng, 5, 900), rng.random() < 1 / 3, data), text(rng, 64, 2048)
      return Sample(one.tokens + words, one.frames)
    case 'code' | 'agent':
      return Sample(text(rng, 8192, 262144), [])
    case 'math_stem' | 'text_math_code' | 'tool_use' | 'search':
      return Sample(text(rng, 256, 32768), [])
    case 'documents':
      seen, words = [picture(*PAGE, data)] * round(between(rng, 4, 48)), text(rng, 512, 8192)
    case 'multi_document':
      pages = sum(round(between(rng, 4, 16)) for _ in range(rng.integers(2, 5)))
      seen, words = [picture(*PAGE, data)] * pages, text(rng, 512, 8192)
    case 'multi_image':
      seen = [picture(between(rng, 256, 2048), between(rng, 256, 2048), data)
              for _ in range(round(between(rng, 2, 32)))]
      words = text(rng, 256, 4096)
    case _:
      seen, words = [picture(between(rng, 224, 2048), between(rng, 224, 2048), data)], text(rng, 64, 2048)
  return Sample(words + sum(2 + p // 4 for p in seen), [(p, 1) for p in seen])


mixture_cached = functools.cache(mixture)


def rows(rng: np.random.Generator, data: DataConfig, shape: packing.Shape) -> Iterator[Row | None]:
  """The endless packed rows of one stream; None for a sample that does not fit an empty row, which training skips too.

  A window closes as in `data_pipelines/pipeline.py`: at WINDOW_ROWS rows' worth of samples or WINDOW_BYTES of pixels.
  """
  free = [shape.vision_patches] * shape.vision_rows
  while True:
    window: list[Sample] = []
    full = pixels = 0
    while full < pipeline.WINDOW_ROWS and pixels < pipeline.WINDOW_BYTES:
      sample = draw(rng, data)
      patches = sum(size * n for size, n in sample.frames)
      if sample.tokens > shape.tokens or packing.place(sample.frames, free) is None:
        yield None
        continue
      window.append(sample)
      full += max(sample.tokens / shape.tokens, patches / sum(free))
      pixels += patches * shape.values
    for bin_ in packing.fill(window, shape, True, str):
      # (vision row, patches of a frame, frames)
      runs = np.array([run for _, runs in bin_.items for run in runs], np.int64).reshape(-1, 3)
      place_F, patches_F = (np.repeat(runs[:, i], runs[:, 2]) for i in (0, 1))
      yield Row(tuple(window[item].tokens for item, _ in bin_.items), patches_F // 4, place_F)


def by_device(rows: Sequence[Row], devices: int) -> np.ndarray:
  """Merged tokens of the frames that each device has at home, a vision row a device: [rows x devices, F], 0 where one
  has fewer frames; F is a power of two."""
  frames = [row.frames[row.places == d] for row in rows for d in range(devices)]
  most = 1 << max(4, math.ceil(math.log2(max(map(len, frames)) or 1)))
  return np.stack([np.pad(f, (0, most - len(f))) for f in frames])
