"""Small batches with text, images and branches, written out by hand rather than by the pipeline under test."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Batch
from keye_jax.config import IndexerConfig, ModelConfig, TextConfig, VisionConfig
from keye_jax.nn import keye

TEXT = TextConfig(layers=2, embed=32, heads=4, kv_heads=2, head_dim=16, vocab=64, ffn=24, experts=4,
                  experts_per_token=2, mrope_section=(2, 3, 3), indexer=IndexerConfig(heads=2, head_dim=16, topk=6))
VISION = VisionConfig(layers=1, embed=32, heads=2, ffn=48, patch=2, image=8, packing_positions=4)
CONFIG = ModelConfig(text=TEXT, vision=VISION)


def sample(rng, frames: int, grid: tuple[int, int], text: int, branches: tuple[int, ...] = (), vocab: int = 64):
  """One sample as plain lists: tokens, positions, branch ids, vision indices, and its frames' patches."""
  rows, columns = grid
  patches = rng.integers(0, 256, (frames, rows * columns, VISION.patch_dim))
  token, position, branch, vision, now = [], [], [], [], 0
  per_frame = rows * columns // 4
  for f in range(frames):
    token.append(int(rng.integers(vocab)))
    position.append((now,) * 3)
    vision.append(-1)
    now += 1
    for i in range(per_frame):
      r, c = divmod(i, columns // 2)
      token.append(1)
      position.append((now, now + r, now + c))
      vision.append(f * per_frame + i)
    now += max(rows, columns) // 2
  for _ in range(text):
    token.append(int(rng.integers(vocab)))
    position.append((now,) * 3)
    vision.append(-1)
    now += 1
  branch = [0] * len(token)
  for b, n in enumerate(branches, 1):
    for i in range(n):
      token.append(int(rng.integers(vocab)))
      position.append((now + i,) * 3)
      vision.append(-1)
      branch.append(b)
  coord = [(2 * (i // (columns // 2)) + p // 2, 2 * (i % (columns // 2)) + p % 2, rows, columns)
           for i in range(per_frame) for p in range(4)]
  return dict(token=token, position=position, branch=branch, vision=vision, coord=coord, patches=patches,
              frames=frames)


def pack(rows: list[list[dict]], T: int, R: int, N: int) -> Batch:
  """Each row a list of samples; one frame to a vision row."""
  B, C = len(rows), VISION.patch_dim
  out = Batch(*(np.zeros((B, T), t) for t in (np.int32, np.int32, np.float32)), np.zeros((B, T, 3), np.int32),
              np.zeros((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1)),
              np.full((B, T), -1, np.int32), np.zeros((B, R, N, C), np.uint8), np.zeros((B, R, N, 4), np.int32),
              np.zeros((B, R, N), np.int32), np.zeros((B, T), np.int32))
  for b, samples in enumerate(rows):
    t = r = 0
    for number, s in enumerate(samples, 1):
      n, per_frame = len(s['token']), len(s['coord']) // 4
      at = slice(t, t + n)
      out.token_BT[b, at] = s['token']
      out.target_BT[b, at] = np.roll(s['token'], -1)
      out.weight_BT[b, at] = 1
      out.position_BT3[b, at] = s['position']
      out.segment_BT[b, at] = [number << 8 | x for x in s['branch']]
      for i, v in enumerate(s['vision']):
        if v >= 0:
          out.vision_BT[b, t + i] = (r + v // per_frame) * N // 4 + v % per_frame
      for f in range(s['frames']):
        p = len(s['coord'])
        out.patch_BRNC[b, r, :p], out.coord_BRN4[b, r, :p], out.frame_BRN[b, r, :p] = s['patches'][f], s['coord'], 1
        r += 1
      t += n
  return Batch(*map(jnp.asarray, out))


def mixed(seed: int = 0, B: int = 4, T: int = 32) -> Batch:
  """Rows of two samples each: video with branches beside text."""
  rng = np.random.default_rng(seed)
  return pack([[sample(rng, 2, (2, 4), 3, (2, 3)), sample(rng, 1, (4, 2), 4), sample(rng, 0, (2, 2), 5)]
               for _ in range(B)], T, 4, 8)


@functools.partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params, batch: Batch) -> keye.Output:
  """Compiled once for a config and a shape; op by op it would take longer."""
  return keye.apply(config, params, batch)
