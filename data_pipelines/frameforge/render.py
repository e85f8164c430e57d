"""Draws digits over real backgrounds and writes H.264 files.

A clip of n half seconds has fps / 2 * (n - 1) + 1 frames and its last one is held for half a second, so that sampling
at 2 frames a second lands on exact half seconds. F frames.
"""
import pathlib

import av
import numpy as np
from PIL import Image

from data_pipelines.frameforge import material
from data_pipelines.frameforge.script import ALONE, LEFT, Event

CLIP_SHARE = 0.6          # of backgrounds: crops of moving pictures, the others pan over a photograph


def draw(rng: np.random.Generator, split: str, events: tuple[Event, ...], length: int, side: int, fps: int):
  """A clip: (uint8 [F, side, side, 3], name of the background). `length` in half seconds."""
  step = fps // 2
  frames_FHW3, name = _background(rng, split, step * (length - 1) + 1, side)
  for event in events:
    _show(rng, split, frames_FHW3[step * event.start:step * event.end], event, side)
  return frames_FHW3, name


def write_mp4(path: pathlib.Path, frames_FHW3: np.ndarray, fps: int) -> None:
  """H.264 with B-frames in an mp4 container; the last frame is held for half a second."""
  with av.open(str(path), 'w') as container:
    # One thread, and no AVX-512, with which x264 gives other bytes from run to run: the same on every machine.
    stream = container.add_stream('libx264', rate=fps, options={
        'preset': 'veryfast', 'crf': '18', 'bf': '2', 'threads': '1', 'x264-params': 'asm=avx'})
    stream.height, stream.width = frames_FHW3.shape[1:3]
    stream.pix_fmt = 'yuv420p'
    packets = []
    for pixels in frames_FHW3:
      packets += stream.encode(av.VideoFrame.from_ndarray(pixels, 'rgb24'))
    packets += stream.encode()
    # The container takes its duration from the last packet written, the presentation's end from the last one shown.
    for packet in (packets[-1], max(packets, key=lambda p: p.pts)):
      packet.duration = round(0.5 / packet.time_base)
    container.mux(packets)


def _background(rng, split, count, side):
  clips, photos = material.backgrounds(split, side)
  among = clips if rng.random() < CLIP_SHARE else photos
  name, levels = among[rng.integers(len(among))]
  level = levels[rng.integers(len(levels))]
  total, height, width = level.shape[:3]
  stride = int(rng.integers(2, 1 + min(6, (total - 1) // (count - 1)))) if min(total, count) > 1 else 0
  time_F = rng.integers(total - stride * (count - 1)) + stride * np.arange(count)
  top_F, left_F = (np.linspace(*rng.integers(0, free + 1, 2), count).round().astype(int)
                   for free in (height - side, width - side))
  pixels = np.stack([level[t, y:y + side, x:x + side] for t, y, x in zip(time_F, top_F, left_F)])
  if rng.random() < 0.5:
    pixels = pixels[:, :, ::-1]
  return (pixels * rng.uniform(0.6, 1.0)).astype(np.uint8), name


def _show(rng, split, frames_FHW3, event, side):
  """Draws one digit, in place: bright ink on a dark plate, half of the frame or more, near the middle of the frame (or
  of its half, when two are shown), drifting a little."""
  digits = material.digits(split)
  ink_88 = digits.image_N88[rng.choice(np.flatnonzero(digits.label_N == event.digit))]
  size = side // 2 if event.place != ALONE else int(rng.integers(round(0.7 * side), round(0.8 * side) + 1))
  ink = np.asarray(Image.fromarray(ink_88).resize((size, size), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
  plate, bright = rng.uniform(0, 30, 3), rng.uniform(200, 255, 3)
  plate_HW3 = (plate * (1 - ink) + bright * ink).astype(np.uint8)
  middle, drift = (side - size) // 2, side // 28
  away = middle if event.place == ALONE else 0                   # how far it may lie from its place sideways
  left = middle if event.place == ALONE else 0 if event.place == LEFT else side // 2
  near, aside = side // 14, min(away, side // 14)
  y0, x0 = middle + rng.integers(-near, near + 1), left + rng.integers(-aside, aside + 1)
  y1, x1 = np.clip([y0, x0] + rng.integers(-drift, drift + 1, 2), [0, left - away], [side - size, left + away])
  for i, share in enumerate(np.linspace(0, 1, len(frames_FHW3))):
    y, x = round(y0 + share * (y1 - y0)), round(x0 + share * (x1 - x0))
    frames_FHW3[i, y:y + size, x:x + size] = plate_HW3
