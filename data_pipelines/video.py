"""Clips to frames at Keye-VL-2.0's sampling: 2 frames a second, a token budget a clip, real times from the container.

Numbers follow the public serving code of Keye-VL-2.0 (keye_adaptive_video.py).

Letters: F sampled frames, N frames of the file, H height, W width in pixels.
"""
import functools
import os
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from data_pipelines import containers, memory
from data_pipelines.errors import InputError
from data_pipelines.images import smart_resize

# (longest duration in seconds, share of the token budget); above the last one a clip has the whole budget. The paper
# and the published code differ.
ADAPTIVE = {
    'off': (),
    'paper': ((256, 0.125), (512, 0.25), (1024, 0.5)),
    'code': ((259, 0.09), (518, 0.18), (1036, 0.36), (2016, 0.7)),
}
# Of frames with more than 8 bits a channel; the faster conversion makes them darker by 2 of 255.
DEEP = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT


class Turn(NamedTuple):
  """How the stored picture becomes the shown one: rows and columns are swapped first, then it is mirrored."""
  swap: bool
  mirror_x: bool
  mirror_y: bool


class VideoInfo(NamedTuple):
  """The first video stream of a file."""
  height: int                 # pixels as shown: square, after rotation
  width: int
  frames: int
  seconds: float
  fps: float                  # mean rate
  turn: 'Turn'


class Plan(NamedTuple):
  index_F: np.ndarray         # int64, numbers of the sampled frames in the file
  height: int                 # pixels of every sampled frame
  width: int


class Clip(NamedTuple):
  frames_FHW3: np.ndarray     # uint8
  seconds_F: np.ndarray       # float64, time of each frame since the file's first frame
  source: str
  duration: float = 0.0       # seconds of the whole file, to the end of its last frame


def probe(path: str | os.PathLike, limits: containers.Limits = containers.Limits()) -> VideoInfo:     # noqa: B008
  """Size, length and rate of a clip. Decodes one frame; raises InputError like `load_video`."""
  with containers.reading(path, limits.started()) as (times, decode):
    frame = next((frame for _, frame in decode(times.pts_N[:1])), None)
  if frame is None:
    raise InputError(f'{path}: the first frame of the video cannot be decoded')
  turn = _turn(frame)
  return VideoInfo(*_shown(frame, times, turn), len(times.pts_N), times.seconds, times.fps, turn)


def plan_frames(seconds: float, frames: int, height: int, width: int, fps: float = 2.0, min_frames: int = 2,
                frame_tokens_min: int = 64, frame_tokens_max: int = 256, video_tokens: int = 184320,
                factor: int = 28) -> Plan:
  """Which of a clip's `frames` are sampled and the one size they all get. A token is factor x factor pixels.

  `fps` frames a second, evenly over the clip, at least `min_frames`, at most as many as the budget holds at
  `frame_tokens_min` each, never more than there are. Then the tokens per frame: the first number whose total exceeds
  `video_tokens`, as the published search ends, so the budget may be passed by less than one token per frame.
  """
  index_F = _sample(seconds, frames, fps, min_frames, frame_tokens_min, video_tokens)
  return Plan(index_F, *_size(len(index_F), height, width, frame_tokens_min, frame_tokens_max, video_tokens, factor))


def adaptive_tokens(video_tokens: int, seconds: float, adaptive: str) -> int:
  """The share of the token budget for a clip of this length."""
  return int(video_tokens * next((share for longest, share in ADAPTIVE[adaptive] if seconds <= longest), 1.0))


def load_video(path: str | os.PathLike, data, factor: int = 28) -> Clip:
  """Samples, decodes and resizes a clip; `data` is a keye_jax.config.DataConfig or has its sampling fields.

  Frames are turned and mirrored as the file says, made of square pixels and resized bicubically. Their times are those
  of the container less the first one's; data.timestamps = 'index': number of the frame over mean rate. Memory: the
  sampled frames at their final size and one frame as stored. A damaged file is used as far as it goes when at least
  half of the frames that its header announces are there and at least half of the sampled frames can be decoded; the
  others are left out.
  Raises InputError, naming the file in one line: missing, empty, not a video, audio only, without frames, damaged or
  truncated beyond that, beyond data.max_seconds, max_mb, max_pixels or max_decode_seconds.
  """
  limits = containers.Limits(data.max_seconds, data.max_mb, data.max_pixels, data.max_decode_seconds).started()
  with containers.reading(path, limits) as (times, decode):
    budget = adaptive_tokens(data.video_tokens, times.seconds, data.adaptive)
    index_F = _sample(times.seconds, len(times.pts_N), data.fps, data.min_frames, data.frame_tokens_min, budget)
    pts_F, frames_FHW3, good = times.pts_N[index_F], None, []
    to_rgb = VideoReformatter()         # one for all frames: setting up a conversion costs more than a small frame
    for i, frame in decode(pts_F):
      turn = _turn(frame)
      try:
        deep = {'interpolation': DEEP} if _is_deep(frame.format.name) else {}
        pixels = _upright(to_rgb.reformat(frame, format='rgb24', threads=1, **deep).to_ndarray(), turn)
        size = _size(len(index_F), *_shown(frame, times, turn), data.frame_tokens_min, data.frame_tokens_max, budget,
                     factor)
      except (av.FFmpegError, ValueError) as e:       # a pixel format without a conversion, an extreme shape
        raise InputError(f'{path}: {e}') from None
      if frames_FHW3 is None:
        frames_FHW3 = memory.pages((len(index_F), *size, 3))
      if pixels.shape[:2] != frames_FHW3.shape[1:3]:
        pixels = Image.fromarray(pixels).resize(frames_FHW3.shape[2:0:-1], Image.Resampling.BICUBIC)
      frames_FHW3[i] = pixels
      good.append(i)
  if 2 * len(good) < len(index_F) or not good:
    raise InputError(f'{path}: damaged, only {len(good)} of {len(index_F)} sampled frames can be decoded')
  seconds_F = (pts_F - times.pts_N[0]) * float(times.time_base)
  if data.timestamps == 'index':
    seconds_F = index_F / times.fps
  good.sort()
  if len(good) < len(index_F):
    frames_FHW3, seconds_F = frames_FHW3[good], seconds_F[good]
  return Clip(frames_FHW3, seconds_F, str(path), times.seconds)


def _sample(seconds, frames, fps, min_frames, frame_tokens_min, video_tokens) -> np.ndarray:
  most = min(max(1, video_tokens // frame_tokens_min), frames)
  # The small number: 0.29 s at 100 fps is 29 frames, but 28.999999999999996 in floating point.
  count = min(max(int(min(fps * seconds, frames) + 1e-9), min_frames), most)
  return np.linspace(0, frames - 1, count).round().astype(np.int64)


def _size(count, height, width, frame_tokens_min, frame_tokens_max, video_tokens, factor) -> tuple[int, int]:
  tokens = min(max(video_tokens // count + 1, frame_tokens_min), frame_tokens_max)
  return smart_resize(height, width, factor, frame_tokens_min * factor**2, tokens * factor**2)


@functools.cache
def _is_deep(pixel_format: str) -> bool:
  """Whether it has more than 8 bits a channel."""
  return max(c.bits for c in av.VideoFormat(pixel_format).components) > 8


def _shown(frame, times, turn: Turn) -> tuple[int, int]:
  """(height, width) of a frame in square pixels, as it is shown. The longer side of a pixel is kept."""
  height, width = frame.height, frame.width
  if times.aspect >= 1:
    width = max(1, round(width * times.aspect))
  else:
    height = max(1, round(height / times.aspect))
  return (width, height) if turn.swap else (height, width)


def _turn(frame) -> Turn:
  """The nearest of the eight ways to turn and mirror a picture to what the file's display matrix does."""
  found = frame.side_data.get('DISPLAYMATRIX')
  if found is None:
    return Turn(False, False, False)
  # A stored pixel (x, y) is shown at (a x + c y, b x + d y), y downwards.
  a, b, _, c, d = np.frombuffer(found, np.int32)[:5].tolist()
  swap = abs(a) + abs(d) < abs(b) + abs(c)
  return Turn(swap, c < 0, b < 0) if swap else Turn(swap, a < 0, d < 0)


def _upright(pixels_HW3: np.ndarray, turn: Turn) -> np.ndarray:
  pixels_HW3 = pixels_HW3.swapaxes(0, 1) if turn.swap else pixels_HW3
  return pixels_HW3[::-1 if turn.mirror_y else 1, ::-1 if turn.mirror_x else 1]
