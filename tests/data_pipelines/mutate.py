"""Damages media files in many ways and reads each; run as a process of its own so that a crash is seen.

    python -m tests.data_pipelines.mutate FOLDER COUNT SEED

FOLDER holds whole files. Every mutation is written to FOLDER/mutant<suffix> and read; a line of JSON a mutation goes to
stdout before it is read (its number and what was done), and one after it (how it ended). The process may not take more
than MEMORY bytes of address space.
"""
import json
import pathlib
import resource
import sys

import numpy as np

from data_pipelines import images, video
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig

MEMORY = 3 << 30
DATA = DataConfig(frame_tokens_min=4, frame_tokens_max=6, video_tokens=256, max_seconds=600.0, max_mb=16,
                  max_pixels=1 << 20, max_decode_seconds=20.0)
PICTURES = ('.png', '.jpg', '.webp')


def mutate(rng: np.random.Generator, data: bytes, other: bytes) -> tuple[bytes, str]:
  """(damaged bytes, what was done). `other` is another whole file, of any kind."""
  kind = rng.choice(['bits', 'header bits', 'cut', 'splice', 'swap', 'numbers', 'grow'])
  out, n = bytearray(data), len(data)
  if kind in ('bits', 'header bits'):
    for at in rng.integers(0, n if kind == 'bits' else min(n, 2048), rng.integers(1, 40)):
      out[at] ^= 1 << rng.integers(0, 8)
  elif kind == 'cut':
    out = out[:rng.integers(1, n)]
  elif kind == 'splice':
    size = rng.integers(8, min(n, len(other), 4096))
    out[:size] = other[:size]
  elif kind == 'swap':
    size = int(rng.integers(1, max(n // 4, 2)))
    a, b = rng.integers(0, n - size, 2)
    out[a:a + size], out[b:b + size] = data[b:b + size], data[a:a + size]
  elif kind == 'numbers':        # large, negative and zero counts, sizes and times
    for at in rng.integers(0, n - 4, rng.integers(1, 12)):
      out[at:at + 4] = int(rng.choice([0, 0xffffffff, 0x7fffffff, 0x80000000, 0xffffff])).to_bytes(4, 'big')
  else:
    at = rng.integers(0, n)
    out[at:at] = rng.integers(0, 256, rng.integers(1, 5000), np.uint8).tobytes()
  return bytes(out), str(kind)


def read(path: pathlib.Path) -> str:
  """'frames' or the reason, as training would meet it. Anything but InputError is raised."""
  try:
    if path.suffix in PICTURES:
      pixels_HW3 = images.load_image(path, max_pixels=DATA.max_pixels, max_mb=DATA.max_mb)
      assert pixels_HW3.dtype == np.uint8 and pixels_HW3.shape[0] % 28 == pixels_HW3.shape[1] % 28 == 0
    else:
      clip = video.load_video(path, DATA)
      assert len(clip.frames_FHW3) == len(clip.seconds_F) > 0 and (np.diff(clip.seconds_F) > 0).all()
      assert np.isfinite(clip.seconds_F).all() and clip.frames_FHW3.size <= 2 * DATA.video_tokens * 28 * 28 * 3
    return 'frames'
  except InputError as e:
    assert path.name in str(e) and '\n' not in str(e), e
    return str(e).partition(path.name)[2]


def main(folder: str, count: str, seed: str) -> None:
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  files = sorted(p for p in pathlib.Path(folder).iterdir() if p.stem != 'mutant')
  whole = {path: path.read_bytes() for path in files}
  open_files = lambda: len(list(pathlib.Path('/proc/self/fd').iterdir()))
  used = lambda: int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
  for path in files:
    assert read(path) == 'frames', path
  before, early = open_files(), 0
  for n in range(int(count)):
    rng = np.random.default_rng([int(seed), n])
    path, other = (files[i] for i in rng.integers(0, len(files), 2))
    data, what = mutate(rng, whole[path], whole[other])
    mutant = pathlib.Path(folder) / f'mutant{path.suffix}'
    mutant.write_bytes(data)
    print(json.dumps({'n': n, 'file': path.name, 'what': what}), flush=True)
    print(json.dumps({'n': n, 'end': read(mutant), 'fds': open_files() - before}), flush=True)
    mutant.unlink()
    if n == int(count) // 4:
      early = used()
  status = pathlib.Path('/proc/self/status').read_text()          # ru_maxrss would count what the parent used
  peak = int(status.partition('VmHWM:')[2].split()[0]) << 10
  print(json.dumps({'peak': peak, 'grown': used() - early}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
