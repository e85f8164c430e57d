"""Frames of a batch spread evenly over all devices, there and back, around the vision tower.

Rows hold very different numbers of pictures, and a device would see those of its own. Here one all-to-all of uint8
patches over all axes that shard vision rows brings every frame whole to the device that `keye_jax/balance.py` gives it,
the tower sees one row of so many slots on each, and the inverse exchange brings the embeddings back to where the
language model expects them. Its gradient is the inverse again. Hosts exchange nothing.

Shapes are fixed: the tower has `ModelConfig.vision_balance` of the slots that the device's own vision rows would need.
When a device would get more than that, every frame of the batch stays at home. Nothing is dropped. The exchange is
ragged (TPUs from v4 on; on GPUs it depends on NCCL), so that pairs of devices may exchange as much as they like.

A unit is the patches of one language token, merge x merge of them, neighbours in a frame. B batch rows, R vision rows,
N patches of a vision row, C values of a patch, D embed; of a device: M units at home, F = M the most frames, S slots,
A bytes of a unit; X devices.
"""
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keye_jax import balance, sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import flops
from keye_jax.nn.transport import Slots, ragged_exchange, spread

AT_HOME = ('batch', 'frames', None)


class Stayed(NamedTuple):
  """Units of the whole batch, float32."""
  stayed: jax.Array          # for lack of room
  all: jax.Array


def balanced(config: ModelConfig, tower: Callable, patch_BRNC, coord_BRN4, frame_BRN) -> tuple[jax.Array, Stayed]:
  """(tower(patch, coord, frame) -> [B, units of a row, D], computed where `balance` says; what stayed at home).

  D values of a unit depend on its frame alone, and a unit of padding may get any. Needs a mesh.
  """
  unit = config.vision.merge ** 2
  M = math.prod(frame_BRN.shape) // unit // math.prod(sharding.extent(config.layout, a) for a in AT_HOME[:2])
  slots = math.ceil(config.vision_balance * M)
  plan = functools.partial(route, config, slots)
  to_BRM, fits, stayed = sharding.local(plan, config.layout, (AT_HOME,), (AT_HOME, (), Stayed((), ())))(frame_BRN)

  def everywhere(patch_BRNC, coord_BRN4, frame_BRN):
    there, back = functools.partial(go, config, slots), functools.partial(come, config)
    wide = (*AT_HOME, None)
    moved = sharding.local(there, config.layout, (wide, wide, AT_HOME, AT_HOME), (wide, wide, AT_HOME))(
        patch_BRNC, coord_BRN4, frame_BRN, to_BRM)
    return sharding.local(back, config.layout, (AT_HOME, AT_HOME), AT_HOME)(tower(*moved), to_BRM)

  seen_BMD = jax.lax.cond(fits, everywhere, tower, patch_BRNC, coord_BRN4, frame_BRN)
  return seen_BMD, stayed


def names(config: ModelConfig) -> tuple[str, ...]:
  """Mesh axes that shard vision rows."""
  return sharding.names(config.layout, *AT_HOME[:2])


def route(config: ModelConfig, slots: int, frame_BRN):
  """(device that sees each unit, X: padding [B, R, units of a row]; whether all have slots enough; `Stayed`)."""
  axes = names(config)
  X, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  mark_M = marks(frame_BRN, config.vision.merge ** 2)
  frame_M = jnp.cumsum(mark_M == 2) - 1
  begin_F = jnp.searchsorted(frame_M, jnp.arange(len(mark_M)))             # M: there is no such frame
  before_M1 = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(mark_M > 0, dtype=jnp.int32)])
  size_F = jnp.diff(before_M1[jnp.append(begin_F, len(mark_M))])
  linear, square = flops.frame(config)
  mine, cut = balance.load(size_F * (1 + square / linear * size_F), X)
  to_F = balance.frames(cut, jax.tree.map(functools.partial(jax.lax.all_gather, axis_name=axes), mine), me)
  to_M = jnp.where(mark_M > 0, to_F[frame_M], X)
  count_XX = sorted_by_device(to_M, axes).count_XX
  fits, units = count_XX.sum(0).max() <= slots, count_XX.sum().astype(jnp.float32)
  return to_M.reshape(*frame_BRN.shape[:2], -1), fits, Stayed(jnp.where(fits, 0, units), units)


def marks(frame_BRN, unit: int) -> jax.Array:
  """2 for the first unit of a frame, 1 for its others, 0 for padding: [M]."""
  frame_RM = frame_BRN[..., ::unit].reshape(-1, frame_BRN.shape[-1] // unit)
  before_RM = jnp.concatenate([jnp.zeros_like(frame_RM[:, :1]), frame_RM[:, :-1]], 1)
  return ((frame_RM > 0).astype(jnp.int32) + ((frame_RM > 0) & (frame_RM != before_RM))).reshape(-1)


class Sorted(NamedTuple):
  unit_M: jax.Array          # units by the device that sees them, in their own order there; padding comes last
  count_XX: jax.Array        # units that each device sends to each: [from, to]


def sorted_by_device(to_M, axes) -> Sorted:
  unit_M = jnp.argsort(to_M, stable=True).astype(jnp.int32)
  edge_X1 = jnp.searchsorted(to_M[unit_M], jnp.arange(jax.lax.axis_size(axes) + 1)).astype(jnp.int32)
  return Sorted(unit_M, jax.lax.all_gather(jnp.diff(edge_X1), axes))


def start(count_XX, axis: int) -> jax.Array:
  return jnp.cumsum(count_XX, axis) - count_XX


def go(config: ModelConfig, slots: int, patch_BRNC, coord_BRN4, frame_BRN, to_BRM):
  """Patches, coordinates and frames of one row of slots: [1, 1, patches, ...] each."""
  unit, axes = config.vision.merge ** 2, names(config)
  mark_M, me = marks(frame_BRN, unit), jax.lax.axis_index(axes)
  order, M = sorted_by_device(to_BRM.reshape(-1), axes), len(mark_M)
  facts_MJ = jnp.concatenate([coord_BRN4.reshape(M, -1), mark_M[:, None]], 1)
  facts_MA = jax.lax.bitcast_convert_type(facts_MJ, jnp.uint8).reshape(M, -1)
  bytes_MA = jnp.concatenate([patch_BRNC.reshape(M, -1), facts_MA], 1)
  from_XX, at_XX = start(order.count_XX, 1), start(order.count_XX, 0)
  bytes_SA = ragged_exchange(bytes_MA[order.unit_M], jnp.zeros((slots, bytes_MA.shape[1]), jnp.uint8), from_XX[me],
                             order.count_XX[me], at_XX[me], order.count_XX[:, me], axes)
  patch_SC, facts_SA = jnp.split(bytes_SA, [unit * patch_BRNC.shape[-1]], 1)
  facts_SJ = jax.lax.bitcast_convert_type(facts_SA.reshape(slots, -1, 4), jnp.int32)
  frame_S = jnp.where(facts_SJ[:, -1] > 0, jnp.cumsum(facts_SJ[:, -1] == 2), 0).astype(jnp.int32)
  row = lambda a, width: a.reshape(1, 1, slots * unit, width)
  return (row(patch_SC, patch_BRNC.shape[-1]), row(facts_SJ[:, :-1], coord_BRN4.shape[-1]),
          jnp.repeat(frame_S, unit).reshape(1, 1, -1))


def come(config: ModelConfig, seen_BSD, to_BRM):
  """The tower's results of the slots [1, S, D], back at home: [B, units of a row, D]."""
  axes, to_M = names(config), to_BRM.reshape(-1)
  order, me = sorted_by_device(to_M, axes), jax.lax.axis_index(axes)
  from_XX, at_XX = start(order.count_XX, 1), start(order.count_XX, 0)
  seen_SD = seen_BSD[0]
  seen_MD = ragged_exchange(seen_SD, jnp.zeros((len(to_M), seen_SD.shape[1]), seen_SD.dtype), at_XX[:, me],
                            order.count_XX[:, me], from_XX[:, me], order.count_XX[me], axes)
  at_M = jnp.zeros_like(order.unit_M).at[order.unit_M].set(jnp.arange(len(to_M), dtype=jnp.int32), unique_indices=True)
  return spread(seen_MD, Slots(at_M, order.unit_M[:, None])).reshape(to_BRM.shape[0], -1, seen_MD.shape[1])
