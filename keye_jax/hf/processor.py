"""How pixels are prepared: DataConfig and VisionConfig <-> the three preprocessor files of a folder.

The classes named are those of stock transformers whose geometry is the same (both sides a multiple of patch * merge,
pixels between two limits, patches in merge order), so `AutoImageProcessor` on an exported folder gives the patches that
the model was trained on. `processor_config.json` repeats both for transformers 5, which reads that file alone.
"""
import dataclasses
import os
from typing import Any

from data_pipelines.errors import InputError
from keye_jax.config import DataConfig, VisionConfig
from keye_jax.hf.config import read_json


def to_hf(vision: VisionConfig, data: DataConfig) -> dict[str, dict[str, Any]]:
  """File name -> content."""
  token = (vision.patch * vision.merge) ** 2    # pixels of one language token
  common = {
      'do_resize': True, 'do_rescale': True, 'rescale_factor': 1 / 255, 'do_normalize': True, 'do_convert_rgb': True,
      'image_mean': [vision.mean] * 3, 'image_std': [vision.std] * 3, 'resample': 3,
      'patch_size': vision.patch, 'merge_size': vision.merge, 'temporal_patch_size': 1,
  }

  def limits(low: int, high: int) -> dict[str, Any]:
    low, high = low * token, high * token
    return {'min_pixels': low, 'max_pixels': high, 'size': {'shortest_edge': low, 'longest_edge': high}}

  image = common | limits(data.image_tokens_min, data.image_tokens_max) | {
      'image_processor_type': 'Qwen2VLImageProcessor'}
  video = common | limits(data.frame_tokens_min, data.frame_tokens_max) | {
      'video_processor_type': 'Qwen2VLVideoProcessor', 'do_sample_frames': True, 'fps': data.fps,
      'min_frames': data.min_frames, 'max_frames': max(data.video_tokens // data.frame_tokens_min, data.min_frames),
      'total_pixels': data.video_tokens * token}
  name = {'processor_class': 'Qwen2VLProcessor'}
  return {'preprocessor_config.json': image | name, 'video_preprocessor_config.json': video | name,
          'processor_config.json': name | {'image_processor': image, 'video_processor': video}}


def read(folder: str, vision: VisionConfig) -> tuple[VisionConfig, DataConfig]:
  """Pixel normalisation and media limits of a folder; a file that is absent leaves the published model's values.

  Raises InputError for a normalisation that differs between channels.
  """
  data, token = DataConfig(), (vision.patch * vision.merge) ** 2
  path = os.path.join(folder, 'preprocessor_config.json')
  if os.path.exists(path):
    raw = read_json(path)
    mean, std = (_same(raw, key, path, default) for key, default in (('image_mean', vision.mean),
                                                                     ('image_std', vision.std)))
    vision = dataclasses.replace(vision, mean=mean, std=std)
    data = dataclasses.replace(data, **_tokens(raw, token, 'image_tokens_min', 'image_tokens_max'))
  path = os.path.join(folder, 'video_preprocessor_config.json')
  if os.path.exists(path):
    raw = read_json(path)
    own = {'fps': raw.get('fps'), 'min_frames': raw.get('min_frames')}
    if 'total_pixels' in raw:
      own['video_tokens'] = int(raw['total_pixels']) // token
    own = {k: v for k, v in own.items() if v is not None}
    data = dataclasses.replace(data, **own, **_tokens(raw, token, 'frame_tokens_min', 'frame_tokens_max'))
  return vision, data


def _tokens(raw: dict[str, Any], token: int, low: str, high: str) -> dict[str, int]:
  found = {low: raw.get('min_pixels'), high: raw.get('max_pixels')}
  return {k: int(v) // token for k, v in found.items() if v is not None}


def _same(raw: dict[str, Any], key: str, where: str, default: float) -> float:
  channels = raw.get(key) or [default]
  if len(set(channels)) != 1:
    raise InputError(f'{where}: {key} = {channels} differs between channels, which is not supported')
  return float(channels[0])
