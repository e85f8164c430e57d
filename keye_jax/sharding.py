"""The mesh, and the one table that says which logical axis lives on which mesh axis.

`jax.jit` under `jax.set_mesh` with explicit axis types is what used to be called pjit: a value's sharding is part of
its type, and a contraction that leaves it open must say where its result goes. Nothing else in the project writes the
names of mesh axes, apart from the collectives of `nn/transport.py`.

Without a mesh every helper here is the identity, and the same model runs as a plain single-device program.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from keye_jax.config import MeshConfig

AXES = ('data', 'context', 'expert')

# Weights, gradients and optimizer state are sharded on their embed axis over data and context together, experts also
# over expert, and gathered layer by layer where they are used. Measured ahead of time for 48 layers at 256K tokens on
# v6e:16x16: over data alone the temporaries need 84 GB a device, over both axes 10.5 GB.
#
# The vision tower has a sharding of its own: devices that share the tokens of a row also share its vision rows, which
# are independent of each other, and the language model gathers what they saw before it cuts the sequence.
LAYOUTS = {
    'train': {'batch': ('data', 'expert'), 'seq': 'context', 'frames': 'context', 'embed': ('data', 'context'),
              'experts': 'expert'},
    'decode': {'batch': ('data', 'expert'), 'seq': None, 'frames': None, 'embed': None, 'experts': 'expert'},
}


def has_mesh() -> bool:
  return not jax.sharding.get_abstract_mesh().empty


def use_mesh(mesh: MeshConfig, devices: list | None = None) -> None:
  """Sets the mesh for the process; the only place that does. devices: default those of jax, else of a topology that
  is compiled for. Raises ValueError when they do not fill the mesh."""
  shape = (mesh.data, mesh.context, mesh.expert)
  devices = jax.devices() if devices is None else devices
  need, have = mesh.data * mesh.context * mesh.expert, len(devices)
  if need > have:
    raise ValueError(f'mesh data x context x expert = {shape} needs {need} devices, there are {have}')
  # an axis gets dimensions of the torus of its own where the shape allows it; v6e:16x16 has no 8 without a split
  placed = mesh_utils.create_device_mesh(shape, devices[:need], allow_split_physical_axes=True)
  jax.set_mesh(jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 3))


def names(layout: str, *axes: str) -> tuple[str, ...]:
  """Mesh axes of these logical axes."""
  at = (LAYOUTS[layout][axis] or () for axis in axes)
  return tuple(name for n in at for name in ((n,) if isinstance(n, str) else n))


def extent(layout: str, axis: str) -> int:
  """How many shards a logical axis is cut into; 1 without a mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(name, 1) for name in names(layout, axis))


def spec(layout: str, *axes: str | None) -> P:
  """PartitionSpec of an array whose dimensions carry these logical axes (None: not sharded)."""
  return P(*(LAYOUTS[layout][a] if a else None for a in axes))


def constrain(x: jax.Array, layout: str, *axes: str | None) -> jax.Array:
  """`x` resharded to its logical axes."""
  return jax.sharding.reshard(x, spec(layout, *axes)) if has_mesh() else x


def constrain_batch(batch, layout: str):
  """A `Batch`, each array resharded to `batch_axes`."""
  return type(batch)(*(constrain(x, layout, *batch_axes(name, x.ndim)) for name, x in zip(batch._fields, batch)))


def batch_axes(name: str, ndim: int) -> tuple[str | None, ...]:
  """Logical axes of an array of a `Batch` or `PolicyBatch`, from its name: tokens `_BT...`, vision rows `_BRN...`, or
  neither."""
  second = name.rpartition('_')[2][1]
  return ('batch', {'T': 'seq', 'R': 'frames'}.get(second)) + (None,) * (ndim - 2)


def like(x: jax.Array, other: jax.Array) -> jax.Array:
  """`x` resharded as `other` of the same rank is."""
  return jax.sharding.reshard(x, jax.typeof(other).sharding.spec) if has_mesh() else x


def append(old: jax.Array, new: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
  """`old` with `new` written from `slot` on along `axis`, an axis that is not sharded in `old`."""
  return jax.lax.dynamic_update_slice_in_dim(old, like(new.astype(old.dtype), old), slot, axis)


def take(x: jax.Array, index_BQ: jax.Array, layout: str) -> jax.Array:
  """Entries of [B, T, ...] at these places of their rows: [B, Q, ...]. Each device reads its own rows, whole."""
  axes = ('batch',) + (None,) * (x.ndim - 1)
  read = local(jax.vmap(lambda row, i: row[i]), layout, (axes, axes[:2]), axes)
  return read(constrain(x, layout, *axes), index_BQ)


def out(layout: str, *axes: str | None) -> P | None:
  """The `out_sharding=` of an einsum."""
  return spec(layout, *axes) if has_mesh() else None


def local(fn: Callable, layout: str, in_axes: tuple, out_axes) -> Callable:
  """`fn` on each device's own shards. `in_axes`, `out_axes`: tuples of logical axes, one for each array.

  Wrapped at the call, never stored: jax binds a shard_map to the first mesh it meets.
  """
  if not has_mesh():
    return fn
  to_spec = lambda axes: spec(layout, *axes)
  is_axes = lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)
  return jax.shard_map(fn, in_specs=tuple(jax.tree.map(to_spec, in_axes, is_leaf=is_axes)),
                       out_specs=jax.tree.map(to_spec, out_axes, is_leaf=is_axes), check_vma=False)


class Adapted(NamedTuple):
  """A weight with a low-rank pair beside it (`nn/lora.py`): what is meant is w + a b, and nobody forms that sum. With a
  scale (`nn/int8.py`) w is int8 and w * scale is meant by it; then there may be no pair.

  Leading axes of experts are common to all; then w is [in..., out...], a [in..., rank], b [rank, out...], scale
  [out...].
  """
  w: jax.Array
  a: jax.Array | None
  b: jax.Array | None
  scale: jax.Array | None = None


ADAPTER = '_lora'             # ends the name of the pair beside a weight: 'q_lora' holds {'a', 'b'} of 'q'
SCALE = '_int8_scale'         # ends the name of the scales beside a weight in 8 bits


def param(module, name: str, init: Callable, shape: tuple[int, ...], axes: tuple, config) -> jax.Array | Adapted:
  """Declares a parameter that is born sharded; returns it gathered (experts stay apart) in the compute dtype, or in 8
  bits where the parameters hold scales for it, with its adapter where they hold one."""
  value = module.param(name, lambda key: constrain(init(key, shape, config.param_dtype), config.layout, *axes))
  pair, scale = (module.get_variable('params', name + end) for end in (ADAPTER, SCALE))
  if pair is None and scale is None:
    return gather(value, axes, config)
  stack, a, b = int(axes[0] == 'experts'), None, None
  if pair is not None:
    inner = pair['a'].ndim - 1
    a = gather(pair['a'], axes[:inner] + (None,), config)
    b = gather(pair['b'], axes[:stack] + (None,) + axes[inner:], config)
  if scale is None:
    return Adapted(gather(value, axes, config), a, b)
  return Adapted(gather(value, axes, config, 'int8'), a, b,
                 gather(scale, axes[:stack] + axes[stack + value.ndim - scale.ndim:], config, 'float32'))


def gather(value: jax.Array, axes: tuple, config, dtype: str = '') -> jax.Array:
  """A stored weight as a layer uses it: cast first, so that half the bytes travel, then gathered over embed. dtype:
  default that of computation."""
  kept = tuple(a if a == 'experts' else None for a in axes)
  return constrain(value.astype(dtype or config.dtype), config.layout, *kept)
