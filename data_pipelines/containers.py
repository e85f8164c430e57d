"""Video files below the level of sampling: the time of every frame without decoding, and decoding of chosen frames.

Letters: N frames of the file, K keyframes, F wanted frames. A time is an integer in units of the stream's time base.
"""
import contextlib
import fractions
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition

from data_pipelines.errors import InputError

REORDER = 16              # frames by which the order of storing may differ from that of showing
SEEK_FRAMES = 16          # a seek that saves fewer frames than this costs more than decoding them
KEPT_BYTES = 4 << 20      # of a file's packets, up to which they are kept between finding the times and decoding
PACKET_BYTES = 512        # that a packet takes beside its content
THREADS_FROM = 640 * 480  # pixels of a frame, from which decoding in several threads pays
# What reading a damaged file raises; IndexError when a transport stream announces streams in its middle.
DAMAGE = (av.FFmpegError, IndexError)
NOT_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails
# Titles and the like that are not UTF-8 are no reason to refuse a file: PyAV 18 must be told, 19 knows.
_TEXT = {'metadata_errors': 'replace'} if int(av.__version__.split('.')[0]) < 19 else {}


class Times(NamedTuple):
  """When the frames of a file's first video stream are shown."""
  pts_N: np.ndarray       # int64, rising
  key_K: np.ndarray       # int64, times of the keyframes, where decoding can start
  time_base: fractions.Fraction
  seconds: float          # from the first frame to the end of the last
  counted: bool           # the container has no times: frames were counted, pts_N is 0, 1, 2, ...
  aspect: float = 1.0     # width over height of a pixel

  @property
  def fps(self) -> float:
    return len(self.pts_N) / self.seconds


class Limits(NamedTuple):
  """What reading one file may cost; the names of the config's keys are those under data."""
  max_seconds: float = math.inf          # of video
  max_mb: float = math.inf               # MiB of file
  max_pixels: float = math.inf           # of a frame as stored
  max_decode_seconds: float = math.inf
  deadline: float = math.inf             # by time.monotonic()

  def started(self) -> 'Limits':
    """With the time for decoding running from now."""
    return self._replace(deadline=time.monotonic() + self.max_decode_seconds)


@contextlib.contextmanager
def opened(path: str | os.PathLike, limits: Limits = Limits()):         # noqa: B008 (immutable)
  """(container, first video stream), closed at the end. Cover pictures of audio files and the thumbnails of a player's
  bar are not video streams.

  Raises InputError naming the file when it is missing, empty, not a media file, has no video stream or is beyond the
  limits on size and pixels.
  """
  if not os.path.isfile(path):
    raise InputError(f'{path}: no such video file')
  if not os.path.getsize(path):
    raise InputError(f'{path}: the video file is empty')
  if (megabytes := os.path.getsize(path) >> 20) > limits.max_mb:
    raise InputError(f'{path}: {megabytes} MiB, at most {limits.max_mb} are allowed (data.max_mb)')
  # A header may announce any size: a decoder that was told a limit does not allocate beyond it.
  pixels = {'max_pixels': str(int(limits.max_pixels))} if math.isfinite(limits.max_pixels) else {}
  try:
    # An absolute path and this option keep a name or a playlist from opening anything but files.
    container = av.open(os.path.abspath(path), options={'protocol_whitelist': 'file', **pixels}, **_TEXT)
  except (av.FFmpegError, OSError) as e:
    raise InputError(f'{path}: not a readable video, damaged or truncated ({_reason(e)})') from None
  with container:
    streams = [s for s in container.streams.video if not s.disposition & NOT_VIDEO]
    if not streams:
      raise InputError(f'{path}: no video stream' + (', only audio' if container.streams.audio else ''))
    if streams[0].codec_context is None:
      raise InputError(f'{path}: no decoder for the video stream')
    codec = streams[0].codec_context
    if codec.width * codec.height > limits.max_pixels:
      raise InputError(f'{path}: frames of {codec.width}x{codec.height} pixels, at most {limits.max_pixels} pixels are '
                       'allowed (data.max_pixels)')
    codec.options = codec.options | pixels
    yield container, streams[0]


def read_times(path: str | os.PathLike, limits: Limits = Limits()) -> Times:         # noqa: B008 (immutable)
  """Reads all packets of the video stream, decoding nothing, or counts frames by decoding when packets have no times.

  Raises InputError as `opened`, and when the stream has no frames, is longer than allowed, takes longer to read, or
  when less than half of what the header announces is there.
  """
  with opened(path, limits) as (container, stream):
    return _times(path, container, stream, limits, [])


@contextlib.contextmanager
def reading(path: str | os.PathLike, limits: Limits = Limits()          # noqa: B008 (immutable)
            ) -> Iterator[tuple[Times, Callable[[np.ndarray], Iterator[tuple[int, av.VideoFrame]]]]]:
  """(times, function of wanted times that decodes as `decode` does, to be called once) of a file.

  A small file that is decoded from its start on in one go is opened and read once: its packets wait in memory. Raises
  InputError as `read_times`.
  """
  with opened(path, limits) as (container, stream):
    kept = []
    times = _times(path, container, stream, limits, kept)
    yield times, lambda pts_F: decode(path, times, pts_F, limits, (kept, stream) if kept else None)


def _times(path, container, stream, limits, kept: list[av.Packet]) -> Times:
  """Fills `kept` with all packets of the stream, or with none when they are too large or of no use."""
  declared, aspect = _declared(stream), float(stream.sample_aspect_ratio or 1)
  _check_length(path, declared, limits)
  packets, size, shown, dts = 0, 0, [], []
  with contextlib.suppress(*DAMAGE):                 # what comes before it counts
    for packet in container.demux(stream):
      _check_time(path, limits)
      size += packet.size + PACKET_BYTES
      if size <= KEPT_BYTES:
        kept.append(packet)
      if packet.size:
        packets += 1
        dts.append(packet.dts)
        if not packet.is_discard:                    # cut away by an edit list
          shown.append((packet.pts, packet.duration or 0, packet.is_keyframe))
  # AVI has no presentation times; those made up for it are wrong when frames are stored out of order.
  reorders = stream.codec_context.has_b_frames
  timeless = (container.format.name == 'avi' and reorders or any(pts is None for pts, _, _ in shown)
              or _begins_anew([t for t in dts if t is not None]))
  if size > KEPT_BYTES or timeless:
    kept.clear()
  frames, rate, time_base = stream.frames, stream.guessed_rate or stream.average_rate or 25, stream.time_base
  if 2 * packets < frames:
    raise InputError(f'{path}: truncated, only {packets} of {frames} frames are there; copy the file again')
  if timeless:
    return _count(path, rate, limits)._replace(aspect=aspect)
  if not shown:
    raise InputError(f'{path}: the video stream has no frames')
  pts_N = np.unique(np.array([pts for pts, _, _ in shown], np.int64))
  key_K = np.unique(np.array([pts for pts, _, is_key in shown if is_key], np.int64))
  if not reorders and any(b[0] < a[0] for a, b in itertools.pairwise(shown)):
    key_K = key_K[:0]                                # a codec that keeps the order, stored in another: no seeking
  step = float(np.median(np.diff(pts_N))) if len(pts_N) > 1 else float(1 / (rate * time_base))
  seconds = float((pts_N[-1] - pts_N[0] + (max(shown)[1] or step)) * time_base)
  if declared > 2 * seconds and packets != frames:
    raise InputError(f'{path}: truncated, only {seconds:.1f} of {declared:.1f} seconds are there; copy the file again')
  if packets == frames:                              # complete: the last frame may be held longer than its packet says
    seconds = max(seconds, declared)
  _check_length(path, seconds, limits)
  return Times(pts_N, key_K, time_base, seconds, False, aspect)


def decode(path: str | os.PathLike, times: Times, pts_F: np.ndarray, limits: Limits = Limits(),        # noqa: B008
           kept: tuple[list[av.Packet], Any] | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
  """(index into pts_F, frame) for the wanted times, which must rise, in the order of the file.

  kept: all packets of the stream and the stream, which is still open; the file is opened anew when that does not do.
  Frames that cannot be decoded are left out. Raises InputError when it takes longer than allowed.
  """
  place = {int(pts): i for i, pts in enumerate(pts_F)}
  stretches = [] if times.counted else runs(times, pts_F)
  # Where it seeks, the file is read as it always is: from packets that were kept, damage could look different.
  once = kept is not None and [key for key, _ in stretches] == [None]
  with contextlib.nullcontext(kept) if once else opened(path, limits) as (source, stream):
    if stream.codec_context.width * stream.codec_context.height >= THREADS_FROM:
      stream.thread_type = 'AUTO'
    else:
      stream.codec_context.thread_count = 1
    if times.counted:
      for i, frame in enumerate(_decoded(source.demux(stream), stream)):
        _check_time(path, limits)
        if i in place:
          yield place[i], frame
        if i >= pts_F[-1]:
          return
    for key, run_F in stretches:
      wanted = set(run_F.tolist())
      # A frame that is not there by then does not come.
      end = int(times.pts_N[min(np.searchsorted(times.pts_N, run_F[-1]) + REORDER, len(times.pts_N) - 1)])
      for frame in (_decoded(source, stream, wanted) if once else
                    _from(source, stream, key, int(times.pts_N[0]), wanted)):
        _check_time(path, limits)
        if frame.pts in wanted:
          wanted.discard(frame.pts)
          yield place[frame.pts], frame
        if not wanted or frame.pts is not None and frame.pts > end:
          break


def runs(times: Times, pts_F: np.ndarray) -> list[tuple[int | None, np.ndarray]]:
  """Wanted times in stretches that are decoded in one go, each with the keyframe to seek to (None: the start)."""
  key_K = times.key_K if len(times.key_K) else times.pts_N[:1]
  key_F = key_K[np.maximum(np.searchsorted(key_K, pts_F, 'right') - 1, 0)]
  # Frames that a seek to the keyframe of a wanted frame would save, counted from the wanted frame before it.
  before_F = np.concatenate([[-1], np.searchsorted(times.pts_N, pts_F[:-1])])
  saved_F = np.searchsorted(times.pts_N, key_F) - before_F - 1
  seeks = saved_F >= SEEK_FRAMES
  bounds = np.flatnonzero(np.concatenate([[True], seeks[1:]]))
  return [(int(key_F[a]) if seeks[a] else None, pts_F[a:b]) for a, b in zip(bounds, [*bounds[1:], len(pts_F)])]


def _from(container, stream, key: int | None, start: int, wanted: set[int]) -> Iterator[av.VideoFrame]:
  """Decoded frames from a keyframe on."""
  if key is not None:
    container.seek(key, stream=stream)
    frames = _decoded(container.demux(stream), stream, wanted)
    first = next(frames, None)
    if first is not None and first.pts is not None and first.pts <= min(wanted):
      yield first
      yield from frames
      return
    container.seek(start, stream=stream)       # an index that is wrong: it led too far or nowhere
  yield from _decoded(container.demux(stream), stream, wanted)


def _decoded(packets: Iterable[av.Packet], stream, wanted: set[int] | None = None) -> Iterator[av.VideoFrame]:
  """Frames of a stream's packets in the order shown. Damaged packets are passed over."""
  # A frame of H.264 that no other refers to is not decoded unless it is wanted. Other codecs do not promise that
  # what is skipped is of no use to others.
  skips = wanted is not None and stream.codec_context.name == 'h264'
  with contextlib.suppress(*DAMAGE):
    for packet in packets:
      if skips:
        stream.codec_context.skip_frame = 'DEFAULT' if packet.pts in wanted else 'NONREF'
      try:
        frames = packet.decode()
      except (*DAMAGE, ValueError):           # ValueError: a stream whose codec changes to one that is not known
        continue
      yield from frames


def _begins_anew(dts_N: list[int]) -> bool:
  """Whether times go back by more than storing frames out of order explains, as in recordings put together."""
  if all(a <= b for a, b in itertools.pairwise(dts_N)):
    return False
  moved_N = np.argsort(dts_N, kind='stable') - np.arange(len(dts_N))
  return len({*dts_N}) < len(dts_N) or np.abs(moved_N).max() > REORDER


def _count(path, rate, limits) -> Times:
  with opened(path, limits) as (container, stream):
    count = 0
    for _ in _decoded(container.demux(stream), stream):
      count += 1
      _check_time(path, limits)
      _check_length(path, float(count / rate), limits)
  if not count:
    raise InputError(f'{path}: no frame of the video can be decoded')
  return Times(np.arange(count), np.zeros(1, np.int64), fractions.Fraction(1) / rate, float(count / rate), True)


def _declared(stream) -> float:
  """Duration in seconds according to the header, 0 when it does not say."""
  if stream.duration:
    return float(stream.duration * stream.time_base)
  try:                                               # Matroska has the end as text: 00:00:10.381000000
    hours, minutes, seconds = map(float, stream.metadata.get('DURATION', '').split(':'))
    return 3600 * hours + 60 * minutes + seconds - float((stream.start_time or 0) * stream.time_base)
  except ValueError:
    return 0.0


def _check_length(path, seconds, limits):
  if seconds > limits.max_seconds:
    raise InputError(f'{path}: {seconds:.0f} seconds of video, at most {limits.max_seconds:.0f} are allowed; cut it '
                     '(data.max_seconds)')


def _check_time(path, limits):
  if time.monotonic() > limits.deadline:
    raise InputError(f'{path}: not read within {limits.max_decode_seconds:g} s; encode it anew with smaller frames or '
                     'more keyframes (data.max_decode_seconds)')


def _reason(error) -> str:
  return getattr(error, 'strerror', None) or str(error)
