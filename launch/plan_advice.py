"""What to change in a run, in words, from the numbers of its plan."""
from typing import Any

from keye_jax.config import RunConfig
from keye_jax.planning import STEPS

GIB = 2**30


def advice(config: RunConfig, found: dict[str, Any]) -> list[str]:
  """One line a remedy when the plan does not fit, and what its numbers leave out."""
  lines = []
  if not found['bytes']['fits']:
    lines += training(config, found) if found['what'] in STEPS else generation(config, found)
  if config.model.vision.layers and not config.data.vision_rows:
    lines.append('no image is in the planned batch: --config.data.vision_rows and --config.data.vision_patches add '
                 'them')
  return lines


def training(config: RunConfig, found: dict[str, Any]) -> list[str]:
  size, mesh, model = found['bytes'], found['mesh'], config.model
  lines = []
  kept = size['parameters'] + size['optimizer']
  if kept > size['hbm'] / 2:
    lines.append(f'parameters and optimizer alone take {kept / GIB:.1f} of {size["hbm"] / GIB:.0f} GiB: use more '
                 'devices' + (', or model.param_dtype = bfloat16' if model.param_dtype == 'float32' else ''))
  if model.remat in ('none', 'attention'):
    lines.append("model.remat = 'block' keeps one hidden state a layer instead of "
                 + ('all activations' if model.remat == 'none' else "that and attention's output"))
  if model.remat != 'offload':
    lines.append("model.remat = 'offload' keeps what is kept of each layer in the memory of the host")
  rows = config.train.batch // config.train.accumulate
  groups = mesh['data'] * mesh['expert']
  if rows > groups:
    lines.append(f'train.accumulate = {config.train.batch // groups}: each micro-batch then holds one row for every '
                 f'group of devices instead of {rows // groups}')
  if model.text.experts and mesh['expert'] > 1 and model.experts_transport == 'ring':
    lines.append(f'a smaller mesh.expert: a device keeps room for the picks of all {mesh["expert"]} devices of its '
                 "expert group; move the factor to mesh.context, or let model.experts_transport be 'padded' or "
                 "'ragged'")
  lines.append(f'a larger mesh.context: a device now holds {config.data.tokens // mesh["context"]:,} tokens of a row')
  return lines


def generation(config: RunConfig, found: dict[str, Any]) -> list[str]:
  size, mesh = found['bytes'], found['mesh']
  kept, rows = size['parameters'] + size.get('cache', 0), config.train.batch // (mesh['data'] * mesh['expert'])
  return [f'parameters{" and caches" if "cache" in size else ""} alone take {kept / GIB:.1f} of '
          f'{size["hbm"] / GIB:.0f} GiB; a device holds {rows} of the rows of train.batch: fewer of them, or a larger '
          'mesh.expert, which cuts the experts too']
