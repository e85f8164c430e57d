"""Files as phones, cameras and editors write them: the right frames, upright, in their colours, at their times.

H height, W width in pixels.
"""
import dataclasses
import fractions
import itertools
import struct

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from data_pipelines import containers, images, video
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig
from tests.data_pipelines.clips import number, numbered, write

SMALL = DataConfig(frame_tokens_min=4, frame_tokens_max=6)         # 48 x 64 pixels become 56 x 56
ALL = dataclasses.replace(SMALL, fps=1000.0)                       # every frame


def numbers(clip):
  return [number(pixels) for pixels in clip.frames_FHW3]


def raw(path, pictures, codec='ffv1', pix_fmt='bgr0', rate=10, form=None, **context):
  """A file of frames as they are, without loss."""
  with av.open(str(path), 'w', options=form or {}) as container:
    stream = container.add_stream(codec, rate=rate)
    first = pictures[0]
    stream.height, stream.width, stream.pix_fmt = first.height, first.width, pix_fmt
    for key, value in context.items():
      setattr(stream.codec_context, key, value)
    for i, frame in enumerate(pictures):
      frame.pts = i
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


MATRICES = [m for a, b in itertools.product((1, -1), repeat=2) for m in ((a, 0, 0, b), (0, a, b, 0))]


@pytest.mark.parametrize('matrix', MATRICES)
def test_turned_and_mirrored(tmp_path, matrix):
  """The eight display matrices (a, b, c, d), written into the header of the track."""
  path = write(tmp_path / 'r.mp4', 12, fps=2, rotation=180, size=(48, 128))
  data, (a, b, c, d) = bytearray(path.read_bytes()), matrix
  at = data.index(b'tkhd') + 4 + 40
  data[at:at + 36] = struct.pack('>9i', a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
  path.write_bytes(data)
  clip = video.load_video(path, dataclasses.replace(SMALL, frame_tokens_min=1, frame_tokens_max=12))
  for i, got in enumerate(clip.frames_FHW3):
    stored_HW3 = numbered(i, 48, 128)
    y_N, x_N = np.indices((48, 128)).reshape(2, -1)
    column_N, row_N = a * x_N + c * y_N, b * x_N + d * y_N             # as the format of the file defines it
    column_N, row_N = column_N - column_N.min(), row_N - row_N.min()
    shown_HW3 = np.zeros((row_N.max() + 1, column_N.max() + 1, 3), np.uint8)
    shown_HW3[row_N, column_N] = stored_HW3[y_N, x_N]
    expected = Image.fromarray(shown_HW3).resize(got.shape[1::-1], Image.Resampling.BICUBIC)
    assert np.abs(got.astype(int) - np.asarray(expected)).mean() < 8
  info = video.probe(path)
  assert (info.height, info.width) == shown_HW3.shape[:2] and clip.frames_FHW3.shape[1:3] == (
      (56, 140) if a else (140, 56))


@pytest.mark.parametrize('aspect, turned, shown', [
    ((2, 1), False, (48, 128)), ((1, 2), False, (96, 64)), ((2, 1), True, (128, 48)), ((0, 1), False, (48, 64))])
def test_pixels_that_are_not_square(tmp_path, aspect, turned, shown):
  with av.open(str(tmp_path / 'a.mp4'), 'w') as container:
    stream = container.add_stream('libx264', rate=2)
    stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
    stream.codec_context.sample_aspect_ratio = fractions.Fraction(*aspect)
    if turned:
      stream.set_display_rotation(90)
    for i in range(4):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), 'rgb24')))
    container.mux(stream.encode())
  info = video.probe(tmp_path / 'a.mp4')
  assert (info.height, info.width) == shown
  clip = video.load_video(tmp_path / 'a.mp4', dataclasses.replace(SMALL, frame_tokens_min=1, frame_tokens_max=12))
  assert clip.frames_FHW3.shape[1:3] == tuple(round(side / 28) * 28 for side in shown)
  turns = {number(np.rot90(clip.frames_FHW3[3], k)) for k in (1, 3)} if turned else {number(clip.frames_FHW3[3])}
  assert 3 in turns


def test_odd_sizes(tmp_path):
  """47 x 63 pixels: without loss to the last row and column, and with colours at half the resolution."""
  rng = np.random.default_rng(0)
  pixels_FHW3 = rng.integers(0, 256, (3, 47, 63, 3), np.uint8)
  path = raw(tmp_path / 'a.mkv', [av.VideoFrame.from_ndarray(p, 'rgb24').reformat(format='bgr0') for p in pixels_FHW3])
  clip = video.load_video(path, ALL)
  size = clip.frames_FHW3.shape[2:0:-1]
  for got, pixels in zip(clip.frames_FHW3, pixels_FHW3):
    np.testing.assert_array_equal(got, np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)))
  boards = [np.pad(numbered(i, 45, 60), ((1, 1), (1, 2), (0, 0))) for i in range(8)]
  frames = [av.VideoFrame.from_ndarray(board, 'rgb24').reformat(format='yuv420p') for board in boards]
  path = raw(tmp_path / 'b.webm', frames, 'libvpx-vp9', 'yuv420p')
  assert numbers(video.load_video(path, ALL)) == list(range(8))


RED_BLUE = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize('pix_fmt, bits', [('yuv420p', 8), ('yuv444p', 8), ('yuv420p10le', 10), ('yuv444p12le', 12)])
@pytest.mark.parametrize('is_full', [False, True])
@pytest.mark.parametrize('matrix', [1, 5, 6, 9])
def test_colours(tmp_path, pix_fmt, bits, is_full, matrix):
  """Planes of one colour; the expectation is the definition of the standard: BT.709, BT.601 twice, BT.2020."""
  kr, kb = RED_BLUE[matrix]
  rgb_N3 = np.array([[200, 40, 90], [30, 180, 60], [128, 128, 128], [250, 250, 10], [5, 5, 5]]) / 255
  frames = []
  for red, green, blue in rgb_N3:
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    scale = 2 ** (bits - 8)
    y, u, v = luma, (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    top = 2 ** bits - 1
    values = ((y * top, u * top + 2 ** (bits - 1), v * top + 2 ** (bits - 1)) if is_full else
              ((16 + 219 * y) * scale, (128 + 224 * u) * scale, (128 + 224 * v) * scale))
    frame = av.VideoFrame(64, 48, pix_fmt)
    for plane, value in zip(frame.planes, values):
      size = plane.buffer_size // (1 if bits == 8 else 2)
      plane.update(np.full(size, round(value), np.uint8 if bits == 8 else '<u2').tobytes())
    frame.color_range, frame.colorspace = 2 if is_full else 1, matrix
    frames.append(frame)
  path = raw(tmp_path / 'a.mkv', frames, pix_fmt=pix_fmt, color_range=2 if is_full else 1, colorspace=matrix)
  clip = video.load_video(path, ALL)
  np.testing.assert_allclose(clip.frames_FHW3.reshape(5, -1, 3).mean(1), rgb_N3 * 255, atol=1.5 if bits > 8 else 2.5)


@pytest.mark.parametrize('bf', [0, 2])
def test_negative_times(tmp_path, bf):
  """A transport stream whose 33-bit clock passes its end: what comes before it has negative times."""
  pts = np.array([-700, -400, -390, 0, 20, 500, 900, 1000])
  path = write(tmp_path / 'n.ts', 8, fps=30, pts=pts + 2**33 // 90, options={'bf': str(bf)},
               form={'avoid_negative_ts': 'disabled', 'mpegts_copyts': '1'})
  with av.open(str(path)) as container:
    assert min(p.pts for p in container.demux(video=0) if p.size) < 0
  clip = video.load_video(path, ALL)
  assert numbers(clip) == list(range(8))
  np.testing.assert_allclose(clip.seconds_F, (pts + 700) / 1000, atol=1e-9)


@pytest.mark.parametrize('suffix', ['mkv', 'mp4', 'mov'])
def test_frames_stored_out_of_order_by_a_codec_that_keeps_the_order(tmp_path, suffix):
  path, stored = tmp_path / f'a.{suffix}', [0, 3, 1, 2, 4, 7, 5, 6, 8, 9, 11, 10]
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('mjpeg', rate=10)
    stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuvj420p'
    for at, shown in enumerate(stored):
      frame = av.VideoFrame.from_ndarray(numbered(shown), 'rgb24').reformat(format='yuvj420p')
      frame.pts = at
      for packet in stream.encode(frame):
        packet.pts, packet.dts, packet.time_base = shown, at - 3, fractions.Fraction(1, 10)
        container.mux(packet)
  assert not containers.read_times(path).counted
  clip = video.load_video(path, ALL)
  assert numbers(clip) == list(range(12))
  np.testing.assert_allclose(clip.seconds_F, np.arange(12) / 10)
  assert numbers(video.load_video(path, SMALL)) == [0, 11]          # 1.2 seconds
  assert numbers(video.load_video(path, dataclasses.replace(SMALL, fps=3.4))) == [0, 4, 7, 11]


@pytest.mark.parametrize('skipped, bf', [(8, 0), (6, 0), (7, 2)])
def test_edit_list_cuts_the_beginning_away(tmp_path, skipped, bf):
  """Also in the middle of a group of frames: what is decoded only because others need it is not shown."""
  path = write(tmp_path / 'e.mp4', 24, options={'g': '4', 'bf': str(bf)})
  data = bytearray(path.read_bytes())
  at = data.index(b'elst') + 12
  with av.open(str(path)) as container:
    step = int(fractions.Fraction(1, 10) / container.streams.video[0].time_base)
  length, start = struct.unpack('>ii', data[at:at + 8])
  data[at:at + 8] = struct.pack('>ii', length - 100 * skipped, start + skipped * step)          # length in 1/1000 s
  path.write_bytes(data)
  clip = video.load_video(path, ALL)
  assert numbers(clip) == list(range(skipped, 24))
  np.testing.assert_allclose(clip.seconds_F, np.arange(24 - skipped) / 10, atol=1e-9)


def test_the_video_among_sound_covers_and_other_videos(tmp_path):
  """The first stream that is a video: after sound and a cover picture, before a second video."""
  with av.open(str(tmp_path / 'a.mp4'), 'w') as container:
    sound, cover = container.add_stream('aac', rate=16000), container.add_stream('mjpeg', rate=1)
    first, second = (container.add_stream('libx264', rate=rate) for rate in (10, 25))
    cover.disposition = Disposition.attached_pic
    for stream, pix_fmt in ((cover, 'yuvj420p'), (first, 'yuv420p'), (second, 'yuv420p')):
      stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
    picture = lambda i, form: av.VideoFrame.from_ndarray(numbered(i), 'rgb24').reformat(format=form)
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
    silence.sample_rate, silence.pts = 16000, 0
    container.mux([*sound.encode(silence), *sound.encode()])
    container.mux([*cover.encode(picture(999, 'yuvj420p')), *cover.encode()])
    for i in range(12):
      container.mux(first.encode(picture(i, 'yuv420p')))
      container.mux(second.encode(picture(i + 100, 'yuv420p')))
    container.mux([*first.encode(), *second.encode()])
  clip = video.load_video(tmp_path / 'a.mp4', ALL)
  assert numbers(clip) == list(range(12))
  np.testing.assert_allclose(clip.seconds_F, np.arange(12) / 10)


def test_times_by_index(tmp_path):
  """As the released code has them: equal on a constant rate, number over mean rate on a variable one."""
  by_index = dataclasses.replace(ALL, timestamps='index')
  path = write(tmp_path / 'c.mp4', 12, fps=25)
  np.testing.assert_allclose(video.load_video(path, ALL).seconds_F, np.arange(12) / 25, atol=1e-9)
  np.testing.assert_allclose(video.load_video(path, by_index).seconds_F, np.arange(12) / 25, atol=1e-9)
  pts = np.array([0, 100, 200, 1000, 1500])
  clip = video.load_video(write(tmp_path / 'v.mkv', 5, fps=30, pts=pts), by_index)
  length = clip.duration
  assert numbers(clip) == list(range(5)) and length > 1.5
  np.testing.assert_allclose(clip.seconds_F, np.arange(5) * length / 5)


def test_limits_on_what_is_not_trusted(tmp_path):
  path = write(tmp_path / 'a.mp4', 30)
  with pytest.raises(InputError, match='a.mp4: frames of 64x48 pixels, at most 1000 pixels'):
    video.load_video(path, dataclasses.replace(SMALL, max_pixels=1000))
  with pytest.raises(InputError, match=r'a.mp4: not read within -1 s; .*data.max_decode_seconds'):
    video.load_video(path, dataclasses.replace(SMALL, max_decode_seconds=-1.0))
  with open(path, 'ab') as f:
    f.truncate(3 << 20)
  with pytest.raises(InputError, match='a.mp4: 3 MiB, at most 2 are allowed'):
    video.load_video(path, dataclasses.replace(SMALL, max_mb=2))
  assert len(video.load_video(path, dataclasses.replace(SMALL, max_mb=3)).frames_FHW3) == 6
  Image.new('RGB', (100, 100)).save(tmp_path / 'a.png')
  with pytest.raises(InputError, match='a.png: 100x100 pixels, at most 9999'):
    images.load_image(tmp_path / 'a.png', max_pixels=9999)
  with pytest.raises(InputError, match='image bytes: 1 MiB, at most 0'):
    images.load_image((tmp_path / 'a.png').read_bytes().ljust(1 << 20), max_mb=0)


def test_frames_that_grow_in_the_middle_stay_within_the_limit(tmp_path):
  """A stream may change its size: beyond the limit the decoder refuses, and what came before it counts."""
  parts = [write(tmp_path / f'{n}.h264', 30, size=size).read_bytes() for n, size in enumerate(((48, 64), (480, 640)))]
  (tmp_path / 'both.h264').write_bytes(b''.join(parts))
  limited = dataclasses.replace(SMALL, max_pixels=10000)
  clip = video.load_video(tmp_path / 'both.h264', limited)
  assert set(numbers(clip)) <= set(range(30)) and clip.seconds_F[-1] < 3
  assert video.load_video(tmp_path / 'both.h264', SMALL).seconds_F[-1] > 5
