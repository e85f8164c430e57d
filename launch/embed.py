"""A vision tower as a function from frames to a vector, for `keye data build --embed`.

Frames are resized to one square, that of the tower's own grid of positions, whatever their size and shape: copies of a
clip then differ by what coding and resizing did to them, and there is one program. The vector is the mean of the
tower's last features over patches and frames, by which its own training tells pictures apart (`nn/contrast.py`).

F frames, N patches of a frame, C values of a patch, W width.
"""
import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.images import patchify
from keye_jax import adapters, api, checkpoint, run_folder
from keye_jax.config import ModelConfig
from keye_jax.hf import reader, siglip
from keye_jax.nn import keye
from keye_jax.nn.model import param_shapes
from keye_jax.nn.vision import Vision


@dataclasses.dataclass(frozen=True)
class Tower:
  """Picklable; the weights are read where it is called first, once a process."""
  folder: str
  digest: str

  def __call__(self, frames_FHW3: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3] -> float32 [W]. F is 1 or always the same: each has a program of its own."""
    model, params = load(self.folder)
    v = model.vision
    side = v.grid // v.merge * v.merge * v.patch
    resize = lambda frame: Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC)
    patch_PC, coord_P4, _ = patchify(np.stack([np.asarray(resize(f)) for f in frames_FHW3]), v.patch, v.merge)
    per_frame = lambda a: a.reshape(len(frames_FHW3), -1, a.shape[-1])
    return np.asarray(features(model, params, per_frame(patch_PC), per_frame(coord_P4)))


def tower(folder: str) -> Tower:
  """The tower of a run, of a Keye or of a SigLIP in Hugging Face's layout. Raises InputError when there is none."""
  load(folder)
  return Tower(folder, adapters.digest(folder))


@functools.lru_cache(1)
def load(folder: str) -> tuple[ModelConfig, Any]:
  """(config, parameters of the tower in float32). Of a Hugging Face folder nothing else is read."""
  if siglip.is_folder(folder):
    vision, params = siglip.load_tower(folder, 'float32', api.placed(ModelConfig()))
    return ModelConfig(vision=vision), params
  if checkpoint.is_run(folder) and (config := run_folder.read_config(folder).model).contrast:
    config = dataclasses.replace(config, dtype='float32', param_dtype='float32')
    params = checkpoint.load_params(folder, param_shapes(config), warnings.warn).params
  else:
    model, params = api.load(folder, 'float32', place=only_vision)
    config = model.config
  if not config.vision.layers:
    raise InputError(f'--embed {folder}: has no vision tower')
  return config, params['vision']


def only_vision(config: ModelConfig) -> reader.Place:
  def place(path, *rest):
    return (api.placed(config) if path.startswith('vision/') else reader.leave)(path, *rest)
  return place


@functools.partial(jax.jit, static_argnums=0)
def features(model: ModelConfig, params: Any, patch_FNC: jax.Array, coord_FN4: jax.Array) -> jax.Array:
  frame_1FN = jnp.ones((1, *patch_FNC.shape[:2]), jnp.int32)
  seen_1FNW = Vision(model).apply({'params': params}, keye.pixels(model, patch_FNC[None]), coord_FN4[None], frame_1FN)
  return seen_1FNW.astype(jnp.float32).mean((0, 1, 2))
