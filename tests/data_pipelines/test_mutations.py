"""Damaged files end as frames or as one line that says why: no crash, hang, leak or allocation without bound."""
import collections
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data_pipelines.clips import ROOT, write

pytestmark = pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='open files and memory are read from /proc')
CLIPS = {'a.mp4': {}, 'b.mp4': {'options': {'bf': '2', 'g': '10'}, 'form': {'movflags': 'faststart'}}, 'a.mkv': {},
         'a.ts': {}, 'a.avi': {'codec': 'mpeg4'}, 'a.webm': {'codec': 'libvpx-vp9'}, 'a.mov': {'audio': True},
         'a.h264': {}, 'a.gif': {'codec': 'gif', 'pix_fmt': 'rgb8'}, 'a.flv': {},
         'parts.mp4': {'form': {'movflags': 'frag_keyframe+empty_moov'}},
         'hevc.mp4': {'codec': 'libx265', 'options': {'x265-params': 'log-level=none'}}}


def run(folder, count: int, seed: int, seconds: int) -> collections.Counter:
  """How the mutations ended, by the first words of the reason."""
  for name, kwargs in CLIPS.items():
    write(folder / name, 30, **kwargs)
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
  for name in ('a.png', 'a.jpg', 'a.webp'):
    picture.save(folder / name)
  done = subprocess.run([sys.executable, '-m', 'tests.data_pipelines.mutate', str(folder), str(count), str(seed)],
                        cwd=ROOT, capture_output=True, text=True, timeout=seconds)
  lines = done.stdout.splitlines()
  assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])          # the last line names what was being read
  *said, last = map(json.loads, lines)
  ends = [line for line in said if 'end' in line]
  assert len(ends) == count and all(line['fds'] == 0 for line in ends)
  assert last['peak'] < 1 << 30 and last['grown'] < 100 << 20, last
  return collections.Counter('frames' if line['end'] == 'frames' else 'reason' for line in ends)


def test_a_few(tmp_path):
  found = run(tmp_path, 60, 0, 120)
  assert found['frames'] > 5 and found['reason'] > 5


@pytest.mark.slow
def test_two_thousand(tmp_path):
  found = run(tmp_path, 2000, 1, 900)
  assert found['frames'] > 300 and found['reason'] > 300
