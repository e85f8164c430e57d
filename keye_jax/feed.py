"""From a process's rows on the host to one global batch on the devices.

A process reads the rows that its devices hold. Processes whose devices hold the same rows (they split the sequence, not
the batch) read the same ones.

Devices that split a sequence get it in zig-zag: cut into twice as many pieces, device i of n holds pieces i and
2n - 1 - i. A query sees what is before it, so with one piece each the last device would do nearly twice the mean, and
the others would wait. The model never asks where a token lies: `order` says what is before it.
"""
import jax
import numpy as np

from data_pipelines.errors import InputError
from data_pipelines.schema import BRANCH_BITS, Batch, PolicyBatch
from keye_jax import sharding
from keye_jax.config import RunConfig
from keye_jax.nn import counts


def share(layout: str, rows: int) -> tuple[int, int]:
  """(index, count): this process reads part `index` of `count` equal parts of a batch of `rows`.

  Raises InputError when the rows do not divide over the mesh or a process's devices hold rows that are not one part.
  """
  shards = sharding.extent(layout, 'batch')
  if rows % shards:
    raise InputError(f'train.batch = {rows} rows cannot be divided over {shards} groups of devices; use a multiple')
  if not sharding.has_mesh():
    return 0, 1
  where = _sharding(layout, ('batch',)).addressable_devices_indices_map((rows,))
  mine = sorted({i for (index,) in where.values() for i in range(rows)[index]})
  if rows % len(mine) or mine[0] % len(mine) or mine[-1] - mine[0] + 1 != len(mine):
    raise InputError(f'mesh: the devices of process {jax.process_index()} hold rows {mine} of {rows}, which is not one '
                     'equal part of the batch; let mesh.data x mesh.expert be a multiple of the processes')
  return mine[0] // len(mine), rows // len(mine)


def costs(config: RunConfig, batch: Batch) -> np.ndarray:
  """FLOPs of the language model for each row that a process read, float32 [B]."""
  T = batch.segment_BT.shape[1]
  lengths = lambda segment_T: np.bincount(segment_T >> BRANCH_BITS)[1:]
  return np.array([counts.row_flops(config.model, T, map(int, lengths(row))) for row in batch.segment_BT], np.float32)


def place(layout: str, batch: Batch | PolicyBatch, index: int, count: int) -> Batch | PolicyBatch:
  """`batch`, part `index` of `count`, as arrays of the whole batch, tokens in zig-zag; a copy to the default device
  without a mesh. Raises InputError when the tokens or vision rows of a row do not divide over the mesh."""
  if not sharding.has_mesh():
    return jax.device_put(batch)
  tokens = batch.batch if isinstance(batch, PolicyBatch) else batch
  T = tokens.token_BT.shape[1]
  check(layout, T, tokens.frame_BRN.shape[1])
  old_T = zigzag(T, sharding.extent(layout, 'seq'))

  def one(name: str, local: np.ndarray | Batch) -> jax.Array | Batch:
    if isinstance(local, Batch):
      return each(local)
    if '_BT' in name and old_T is not None:
      local = local[:, old_T]
    return place_rows(layout, sharding.batch_axes(name, local.ndim), local, index, count)

  def each(batch):
    return type(batch)(*(one(name, leaf) for name, leaf in zip(batch._fields, batch)))
  return each(batch)


def place_rows(layout: str, axes: tuple[str | None, ...], local: np.ndarray, index: int, count: int) -> jax.Array:
  """An array whose part `index` of `count` is `local`, by rows; a copy to the default device without a mesh."""
  if not sharding.has_mesh():
    return jax.device_put(local)
  first = index * len(local)

  def read(index):
    rows = index[0].indices(len(local) * count)
    return local[(slice(rows[0] - first, rows[1] - first), *index[1:])]
  return jax.make_array_from_callback((len(local) * count, *local.shape[1:]), _sharding(layout, axes), read)


def check(layout: str, T: int, R: int) -> None:
  """Raises InputError when the T tokens and R vision rows of a row do not divide over the devices that share it."""
  shards = sharding.extent(layout, 'seq')
  if shards > 1 and T % (2 * shards):
    raise InputError(f'data.tokens = {T} cannot be cut into two pieces for each of {shards} devices; use a multiple of '
                     f'{2 * shards}')
  if R % (shards := sharding.extent(layout, 'frames')):
    raise InputError(f'data.vision_rows = {R} cannot be divided over {shards} devices; use a multiple, with fewer '
                     'data.vision_patches each')


def zigzag(T: int, shards: int) -> np.ndarray | None:
  """The token that comes to each place of a row of T over so many devices; None: all stay."""
  if shards == 1:
    return None
  piece = np.arange(T).reshape(2 * shards, -1)
  return piece[[p for i in range(shards) for p in (i, 2 * shards - 1 - i)]].reshape(-1)


def tokens(local: Batch, placed: Batch) -> int | jax.Array:
  """Tokens of the whole batch that are not padding, int32."""
  if jax.process_count() == 1:
    return int(np.count_nonzero(local.segment_BT))
  return _nonzero(placed.segment_BT)


_nonzero = jax.jit(lambda x: (x != 0).sum())


def _sharding(layout: str, axes: tuple[str | None, ...]) -> jax.NamedSharding:
  return jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec(layout, *axes))
