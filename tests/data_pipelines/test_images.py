"""Image sizes against hand numbers, reading against PIL, patches against a loop."""
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.images import load_image, patchify, smart_resize

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('size, limits, expected', [
    ((1080, 1920), {}, (1092, 1932)),                              # 38.57 -> 39 tokens, 68.57 -> 69
    ((28, 28), {}, (56, 56)),                                      # grown to 4 tokens
    ((10, 10), {}, (56, 56)),
    ((100, 20000), {}, (112, 19992)),                              # ratio 200 is still allowed
    ((9000, 9000), {}, (4004, 4004)),                              # 4007.03 pixels -> 143 whole tokens a side
    ((720, 1280), {'max_pixels': 256 * 784}, (336, 588)),          # 448 * 0.75 = 336, 597.3 -> 21 tokens
    ((720, 1280), {'min_pixels': 64 * 784, 'max_pixels': 64 * 784}, (168, 280)),
    ((224, 398), {'min_pixels': 64 * 784, 'max_pixels': 256 * 784}, (224, 392)),
    ((42, 70), {'min_pixels': 784}, (56, 56)),                     # 1.5 and 2.5 tokens round to even
    ((14, 1400), {'max_pixels': 784}, (28, 280)),                  # a side is never under one token
])
def test_smart_resize(size, limits, expected):
  assert smart_resize(*size, **limits) == expected


@pytest.mark.parametrize('size', [(100, 20001), (3, 601)])
def test_extreme_ratio_is_an_error(size):
  with pytest.raises(InputError, match='factor of 200'):
    smart_resize(*size)


def test_an_image_of_fitting_size_is_not_touched(tmp_path):
  pixels = RNG.integers(0, 256, (84, 56, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'a.png')
  for source in (tmp_path / 'a.png', str(tmp_path / 'a.png'), (tmp_path / 'a.png').read_bytes(), pixels):
    np.testing.assert_array_equal(load_image(source), pixels)


def test_resizing_is_bicubic_to_the_smart_size():
  pixels = RNG.integers(0, 256, (130, 201, 3), np.uint8)
  expected = np.asarray(Image.fromarray(pixels).resize((196, 140), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(load_image(pixels), expected)
  assert load_image(pixels, max_tokens=16).shape == (84, 112, 3)       # 90.1 x 139.3 pixels hold 3 x 4 tokens
  assert load_image(pixels, factor=32, min_tokens=1).shape == (128, 192, 3)


def test_exif_rotation_is_applied(tmp_path):
  pixels = np.zeros((56, 84, 3), np.uint8)
  pixels[:, :42] = (255, 0, 0)
  exif = Image.Exif()
  exif[0x0112] = 6                       # the camera was turned: show it rotated clockwise
  Image.fromarray(pixels).save(tmp_path / 'r.png', exif=exif)
  out = load_image(tmp_path / 'r.png')
  np.testing.assert_array_equal(out, np.rot90(pixels, -1))


def test_other_pixel_formats(tmp_path):
  grey = RNG.integers(0, 256, (56, 56), np.uint8)
  np.testing.assert_array_equal(load_image(grey), np.repeat(grey[..., None], 3, -1))
  Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'deep.png')
  np.testing.assert_array_equal(load_image(tmp_path / 'deep.png'), load_image(grey))
  clear = np.zeros((56, 56, 4), np.uint8)
  clear[:28, :, 3] = 255
  assert (load_image(clear)[:28] == 0).all() and (load_image(clear)[28:] == 255).all()
  palette = Image.fromarray(np.dstack([grey] * 3)).quantize(16)
  palette.save(tmp_path / 'p.png')
  np.testing.assert_array_equal(load_image(tmp_path / 'p.png'), np.asarray(palette.convert('RGB')))
  Image.fromarray(np.zeros((56, 56), np.float32)).save(tmp_path / 'f.tiff')
  with pytest.raises(InputError, match='f.tiff.*no defined range'):
    load_image(tmp_path / 'f.tiff')


def test_bad_images_name_the_file_in_one_line(tmp_path):
  data = io.BytesIO()
  Image.fromarray(RNG.integers(0, 256, (200, 200, 3), np.uint8)).save(data, 'JPEG')
  bad = {'empty.png': b'', 'text.jpg': b'hello', 'cut.jpg': data.getvalue()[:2000],
         'thin.png': None, 'missing.png': None, 'folder.png': None}
  for name, content in bad.items():
    if content is not None:
      (tmp_path / name).write_bytes(content)
  Image.new('RGB', (3, 700)).save(tmp_path / 'thin.png')
  (tmp_path / 'folder.png').mkdir()
  for name in bad:
    with pytest.raises(InputError) as e:
      load_image(tmp_path / name)
    assert name in str(e.value) and '\n' not in str(e.value)
  with pytest.raises(InputError, match='image bytes'):
    load_image(b'nothing')
  for array in (np.zeros((0, 5, 3), np.uint8), np.zeros((56, 56, 3), np.float32), np.zeros((56, 56, 2), np.uint8)):
    with pytest.raises(InputError, match='image array'):
      load_image(array)


@pytest.mark.parametrize('patch, merge', [(14, 2), (4, 1), (2, 3)])
def test_patchify_against_a_loop(patch, merge):
  side = patch * merge
  frames = RNG.integers(0, 256, (3, 2 * side, 3 * side, 3), np.uint8)
  patch_PC, coord_P4, frame_P = patchify(frames, patch, merge)
  rows, columns, at = 2 * merge, 3 * merge, 0
  for f in range(3):
    for R in range(2):
      for S in range(3):
        for y in range(merge):
          for x in range(merge):
            r, c = R * merge + y, S * merge + x
            pixels = frames[f, r * patch:(r + 1) * patch, c * patch:(c + 1) * patch]
            np.testing.assert_array_equal(patch_PC[at], np.concatenate([pixels[..., k].ravel() for k in range(3)]))
            assert tuple(coord_P4[at]) == (r, c, rows, columns) and frame_P[at] == f + 1
            at += 1
  assert at == len(patch_PC) == len(coord_P4) == len(frame_P)
  assert patch_PC.dtype == np.uint8 and coord_P4.dtype == frame_P.dtype == np.int32
  again_PC, *_ = patchify(frames, patch, merge, in_place=True)
  assert np.shares_memory(again_PC, frames)
  np.testing.assert_array_equal(again_PC, patch_PC)


def test_patchify_refuses_other_sizes():
  with pytest.raises(InputError, match='60x56'):
    patchify(np.zeros((1, 60, 56, 3), np.uint8))
