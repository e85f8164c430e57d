"""What a medium looks like, in bits that survive encoding and resizing: a perceptual hash.

A picture becomes 32 x 32 grey values and those a cosine transform, of which the 255 lowest waves count: is it clearly
positive, clearly negative, or neither (pHash, Zauner 2010, which asks this of 64 waves and knows no neither: in smooth
pictures most of its bits are noise). A clip has that of three neighbouring sampled frames at each of PLACES fixed
shares of its length, since copies at another rate are sampled at slightly other times. Copies that were cut in time,
cropped, mirrored or overlaid are not found.

Letters: A places, V frames of a place, the one at the place first, F frames, H height, W width in pixels, N = 32,
K = 16 waves an axis, S = 2 signs, Y = 32 bytes of a frame's bits of one sign.
"""
import math
from typing import Any, NamedTuple

import numpy as np
import xxhash
from PIL import Image

N, K, PLACES = 32, 16, 8
BAND = 2                  # bytes that copies must share in the same place to be compared at all
FLOOR = 8.0               # grey levels; a copy seldom moves a wave from below -FLOOR to above FLOOR
LEAST = 16                # waves above it in one of two frames, to compare them: blank frames are all alike
# Mean difference up to which two media are one. Ten clips, encoded with crf 35, resized to 0.3 or with every other
# frame left out, differ by 0.17 from themselves at most; from each other by 0.44 at least.
ALIKE = 0.2
_COS_KN = np.cos(np.pi / N * (np.arange(N) + 0.5) * np.arange(K)[:, None]) * np.sqrt(2 / N)
_LOW_FIRST = np.argsort(np.add.outer(np.arange(K), np.arange(K)).ravel(), kind='stable')


class Look(NamedTuple):
  """One medium. Plain values, so that it goes through JSON."""
  pixels: str             # hash of the sampled frames: equal when every pixel is
  bits: str               # AVSY bytes, hexadecimal
  seconds: float          # of the whole clip, 0 for a picture


def look(kind: str, medium: Any) -> Look:
  """kind: 'image', medium uint8 [H, W, 3]; or 'video' and a video.Clip."""
  frames_FHW3 = medium[None] if kind == 'image' else medium.frames_FHW3
  digest = xxhash.xxh3_128(repr(frames_FHW3.shape).encode())
  digest.update(np.ascontiguousarray(frames_FHW3))
  if kind == 'image':
    return Look(digest.hexdigest(), frame_bits(frames_FHW3[0]), 0.0)
  place_A = (np.arange(PLACES) + 0.5) * (medium.duration / PLACES)
  nearest_A = np.abs(medium.seconds_F[:, None] - medium.seconds_F[0] - place_A).argmin(0)
  frame_AV = np.clip(nearest_A[:, None] + [0, -1, 1], 0, len(frames_FHW3) - 1)
  bits = {i: frame_bits(frames_FHW3[i]) for i in set(frame_AV.ravel().tolist())}
  return Look(digest.hexdigest(), ''.join(bits[i] for i in frame_AV.ravel().tolist()), round(medium.duration, 3))


def frame_bits(pixels_HW3: np.ndarray) -> str:
  """SY bytes of one frame, hexadecimal: which waves are clearly positive, which are clearly negative; low first."""
  grey_NN = np.asarray(Image.fromarray(pixels_HW3).convert('L').resize((N, N), Image.Resampling.BILINEAR), np.float64)
  wave = (_COS_KN @ grey_NN @ _COS_KN.T).ravel()
  wave[0] = 0                   # brightness
  wave = wave[_LOW_FIRST]
  return np.packbits(np.stack([wave > FLOOR, wave < -FLOOR]), 1).tobytes().hex()


def difference(a: Look, b: Look) -> float:
  """Share of their waves in which two media differ, 0 to 1; about 0.5 for two that have nothing in common. Infinite
  when they are not of one kind and length (within 5% and half a second), or are blank."""
  if len(a.bits) != len(b.bits) or abs(a.seconds - b.seconds) > 0.5 + 0.05 * max(a.seconds, b.seconds):
    return math.inf
  a_AVSY, b_AVSY = _bytes(a), _bytes(b)
  found_AV = np.concatenate([_difference(a_AVSY[:, :1], b_AVSY), _difference(a_AVSY, b_AVSY[:, :1])], 1)
  found_A = found_AV.min(1)
  return float(found_A[np.isfinite(found_A)].mean()) if np.isfinite(found_A).any() else math.inf


def _difference(a_AVSY: np.ndarray, b_AVSY: np.ndarray) -> np.ndarray:
  """Waves of opposite sign, and half of those that only one has, over those that one has; infinite where few are."""
  count = lambda bits: np.bitwise_count(bits).sum(-1, dtype=np.int64)
  has_a, has_b = a_AVSY[..., 0, :] | a_AVSY[..., 1, :], b_AVSY[..., 0, :] | b_AVSY[..., 1, :]
  opposite = (a_AVSY[..., 0, :] & b_AVSY[..., 1, :]) | (a_AVSY[..., 1, :] & b_AVSY[..., 0, :])
  either = count(has_a | has_b)
  return np.where(either >= LEAST, (count(opposite) + count(has_a ^ has_b) / 2) / np.maximum(either, 1), np.inf)


def alike(a: Look, b: Look) -> bool:
  """Whether two media are one, pixel for pixel or for the eye."""
  return a.pixels == b.pixels or difference(a, b) <= ALIKE


def bands(a: Look) -> list[str]:
  """Keys of which two media that are alike share at least one, nearly always: pieces of bits with their places."""
  found = [a.pixels]
  for place, bits_SY in enumerate(_bytes(a)[:, 0]):
    for y in range(0, bits_SY.shape[1], BAND):
      if np.bitwise_count(bits_SY[:, y:y + BAND]).sum() >= LEAST // 2:
        found.append(f'{place}.{y}.{bits_SY[0, y:y + BAND].tobytes().hex()}')
  return found


def _bytes(a: Look) -> np.ndarray:
  bits_FSY = np.frombuffer(bytes.fromhex(a.bits), np.uint8).reshape(-1, 2, K * K // 8)
  return bits_FSY.reshape(-1, 3 if len(bits_FSY) > 1 else 1, *bits_FSY.shape[1:])
