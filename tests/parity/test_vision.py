"""Vision tower and projector against numbers of the published tower.

keye_vision_tiny.npz: random weights under Keye names, patches, grids, and float32 outputs of the 8B-preview tower's
code (interpolated positions, 2-D RoPE, one segment per frame), then of the 2.0 projector. Patches there are row-major
over a frame, ours lie in merge order: `merge_order` translates.
"""
import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.config import ModelConfig, TextConfig, VisionConfig
from keye_jax.hf import names, reader
from keye_jax.nn.vision import Projector, Vision
from tests.parity.fixtures import FOLDER, source_of
from tests.tolerances import assert_close


def merge_order(rows: int, columns: int, merge: int = 2) -> np.ndarray:
  """Row-major index of each patch of a frame, in merge order."""
  index = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
  return index.transpose(0, 2, 1, 3).reshape(-1)


def test_tower_and_projector():
  with np.load(FOLDER / 'keye_vision_tiny.npz') as f:
    data = {k: f[k] for k in f}
  width, heads, ffn, layers, image, patch, embed = map(int, data['config'])
  cfg = ModelConfig(text=TextConfig(embed=embed), vision=VisionConfig(
      layers=layers, embed=width, heads=heads, ffn=ffn, patch=patch, image=image, packing_positions=0))
  table = [t for t in names.table(cfg, 'keye') if t.name.startswith(('visual.', 'mlp_AR.'))]
  source = source_of({k: v for k, v in data.items() if k.startswith(('visual.', 'mlp_AR.'))})
  reader.check(table, source)
  params = jax.tree.map(jnp.asarray, reader.build(table, source))

  orders, coords, frames, start = [], [], [], 0
  grids = [(rows, columns) for t, rows, columns in data['grid_thw'] for _ in range(t)]
  for number, (rows, columns) in enumerate(grids, 1):
    order = merge_order(rows, columns)
    orders.append(start + order)
    coords += [(i // columns, i % columns, rows, columns) for i in order]
    frames += [number] * len(order)
    start += len(order)
  order_N = np.concatenate(orders)
  patch_BRNC = data['pixel_values'].reshape(start, -1)[order_N][None, None]

  @jax.jit
  def run(params, patch, coord, frame):
    features = Vision(cfg).apply({'params': params['vision']}, patch, coord, frame)
    return features, Projector(cfg).apply({'params': params['projector']}, features)

  features, tokens = run(params, patch_BRNC, np.array(coords)[None, None], np.array(frames)[None, None])
  assert_close(features[0, 0], data['vision_output'][order_N], what='tower')
  assert_close(tokens[0], data['projector_output'], what='projector')
