"""The parameters of a config, whichever of the two models it is."""
from typing import Any

import jax

from keye_jax.config import ModelConfig
from keye_jax.nn import contrast, keye


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Random parameters of a language model (`nn/keye.py`), or of two towers (`nn/contrast.py`)."""
  return (contrast if config.contrast else keye).init(config, key)


def param_shapes(config: ModelConfig) -> dict[str, Any]:
  """The same tree as ShapeDtypeStructs; allocates nothing."""
  return (contrast if config.contrast else keye).param_shapes(config)
