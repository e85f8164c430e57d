"""The vision tower of a SigLIP folder under the names of Keye's. It is the same tower; its text model, pooling head and
loss scale have no place in Keye."""
import os
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from keye_jax.config import ModelConfig, VisionConfig
from keye_jax.hf import names, processor, reader
from keye_jax.hf.config import read_json, vision_keys

PREFIX, OURS = 'vision_model.', 'visual.vision_model.'
LEFT = ('text_model.', f'{PREFIX}head.', 'logit_scale', 'logit_bias')       # of SigLIP, not of Keye
# Keys that a SigLIP config.json leaves out have the values of `SiglipVisionConfig`; the last is Keye's.
DEFAULTS = {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12, 'num_attention_heads': 12,
            'patch_size': 16, 'image_size': 224, 'spatial_merge_size': 2}
MODEL_TYPES = ('siglip', 'siglip_vision_model')


def is_folder(folder: str) -> bool:
  """Whether a folder holds a SigLIP."""
  path = os.path.join(folder, 'config.json')
  return os.path.isfile(path) and read_json(path).get('model_type') in MODEL_TYPES


def open_tower(folder: str) -> tuple[VisionConfig, reader.Source, list[str]]:
  """(config, tensors under Keye's names, names of the tensors that are left out); reads headers only.

  The config has the pixel normalisation of the folder and, for what SigLIP lacks (projector, packing positions), the
  values of the published Keye. Raises InputError naming the file or key at fault.
  """
  path = os.path.join(folder, 'config.json')
  raw = read_json(path)
  if raw.get('model_type') not in MODEL_TYPES:
    raise InputError(f'{path}: model_type {raw.get("model_type")!r} is no SigLIP; supported are '
                     f'{", ".join(MODEL_TYPES)}')
  keys = DEFAULTS | (raw.get('vision_config') or raw)
  vision, _ = processor.read(folder, vision_keys(keys, path))
  source = reader.open_folder(folder)
  # `SiglipVisionModel` saves its tensors without the prefix in some releases of transformers.
  bare = not any(name.startswith(PREFIX) for name in source.shapes)
  ours = {}
  left = []
  for name in source.shapes:
    full = PREFIX + name if bare else name
    if full.startswith(LEFT):
      left.append(name)
    else:
      ours[OURS + full.removeprefix(PREFIX) if full.startswith(PREFIX) else name] = name
  shapes = {our: source.shapes[name] for our, name in ours.items()}
  return vision, reader.Source(shapes, lambda name, index: source.read(ours[name], index), folder), left


def load_tower(folder: str, dtype: str, place: reader.Place) -> tuple[VisionConfig, dict[str, Any]]:
  """(config, parameters of the tower in Keye's shape); its packing positions, which SigLIP lacks, are zeros."""
  vision, source, _ = open_tower(folder)
  model = ModelConfig(vision=vision)
  reader.check(table(model), source)
  params = reader.build(table(model), source, dtype, place)['vision']
  if vision.packing_positions:
    shape = vision.packing_positions, vision.embed
    zeros = lambda index: np.zeros([len(range(*i.indices(n))) for i, n in zip(index, shape)], reader.DTYPES[dtype])
    params['packing_position'] = place('vision/packing_position', shape, reader.DTYPES[dtype], zeros)
  return vision, params


def table(model: ModelConfig) -> list[names.Tensor]:
  """The tensors of the tower in Keye's table that SigLIP has: all but the packing positions, which nothing reads."""
  return [t for t in names.table(model, 'keye') if t.name.startswith(OURS) and 'packing_position' not in t.name]
