"""What `keye bench video` compares: both sides read the same pixels. Nothing here depends on how long it took."""
import argparse
import dataclasses

import numpy as np
import pytest

from data_pipelines import containers, video
from launch import bench_page, bench_rounds, bench_video
from tests.data_pipelines.clips import number, write


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bench')
  write(folder / 'short.mp4', 40, options={'g': '10', 'bf': '2'})
  bench_video.repeat(folder / 'short.mp4', folder / 'long.mp4', 20)
  return folder


def test_a_repeated_clip_shows_its_frames_again_and_again(clip):
  times = containers.read_times(clip / 'long.mp4')
  assert len(times.pts_N) == 800 and times.seconds == pytest.approx(80) and len(times.key_K) == 80
  np.testing.assert_allclose(np.diff(times.pts_N) * float(times.time_base), 0.1)
  frames_FHW3 = video.load_video(clip / 'long.mp4', bench_video.RARE).frames_FHW3
  assert [number(f) for f in frames_FHW3] == [i % 40 for i in np.linspace(0, 799, 16).round().astype(int)]


def test_record_of_both_sides(clip, monkeypatch):
  monkeypatch.setattr(bench_video, 'MIN_SECONDS', 0.0)
  tasks = [bench_video.Task(f'{path.name}, {name}', path, data) for path in (clip / 'short.mp4', clip / 'long.mp4')
           for name, data in bench_video.samplings(path)]
  assert [t.name for t in tasks] == ['short.mp4, every frame', 'short.mp4, 2 a second', 'long.mp4, 1 in 5 seconds']
  tasks = tasks[::2]
  found, work, peak = bench_video.measure(tasks, 2)
  assert work == {'short.mp4, every frame': (40, 1), 'long.mp4, 1 in 5 seconds': (16, 1)}
  assert all(0 < frames <= most for most, frames in peak.values())
  assert all(len(r.seconds[side]) == 2 and min(r.seconds[side]) > 0 for r in found.values()
             for side in ('keye_jax', 'pyav', 'keye_jax cpu', 'pyav cpu'))
  seconds = lambda theirs: bench_rounds.Rounds(
      {'keye_jax': [1.0] * 6, 'pyav': [1.0] * 6, 'keye_jax cpu': [0.5] * 6, 'pyav cpu': theirs}, [0.01] * 6, 0.0)
  args, even = argparse.Namespace(rounds=6, step_seconds=2.0, clips=12), [0.5, 0.46, 0.5, 0.6, 0.45, 0.5]
  out = bench_video.record(tasks, dict.fromkeys(found, seconds(even)), work, peak, args, 3)
  assert out['verdict'] == 'shown' and list(out['medians of ratios'].values()) == pytest.approx([1.0] * 2)
  assert out['baselines']['pyav']['short.mp4, every frame, median frames/s'] == 40
  assert all(r == pytest.approx((0.9, 1.2)) for r in out['intervals'].values())
  # Half a second of one core a clip, 12 clips in 2 seconds: three cores.
  assert set(out['feeding']['needs cores'].values()) == {3.0} and not any(out['feeding']['waits'].values())
  assert all(bench_video.feeding({'a': 0.5}, 2.0, 12, cores=2)['waits'].values())
  assert 'short.mp4, every frame' in bench_video.table(out) and 'does not wait' in bench_video.table(out)
  page = bench_page.block('video', out)
  assert '| short.mp4, every frame | 40 | 40 | 1.00 | 0.90 to 1.20 |' in page and '| 3.0 |' in page
  assert ': shown (every interval lies at or above 0.9).' in page
  slow = dict.fromkeys(found, seconds(even)) | {tasks[1].name: seconds([0.44, *even[1:]])}
  out = bench_video.record(tasks, slow, work, peak, args, 3)
  assert out['verdict'] == 'not shown' and 'below 0.9: long.mp4, 1 in 5 seconds 0.96 (0.88 to 1.20)' in out['why']
  busy = dict.fromkeys(found, seconds(even)._replace(others=0.5))
  assert 'void' in bench_video.record(tasks, busy, work, peak, args, 3)['why']


def test_sides_that_differ_are_not_compared(clip, monkeypatch):
  task = bench_video.Task('a', clip / 'short.mp4', dataclasses.replace(bench_video.SPARSE))
  monkeypatch.setattr(bench_video, 'bare', lambda task: lambda: np.zeros((1, 1, 1, 3), np.uint8))
  with pytest.raises(bench_video.InputError, match='read different pixels'):
    bench_video.measure([task], 1)
