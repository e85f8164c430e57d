"""Pictures to pixels that a vision encoder of fixed patch size can take.

Sizes follow Keye-VL (its public preprocessing code): both sides a multiple of patch * merge = 28 pixels, so that one
language token covers 28x28 pixels; an image has 4 to 20,480 tokens.

Letters: F frames, H height, W width in pixels, P patches, C = 3 * patch * patch values of a patch.
"""
import io
import math
import os

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.errors import InputError

MAX_RATIO = 200        # of the longer to the shorter side


def smart_resize(height: int, width: int, factor: int = 28, min_pixels: int = 4 * 28 * 28,
                 max_pixels: int = 20480 * 28 * 28) -> tuple[int, int]:
  """(height, width) nearest to the given size with both sides multiples of `factor` and the area within the limits.

  A side is never shorter than `factor`, so an extreme ratio may leave the area above `max_pixels`. Raises InputError
  for an empty image and for a ratio of sides above 200.
  """
  if height < 1 or width < 1:
    raise InputError(f'an image of {height}x{width} pixels is empty')
  if max(height, width) > MAX_RATIO * min(height, width):
    raise InputError(f'an image of {height}x{width} pixels: sides differ by more than a factor of {MAX_RATIO}; crop it')
  h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
  if h * w > max_pixels:
    shrink = math.sqrt(height * width / max_pixels)
    h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
  elif h * w < min_pixels:
    grow = math.sqrt(min_pixels / (height * width))
    h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
  return h, w


def load_image(image: str | os.PathLike | bytes | np.ndarray, factor: int = 28, min_tokens: int = 4,
               max_tokens: int = 20480, max_pixels: float = math.inf, max_mb: float = math.inf) -> np.ndarray:
  """A picture as uint8 [h, w, 3] of a size given by `smart_resize`, limits in tokens of factor x factor pixels.

  Takes a path, the bytes of a file, or uint8 pixels [h, w, 3], [h, w, 4] or [h, w]. A file's EXIF rotation is applied;
  transparent parts are laid over white; resizing is bicubic. Raises InputError, naming the file, when it is missing,
  not an image, truncated, of a pixel format without a defined range, or when the file has more than `max_mb` MiB or
  announces more than `max_pixels` pixels, before any is decoded.
  """
  name = 'image array' if isinstance(image, np.ndarray) else 'image bytes' if isinstance(image, bytes) else str(image)
  picture = _from_array(image) if isinstance(image, np.ndarray) else _read(image, name, max_pixels, max_mb)
  try:
    h, w = smart_resize(picture.height, picture.width, factor, min_tokens * factor**2, max_tokens * factor**2)
  except InputError as e:
    raise InputError(f'{name}: {e}') from None
  if picture.size != (w, h):
    picture = picture.resize((w, h), Image.Resampling.BICUBIC)
  return np.array(picture)


def patchify(frames_FHW3: np.ndarray, patch: int = 14, merge: int = 2,
             in_place: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Frames uint8 to patches in merge order: (patch_PC uint8, coord_P4 int32, frame_P int32).

  The merge x merge patches of one language token are neighbours, tokens in row-major order, patches row-major inside a
  token, frame after frame. A patch is flattened channel first (c, y, x). coord is (row, column, rows, columns) in its
  frame, counted in patches; frames are numbered from 1. in_place: the patches take the memory of the frames, which must
  be writable and without gaps; a frame and its patches are equally large. Raises InputError when a side is not a
  multiple of patch * merge.
  """
  frames, height, width, channels = frames_FHW3.shape
  side = patch * merge
  if height % side or width % side or channels != 3:
    raise InputError(f'frames of {height}x{width}x{channels}: need 3 channels and sides that are multiples of {side}')
  R, S = height // side, width // side
  out_FN = (frames_FHW3 if in_place else np.empty_like(frames_FHW3, order='C')).reshape(frames, -1)
  for frame_HW3, out_N in zip(frames_FHW3, out_FN):
    # [R, m, y, S, m, x, c] -> [R, S, m, m, c, y, x]
    x = frame_HW3.reshape(R, merge, patch, S, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    out_N[:] = x.reshape(-1)           # a copy of one frame: it may lie where it goes
  patch_PC = out_FN.reshape(-1, 3 * patch * patch)
  row, column = np.indices((R * merge, S * merge), np.int32).reshape(2, R, merge, S, merge).transpose(0, 1, 3, 2, 4)
  coord_N4 = np.stack([row.ravel(), column.ravel(), np.full(row.size, R * merge, np.int32),
                       np.full(row.size, S * merge, np.int32)], -1)
  return patch_PC, np.tile(coord_N4, (frames, 1)), np.repeat(np.arange(1, frames + 1, dtype=np.int32), row.size)


def _from_array(image: np.ndarray) -> Image.Image:
  if image.dtype != np.uint8 or not (image.ndim == 2 or image.ndim == 3 and image.shape[2] in (3, 4)) or not image.size:
    raise InputError(f'image array of {image.dtype} {image.shape}: give uint8 pixels [h, w, 3], [h, w, 4] or [h, w]')
  return _rgb(Image.fromarray(image), 'image array')


def _read(image: str | os.PathLike | bytes, name: str, max_pixels: float, max_mb: float) -> Image.Image:
  try:
    if (megabytes := (len(image) if isinstance(image, bytes) else os.path.getsize(image)) >> 20) > max_mb:
      raise InputError(f'{name}: {megabytes} MiB, at most {max_mb} are allowed (data.max_mb)')
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
      if opened.width * opened.height > max_pixels:
        raise InputError(f'{name}: {opened.width}x{opened.height} pixels, at most {max_pixels} are allowed '
                         '(data.max_pixels)')
      return _rgb(ImageOps.exif_transpose(opened), name)
  except InputError:
    raise
  except FileNotFoundError:
    raise InputError(f'{name}: no such image file') from None
  except Exception as e:       # PIL's readers raise many kinds for a broken file: OSError, SyntaxError, struct.error...
    reason = 'not a known image format' if isinstance(e, Image.UnidentifiedImageError) else e
    raise InputError(f'{name}: the image cannot be read ({reason})') from None


def _rgb(picture: Image.Image, name: str) -> Image.Image:
  if picture.mode.startswith('I;16'):        # PIL would clip 16-bit grey at 255
    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
  elif picture.mode in ('I', 'F'):
    raise InputError(f'{name}: pixels of 32 bits a channel have no defined range; save it with 8 or 16 bits')
  if picture.has_transparency_data:
    picture = picture.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture).convert('RGB')
  return picture.convert('RGB')
