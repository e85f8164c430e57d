"""Forward FLOPs of the vision tower in closed form, without a model (a multiply-add is 2)."""
from keye_jax.config import ModelConfig, VisionConfig


def patch(v: VisionConfig) -> tuple[float, float]:
  """(of a patch, of a patch with each patch of its frame)."""
  block = 4 * v.embed ** 2 + 2 * v.embed * v.ffn
  return 2.0 * v.layers * block + 2.0 * v.patch_dim * v.embed, 4.0 * v.layers * v.embed


def projected(config: ModelConfig) -> float:
  """Of a merged token, in the projector."""
  merged = config.vision.merge ** 2 * config.vision.embed
  return 2.0 * (merged * merged + merged * config.text.embed)


def frame(config: ModelConfig) -> tuple[float, float]:
  """(linear, square): a frame of n merged tokens costs linear * n + square * n**2."""
  unit = config.vision.merge ** 2
  alone, pair = patch(config.vision)
  return unit * alone + projected(config), unit ** 2 * pair
