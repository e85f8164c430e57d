"""Embeddings of the pictures and captions of a file, by the two towers of `nn/contrast.py`."""
import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines import pipeline
from data_pipelines.errors import InputError
from keye_jax import api, checkpoint, run_folder
from keye_jax.config import DataConfig, ModelConfig, RunConfig
from keye_jax.evals import retrieval
from keye_jax.evals.scores import Score
from keye_jax.nn import contrast


class Embedded(NamedTuple):
  image_NW: np.ndarray        # float32, of length 1
  text_NW: np.ndarray
  captions_N: list[str]


def has_towers(folder: str) -> bool:
  """Whether a folder is a run of the stage vit."""
  return checkpoint.is_run(folder) and run_folder.read_config(folder).model.contrast


def load(folder: str) -> tuple[RunConfig, dict[str, Any]]:
  """(config, parameters) of a run of the stage vit, to embed with. Raises InputError when it is another run."""
  run = run_folder.read_config(folder)
  if not run.model.contrast:
    raise InputError(f'{folder}: holds a language model, which has no text tower to compare pictures with')
  model = dataclasses.replace(run.model, dtype='float32', param_dtype='float32', remat='none')
  data = dataclasses.replace(run.data, tokenizer=api.run_tokenizer(folder, run.data), sources=())
  params = checkpoint.load_params(folder, contrast.param_shapes(model), warnings.warn).params
  return dataclasses.replace(run, model=model, data=data), params


def embed(config: ModelConfig, params: dict[str, Any], data: DataConfig, batch: int = 32) -> Embedded:
  """The pairs of `data.path` in file order, on one device; rows without a picture or a caption are left out. Raises
  InputError at a row that cannot be used."""
  load = pipeline.Load(dataclasses.replace(data, samples=1), config.vision.patch, config.vision.merge, strict=True)
  forward = _forward(config)
  found = Embedded([], [], [])
  for rows in pipeline.heldout_batches(load, batch, 0, 1, together=False):
    out = jax.device_get(forward(params, rows))
    for b in np.flatnonzero(out.pair_BS[:, 0]):
      found.image_NW.append(out.image_BSW[b, 0])
      found.text_NW.append(out.text_BSW[b, 0])
      ids = rows.target_BT[b][rows.weight_BT[b] > 0]
      found.captions_N.append(load.tokenizer.decode(ids[~np.isin(ids, load.tokenizer.stop_ids)]).strip())
  if not found.captions_N:
    raise InputError(f'{data.path}: holds no picture with a caption')
  return Embedded(np.stack(found.image_NW), np.stack(found.text_NW), found.captions_N)


def scores(folder: str, path: str) -> dict[str, Score]:
  """How often the pictures of the file `path` find their captions, by the run `folder`."""
  run, params = load(folder)
  return retrieval.image_to_text(*embed(run.model, params, dataclasses.replace(run.data, path=path)))


@functools.cache
def _forward(config: ModelConfig):
  return jax.jit(functools.partial(contrast.apply, config, 1))
