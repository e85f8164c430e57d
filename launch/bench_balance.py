"""`keye bench balance`: how long data ranks wait for each other, with and without two-level balance.

A simulation, the same for the same seed: rows of the third stage (`launch/stage3_mix.py`) packed by a stream a rank,
frames and rows assigned by the functions that training uses (`keye_jax/balance.py`), work by the closed formulas of
`keye_jax/nn/counts.py` and `flops.py`. A rank is the group of devices that shares a row. Inside it the language model's
work counts as even. Weights are gathered layer by layer, so that devices wait for each other in the vision tower and
again in the language model of every micro-batch: a step is the sum, over its micro-batches, of the slowest tower and
the slowest language model. A backward pass with recomputation costs three times the forward, for both. Of attention the
selected keys alone count, of the indexer its scores; what its loss and masked tiles cost is left out.

Arms: none (each device sees the vision row that it holds, as today's packing fills it); rank (frames spread over the
devices of their own rank); vision (frames over all devices); rows (which micro-batch and rank a row of the step goes
to); both.
Twice: `work`, where a device does the work of the patches that are there, as a program with dynamic shapes would, and
`compiled`, where it also does the tower's linear work on every slot that is empty, as compiled programs of fixed shapes
do. A frame is never cut, so no tower is faster than its largest frame.

X ranks, B rows of a step, D devices, F frames of a device.
"""
import argparse
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import pretrain
from data_pipelines import packing
from data_pipelines.errors import InputError
from keye_jax import balance
from keye_jax.chips import CHIPS
from keye_jax.config import ModelConfig, RunConfig
from keye_jax.nn import counts, flops
from launch import results, stage3_mix
from launch.stage3_mix import Row

AIM = 0.15
CLAIM = (f'frames over all devices and rows of a step over micro-batches and ranks make a step of stage 3 at least '
         f'{AIM:.0%} faster, by closed cost formulas')
PASSES = 4                     # forward, its recomputation, and a backward pass of twice the forward
# Over whose devices frames are spread: nobody's, those of their 'rank' or 'all'; whether rows are placed.
ARMS = {'none': ('', False), 'rank': ('rank', False), 'vision': ('all', False), 'rows': ('', True),
        'both': ('all', True)}
FACTS = 4 * 17                 # bytes that travel with the patches of a unit: coordinates and a mark
ROW_FACTS = 4 * 5              # bytes that travel with a patch of a row: coordinates and frame
TOKEN = 4 * 9                  # bytes of a token of a row


class Setting(NamedTuple):
  """Where it would run: slice, devices and memory of `configs/layouts.py:stage3_v5p_4x4x8`."""
  ranks: int
  micro: int                   # micro-batches of a step
  devices: int = 16            # of a rank
  chip: str = 'v5p'
  efficiency: float = 0.5      # of the peak, in matrix products


def run(args: argparse.Namespace) -> int:
  """Simulates, prints and writes the evidence record; returns the exit code. `args`: see launch/bench.py."""
  if args.ranks < 2 or args.batches < 1:
    raise InputError('keye bench balance: --ranks must be at least 2 and --batches at least 1')
  out = record(simulate(pretrain.full('3'), Setting(args.ranks, 4), args.seed, args.batches), args)
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1) + '\n', encoding='utf-8')
  print(json.dumps(out) if args.json else table(out))
  return 0


@functools.partial(jax.jit, static_argnames='among')
def assigned(cost_DF, among: int):
  """Device that sees each frame [D, F], one of so many neighbours."""
  def group(cost_XF):
    loads_X, cuts_X = jax.vmap(functools.partial(balance.load, ranks=among))(cost_XF)
    return jax.vmap(balance.frames, (0, None, 0))(cuts_X, loads_X, jnp.arange(among))
  D, F = cost_DF.shape
  to_GXF = jax.vmap(group)(cost_DF.reshape(-1, among, F))
  return (to_GXF + among * jnp.arange(D // among)[:, None, None]).reshape(D, F)


class Tower(NamedTuple):
  """The vision tower in one micro-batch."""
  work_D: np.ndarray           # FLOPs of the frames that a device sees
  compiled_D: np.ndarray       # with those of empty slots
  fits: bool                   # whether frames travelled
  moved: int                   # units that the device with most of them sent or received


def tower(model: ModelConfig, rows: Sequence[Row], devices: int, slots: int, frames: str) -> Tower:
  """rows: one a rank, of so many devices with so many slots each; frames: see ARMS."""
  linear, square = flops.frame(model)
  size_DF = stage3_mix.by_device(rows, devices)
  D, fits, moved, held = len(size_DF), False, 0, slots
  own_DF = np.broadcast_to(np.arange(D)[:, None], size_DF.shape)
  total = lambda of_DF, device_DF: np.bincount(device_DF.ravel(), of_DF.ravel(), D)
  device_DF = own_DF
  if frames:
    cost_DF, most = size_DF * (1 + square / linear * size_DF), math.ceil(model.vision_balance * slots)
    to_DF = np.asarray(assigned(cost_DF.astype(np.float32), devices if frames == 'rank' else D))
    if fits := bool(total(size_DF, to_DF).max() <= most):
      away_DF = size_DF * (to_DF != own_DF)
      device_DF, held, moved = to_DF, most, int(max(away_DF.sum(1).max(), total(away_DF, to_DF).max()))
  squares_D, linear_D = square * total(size_DF.astype(float) ** 2, device_DF), linear * total(size_DF, device_DF)
  return Tower(linear_D + squares_D, linear * held + squares_D, fits, moved)


def simulate(config: RunConfig, setting: Setting, seed: int, batches: int) -> dict[str, Any]:
  """Seconds and idle shares of every arm, for `batches` steps. A vision row a device, as many patches in all as the
  config has."""
  model, data, (X, micro) = config.model, config.data, setting[:2]
  room = data.vision_rows * data.vision_patches // setting.devices
  slots = room // model.vision.merge ** 2
  data = dataclasses.replace(data, vision_rows=setting.devices, vision_patches=room,
                             image_tokens_max=min(data.image_tokens_max, slots))
  shape = packing.Shape(data.tokens, data.vision_rows, data.vision_patches)
  streams = [stage3_mix.rows(np.random.default_rng([seed, x]), data, shape) for x in range(X)]
  rate = CHIPS[setting.chip].flops * setting.efficiency / PASSES
  sums = {arm: {kind: np.zeros(4) for kind in ('work', 'compiled')} for arm in ARMS}
  seen = dict.fromkeys(('rows', 'skipped', 'samples', 'tokens', 'units', 'frames', 'largest', 'micro', 'fit', 'moved',
                        'rows_moved'), 0)
  for _ in range(batches):
    rows = [one(stream, seen) for stream in streams for _ in range(micro)]       # rank r has the r-th equal part
    note(seen, rows)
    cost_B = np.array([counts.row_flops(model, data.tokens, r.samples) for r in rows])
    row_B = np.asarray(balance.rows(cost_B, X, micro))
    away_XN = (row_B // micro != np.arange(len(cost_B)) // micro).reshape(X, -1)
    seen['rows_moved'] += int(away_XN.sum(1).max())            # as many leave a rank as come
    for arm, (frames, even) in ARMS.items():
      place_B = row_B if even else np.arange(len(cost_B))
      for i in range(micro):
        mine = place_B[i::micro]
        language_X = cost_B[mine] / rate / setting.devices
        found = tower(model, [rows[b] for b in mine], setting.devices, slots, frames)
        for kind, flops_D in (('work', found.work_D), ('compiled', found.compiled_D)):
          vision_D = flops_D / rate
          sums[arm][kind] += vision_D.max(), vision_D.mean(), language_X.max(), language_X.mean()
        if arm == 'both':
          seen = {k: n + {'micro': 1, 'fit': found.fits, 'moved': found.moved}.get(k, 0) for k, n in seen.items()}
  seconds = {arm: {kind: summary(s / batches) for kind, s in both.items()} for arm, both in sums.items()}
  return {'setting': setting._asdict() | {'seed': seed, 'room': model.vision_balance},
          'batches': batches, 'seen': seen, 'seconds': seconds,
          'exchange': traffic(model, setting, seen['moved'] / seen['micro']),
          'rows': row_traffic(model, setting, room, data.tokens, seen['rows_moved'] / batches)}


def one(stream: Iterator[Row | None], seen: dict[str, int]) -> Row:
  while (row := next(stream)) is None:
    seen['skipped'] += 1
  return row


def note(seen: dict[str, int], rows: Sequence[Row]) -> None:
  seen['rows'] += len(rows)
  seen['samples'] += sum(len(r.samples) for r in rows)
  seen['tokens'] += sum(sum(r.samples) for r in rows)
  seen['units'] += int(sum(r.frames.sum() for r in rows))
  seen['frames'] += sum(len(r.frames) for r in rows)
  seen['largest'] = max(seen['largest'], *(int(r.frames.max(initial=0)) for r in rows))


def summary(s: np.ndarray) -> dict[str, float]:
  """Seconds a step, and the share of them that a mean rank waits, in tower, language model and both."""
  vision, vision_mean, language, language_mean = map(float, s)
  return {'step_s': vision + language, 'vision_s': vision, 'language_s': language,
          'idle_vision': 1 - vision_mean / vision, 'idle_language': 1 - language_mean / language,
          'idle': 1 - (vision_mean + language_mean) / (vision + language)}


def traffic(model: ModelConfig, setting: Setting, units: float) -> dict[str, float]:
  """Of the device that sends or receives most units, in one micro-batch: bytes of patches there and of embeddings back,
  in forward, recomputation and backward, over both axes of the mesh one after the other; each is a ring with its
  dimension's bandwidth."""
  patches = units * (model.vision.merge ** 2 * model.vision.patch_dim + FACTS)
  embeddings = units * model.text.embed * counts.WIDTH[model.dtype]
  sent = sum((n - 1) / n for n in (setting.ranks, setting.devices)) * (2 * patches + 3 * embeddings)
  link = CHIPS[setting.chip].ici_bandwidth / CHIPS[setting.chip].dimensions
  return {'units': units, 'patch_bytes': patches, 'embedding_bytes': embeddings, 'sent_bytes': sent,
          'link_bytes_a_second': link, 'step_s': setting.micro * sent / link}


def row_traffic(model: ModelConfig, setting: Setting, patches: int, tokens: int, rows: float) -> dict[str, float]:
  """Of a device of the rank that gives and gets most rows, in one step: its part of each, padding with it, over the
  axis of the ranks. patches: of a row's slots on a device."""
  a_row = patches * (model.vision.patch_dim + ROW_FACTS) + tokens // setting.devices * TOKEN
  sent = rows * a_row * (setting.ranks - 1) / setting.ranks
  link = CHIPS[setting.chip].ici_bandwidth / CHIPS[setting.chip].dimensions
  return {'rows': rows, 'row_bytes': a_row, 'sent_bytes': sent, 'step_s': sent / link}


def gains(found: dict[str, Any]) -> dict[str, dict[str, float]]:
  """How much faster a step is than without balance, by arm and kind; what is sent is paid in full, not overlapped."""
  def one(arm: str, kind: str) -> float:
    frames, even = ARMS[arm]
    paid = (found['exchange']['step_s'] if frames else 0.0) + (found['rows']['step_s'] if even else 0.0)
    return found['seconds']['none'][kind]['step_s'] / (found['seconds'][arm][kind]['step_s'] + paid) - 1
  return {arm: {kind: one(arm, kind) for kind in ('work', 'compiled')} for arm in ARMS}


def record(found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
  """The evidence record; the claim is about both levels, by `work` and as compiled."""
  gain = gains(found)
  least = min(gain['both'].values())
  why = '' if least >= AIM else f'{least:.1%} faster, less than {AIM:.0%}'
  flat = lambda arm: {f'{name}, {kind}': value for kind, values in found['seconds'][arm].items()
                      for name, value in (values | {'gain': gain[arm][kind]}).items()}
  return {'claim': CLAIM, **results.made(), 'n': args.batches, 'baselines': {'none': flat('none')},
          'arms': {arm: {str(args.seed): flat(arm)} for arm in ARMS if arm != 'none'},
          'intervals': {}, 'verdict': 'not shown' if why else 'shown', 'why': why, 'simulated': found, 'gains': gain}


def table(out: dict[str, Any]) -> str:
  lines = [f'{"arm":<18}{"kind":<10}{"step s":>8}{"idle: vision":>14}{"language":>10}{"both":>7}{"faster":>8}']
  for arm, kinds in out['simulated']['seconds'].items():
    for kind, s in kinds.items():
      lines.append(f'{arm:<18}{kind:<10}{s["step_s"]:>8.2f}{s["idle_vision"]:>14.1%}{s["idle_language"]:>10.1%}'
                   f'{s["idle"]:>7.1%}{out["gains"][arm][kind]:>8.1%}')
  return '\n'.join([*lines, f'{out["verdict"]}: {out["why"] or out["claim"]}'])
