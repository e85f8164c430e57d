"""How tokens travel to the devices that hold their experts, and back.

Each transport runs inside `shard_map`, on a device's own tokens and experts, and has one signature:
(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD) -> (y_ND, dropped_N), the weighted sum of each token's experts and
how many of its picks nobody computed. Expert ids count over all devices; an id beyond them is padding. The matrices may
both be `Adapted`.

| transport | what travels | holds | drops |
|---|---|---|---|
| `local`  | nothing: the expert axis is 1 | its picks | never |
| `ring`   | all tokens to all devices (all-gather, reduce-scatter) | the picks of all devices | never |
| `padded` | each pick to its device, cells of one size for each pair (all-to-all) | cells, full or not | beyond one |
| `ragged` | each pick to its device, no more (ragged all-to-all) | as many picks as `padded` | beyond their total |

`ring` is the one to begin with: it drops nothing, its traffic does not depend on the router, and with up to about as
many devices as a token has picks no other sends less. With more of them `ragged` sends least (TPUs from v4 on; on GPUs
it depends on NCCL), `padded` is its form for everything else. Of a device's tokens the later ones are dropped first.

N tokens of a device, K picks of a token, M = N K, D embed, E experts of a device, F ffn, X devices of the expert axis,
S slots that are sent, R rows that are received.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keye_jax.sharding import Adapted
from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import adapted_swiglu, routed_swiglu

AXIS = 'expert'
STEP = 8              # cells and buffers are a multiple of it


def local(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD):
  return swiglu(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD), jnp.zeros(len(x_ND))


def ring(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD):
  gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
  first = jax.lax.axis_index(AXIS) * count(down_EFD)
  y_ND = swiglu(gather(x_ND), gather(expert_NK) - first, gather(weight_NK), gate_up_EDF2, down_EFD,
                jax.lax.axis_size(AXIS))
  return jax.lax.psum_scatter(y_ND, AXIS, tiled=True), jnp.zeros(len(x_ND))


def swiglu(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD, devices: int = 1):
  """devices: how many share the picks."""
  run = adapted_swiglu if isinstance(down_EFD, Adapted) else routed_swiglu
  return run(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD, devices=devices)


def count(down_EFD) -> int:
  """Experts of this device."""
  return len(jax.tree.leaves(down_EFD)[0])


def padded(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD, *, capacity: float):
  """capacity: slots that a device has for each other one, over the picks that it would send there by chance."""
  X, M = jax.lax.axis_size(AXIS), expert_NK.size
  cell = up_to(M, capacity * M / X)
  order = by_device(expert_NK, count(down_EFD), X)
  fits_M = (order.device_M < X) & (order.place_M < cell)
  slot_M = jnp.where(fits_M, order.device_M * cell + order.place_M, -1)
  place_C = jnp.arange(cell)
  source_XC = order.pick_M[jnp.minimum(order.start_X[:, None] + place_C, M - 1)]
  source_S = jnp.where(place_C < order.count_X[:, None], source_XC, -1).reshape(-1)
  swap = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
  return travel(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD, source_S, slot_M, lambda a, empty: swap(a), swap)


def ragged(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD, *, capacity: float):
  """capacity: rows that a device takes from all others, over the mean. The first devices of the axis send first."""
  X, M, me = jax.lax.axis_size(AXIS), expert_NK.size, jax.lax.axis_index(AXIS)
  rows = up_to(X * M, capacity * M)
  order = by_device(expert_NK, count(down_EFD), X)
  start_XX, count_XX = (jax.lax.all_gather(a, AXIS) for a in (order.start_X, order.count_X))     # [from, to]
  before_XX = jnp.minimum(jnp.cumsum(count_XX, 0) - count_XX, rows)
  sent_XX = jnp.minimum(count_XX, rows - before_XX)
  device_M = jnp.minimum(order.device_M, X - 1)
  fits_M = (order.device_M < X) & (order.place_M < sent_XX[me, device_M])
  slot_M = jnp.where(fits_M, order.start_X[device_M] + order.place_M, -1)
  def there(a_S, empty):
    out_R = jnp.full((rows, *a_S.shape[1:]), empty, a_S.dtype)
    return ragged_exchange(a_S, out_R, order.start_X, sent_XX[me], before_XX[me], sent_XX[:, me], AXIS)

  def back(y_RD):
    out_SD = jnp.zeros((M, *y_RD.shape[1:]), y_RD.dtype)
    return ragged_exchange(y_RD, out_SD, before_XX[:, me], sent_XX[:, me], start_XX[:, me], sent_XX[me], AXIS)

  return travel(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD, order.pick_M, slot_M, there, back)


def travel(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD, source_S, slot_M, there, back):
  """source_S: the pick in each slot; slot_M: the slot of each pick; -1: none. there(a_S, value of rows that nobody
  fills) and back(y_RD) are the two ways."""
  (N, K), E = expert_NK.shape, count(down_EFD)
  first, nobody = jax.lax.axis_index(AXIS) * E, jax.lax.axis_size(AXIS) * E
  tokens = Slots(jnp.where(source_S < 0, -1, source_S // K), slot_M.reshape(N, K))
  picks = Slots(source_S, slot_M[:, None])
  expert_S = jnp.where(source_S < 0, nobody, expert_NK.reshape(-1)[source_S])
  expert_R = there(expert_S, nobody) - first
  weight_R1 = there(spread(weight_NK.reshape(-1, 1), picks), 0)
  y_RD = swiglu(there(spread(x_ND, tokens), 0), expert_R[:, None], weight_R1, gate_up_EDF2, down_EFD)
  real_NK = (expert_NK >= 0) & (expert_NK < nobody)
  dropped_N = (real_NK & (slot_M.reshape(N, K) < 0)).sum(1).astype(jnp.float32)
  return collect(back(y_RD), tokens), dropped_N


class Order(NamedTuple):
  pick_M: jax.Array         # picks by the device that holds their expert, in their own order there; padding comes last
  device_M: jax.Array       # of each pick; X: of none
  place_M: jax.Array        # of each pick among those of its device
  start_X: jax.Array        # where the picks of a device begin in pick_M
  count_X: jax.Array


def by_device(expert_NK, E: int, X: int) -> Order:
  expert_M = expert_NK.reshape(-1)
  device_M = jnp.where((expert_M >= 0) & (expert_M < X * E), expert_M // E, X)
  pick_M = jnp.argsort(device_M, stable=True).astype(jnp.int32)
  edge_X1 = jnp.searchsorted(device_M[pick_M], jnp.arange(X + 1)).astype(jnp.int32)
  at_M = jnp.zeros_like(pick_M).at[pick_M].set(jnp.arange(pick_M.size, dtype=jnp.int32), unique_indices=True)
  return Order(pick_M, device_M, at_M - edge_X1[device_M], edge_X1[:-1], jnp.diff(edge_X1))


def up_to(most: int, rows: float) -> int:
  return min(most, -int(-rows // STEP) * STEP)


class Slots(NamedTuple):
  """Rows and slots by each other: the row in a slot, the slots that a row is in; -1: none."""
  row_S: jax.Array
  slot_RK: jax.Array


def take(a, index):
  """Rows of `a`, zeros where the index is -1."""
  return jnp.where((index >= 0).reshape(-1, *(1,) * (a.ndim - 1)), a[jnp.maximum(index, 0)], 0)


@jax.custom_vjp
def spread(a_RD, slots: Slots):
  """Rows copied into their slots. Its gradient is read slot by slot, where that of indexing would be scattered."""
  return take(a_RD, slots.row_S)


@jax.custom_vjp
def collect(a_SD, slots: Slots):
  """Sum of each row's slots, in float32: the transpose of `spread`."""
  return sum(take(a_SD, slots.slot_RK[:, k]).astype(jnp.float32) for k in range(slots.slot_RK.shape[1])).astype(
      a_SD.dtype)


spread.defvjp(lambda a_RD, slots: (spread(a_RD, slots), slots), lambda slots, da_SD: (collect(da_SD, slots), None))
collect.defvjp(lambda a_SD, slots: (collect(a_SD, slots), slots), lambda slots, da_RD: (spread(da_RD, slots), None))


def ragged_exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name):
  """`jax.lax.ragged_all_to_all`, over one axis or several."""
  exchange = jax.lax.ragged_all_to_all if dispatch.platform() != 'cpu' else ragged_on_cpu
  return exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axis_name)


def ragged_on_cpu(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """`jax.lax.ragged_all_to_all` by an all-gather, since XLA has none for CPUs; there to check the rest of `ragged`."""
  del recv_sizes                      # what the others send
  me, gather = jax.lax.axis_index(axis_name), functools.partial(jax.lax.all_gather, axis_name=axis_name)
  from_X, size_X, to_X = (gather(a)[:, me] for a in (input_offsets, send_sizes, output_offsets))
  r_R1 = jnp.arange(len(output))[:, None]
  mine_RX = (r_R1 >= to_X) & (r_R1 < to_X + size_X)
  x_R = jnp.argmax(mine_RX, 1)
  row_R = jnp.clip(from_X[x_R] + r_R1[:, 0] - to_X[x_R], 0, len(operand) - 1)
  written_R = mine_RX.any(1).reshape(-1, *(1,) * (operand.ndim - 1))
  return jnp.where(written_R, gather(operand)[x_R, row_R], output)
