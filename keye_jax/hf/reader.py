"""Reads a folder of safetensors shards into our parameters, one parameter at a time.

All names and shapes are checked from the shard headers before any weight is read: nothing missing, nothing unused.
Weights are then copied block by block out of the memory-mapped shards, so the process holds the parameters it has
built and one tensor of a file, never a second copy of the model. Pickle files are never opened.
"""
import dataclasses
import glob
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # registers bfloat16 with numpy, which safetensors then returns
import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.errors import InputError
from keye_jax.config import DataConfig, ModelConfig
from keye_jax.hf import names, processor
from keye_jax.hf.config import from_hf, read_json

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
READABLE = ('F32', 'F16', 'BF16')

Index = tuple[slice, ...]
# (path, shape, dtype, fetch) -> what stands for the parameter in the returned tree. `fetch(index)` returns the block of
# the parameter that `index`, one slice an axis, names; so a sharded parameter is
# `jax.make_array_from_callback(shape, sharding, fetch)` and no process reads what it does not hold.
Place = Callable[[str, tuple[int, ...], np.dtype, Callable[[Index], np.ndarray]], Any]


@dataclasses.dataclass(frozen=True)
class Unread:
  """A parameter that stays in its folder: `x[layer]` or `x[layer, expert, :, :n]` reads that block and no more."""
  shape: tuple[int, ...]
  fetch: Callable[[Index], np.ndarray]

  def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> np.ndarray:
    index = index if isinstance(index, tuple) else (index,)
    stacked = sum(isinstance(i, int) for i in index)         # layer and expert come first
    slices = [slice(i, i + 1) if isinstance(i, int) else i for i in index]
    block = self.fetch((*slices, *[slice(None)] * (len(self.shape) - len(slices))))
    return block.reshape(block.shape[stacked:])


def leave(path: str, shape: tuple[int, ...], dtype: np.dtype, fetch: Callable[[Index], np.ndarray]) -> Unread:
  """A `Place` that reads nothing yet."""
  return Unread(shape, fetch)


class Source(NamedTuple):
  """Stored tensors by name, wherever they lie."""
  shapes: dict[str, tuple[int, ...]]
  read: Callable[[str, Index], np.ndarray]    # a block of a tensor
  where: str                                  # for messages


def open_folder(folder: str) -> Source:
  """The tensors of a Hugging Face folder. Reads headers only. Raises InputError naming the file at fault."""
  if not os.path.isdir(folder):
    raise InputError(f'{folder}: no such folder; give a folder with config.json and *.safetensors')
  shards = _shards(folder)
  handles, shapes, owner = {}, {}, {}
  for shard, promised in shards.items():
    path = os.path.join(folder, shard)
    try:
      handle = safe_open(path, framework='np')
      found = {name: handle.get_slice(name) for name in handle.keys()}
    except FileNotFoundError:
      raise InputError(f'{path}: the index names this shard but it is missing; download it into the folder') from None
    except (SafetensorError, OSError) as e:
      raise InputError(f'{path}: not a whole safetensors file ({e}); download or copy this shard again') from None
    if absent := sorted((promised or found.keys()) - found.keys()):
      raise InputError(f'{path}: the index promises {absent[0]!r} here{_more(absent)}, the shard does not hold it; '
                       'shards and index are of different exports')
    for name, view in found.items():
      if name in owner:
        raise InputError(f'{path}: {name!r} is also in {owner[name]}; remove the shard that does not belong')
      if view.get_dtype() not in READABLE:
        raise InputError(f'{path}: {name!r} is stored as {view.get_dtype()}; supported are {", ".join(READABLE)}, '
                         'so give an unquantised checkpoint')
      owner[name], shapes[name] = shard, tuple(view.get_shape())
    handles[shard] = handle

  def read(name: str, index: Index) -> np.ndarray:
    view = handles[owner[name]].get_slice(name)
    return view[index] if index else view[:]

  return Source(shapes, read, folder)


class Checkpoint(NamedTuple):
  """A folder as it was read. `data` carries the media limits of its preprocessor files, nothing else."""
  config: ModelConfig
  format: names.Format
  data: DataConfig
  params: dict[str, Any]


def load_folder(folder: str, dtype: str = 'float32', place: Place | None = None) -> Checkpoint:
  """Everything of a Hugging Face folder but its tokenizer.

  dtype: of the parameters, 'float32' or 'bfloat16'. place: see `Place`; None gives host numpy arrays.
  Raises InputError naming the file, key or tensor for anything that is missing, unused, of the wrong shape or broken.
  """
  source = open_folder(folder)
  cfg, fmt, data = read_config(folder)
  return Checkpoint(cfg, fmt, data, load(source, cfg, fmt, dtype, place))


def read_config(folder: str) -> tuple[ModelConfig, names.Format, DataConfig]:
  """What config.json and the preprocessor files say; no weights are touched."""
  path = os.path.join(folder, 'config.json')
  cfg, fmt = from_hf(read_json(path), path)
  if not cfg.vision.layers:
    return cfg, fmt, DataConfig()
  vision, data = processor.read(folder, cfg.vision)
  return dataclasses.replace(cfg, vision=vision), fmt, data


def load(source: Source, cfg: ModelConfig, fmt: names.Format, dtype: str = 'float32', place: Place | None = None
         ) -> dict[str, Any]:
  """Nested dict of parameters of `cfg` from stored tensors in format `fmt`."""
  tensors = names.table(cfg, fmt, names.expert_layout(cfg, fmt, source.shapes))
  check(tensors, source)
  return build(tensors, source, dtype, place)


def build(tensors: list[names.Tensor], source: Source, dtype: str = 'float32', place: Place | None = None
          ) -> dict[str, Any]:
  """Nested dict of the parameters that a checked table fills."""
  place = place or (lambda path, shape, dtype, fetch: fetch(tuple(slice(0, n) for n in shape)))
  rows = {t.name: t.shape[0] for t in tensors}
  out: dict[str, Any] = {}
  for path, leaf in names.leaves(tensors).items():
    def fetch(index: Index, leaf=leaf) -> np.ndarray:
      return _block(source, leaf, rows, index, DTYPES[dtype])

    *groups, last = path.split('/')
    tree = out
    for group in groups:
      tree = tree.setdefault(group, {})
    tree[last] = place(path, leaf.shape, DTYPES[dtype], fetch)
  return out


def check(tensors: list[names.Tensor], source: Source) -> None:
  """Every tensor of the table is there with its shape, and nothing else is. Raises InputError."""
  want = {t.name: t.shape for t in tensors}
  if missing := [n for n in want if n not in source.shapes]:
    raise InputError(f'{source.where}: {missing[0]!r} is missing{_more(missing)}; config.json and the weights '
                     'disagree, or a shard is absent')
  if wrong := [n for n, shape in want.items() if source.shapes[n] != shape]:
    n = wrong[0]
    raise InputError(f'{source.where}: {n!r} has shape {source.shapes[n]}, config.json implies {want[n]}{_more(wrong)}')
  unused = [n for n in source.shapes if n not in want and not any(i in n for i in names.IGNORED)]
  if unused == ['lm_head.weight']:      # tied, and written out all the same
    embed = source.read('model.embed_tokens.weight', ())
    if source.shapes[unused[0]] != embed.shape or not np.array_equal(source.read(unused[0], ()), embed):
      raise InputError(f"{source.where}: config.json ties the head to the embedding, but 'lm_head.weight' differs from "
                       'it; set tie_word_embeddings to false')
  elif unused:
    raise InputError(f'{source.where}: {unused[0]!r} belongs to no part of the model that config.json describes'
                     f'{_more(unused)}; nothing may be left unread')


def _shards(folder: str) -> dict[str, set[str]]:
  """File name -> names the index promises there (empty when there is no index)."""
  index = os.path.join(folder, 'model.safetensors.index.json')
  if os.path.exists(index):
    weight_map = read_json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise InputError(f'{index}: has no weight_map; download the file again')
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
      if os.path.basename(shard) != shard:
        raise InputError(f'{index}: shard {shard!r} points out of the folder')
      shards.setdefault(shard, set()).add(name)
    return dict(sorted(shards.items()))
  found = sorted(os.path.basename(p) for p in glob.glob(os.path.join(glob.escape(folder), '*.safetensors')))
  if len(found) == 1:
    return {found[0]: set()}
  if found:
    raise InputError(f'{index}: missing, with {len(found)} shards in the folder; download the index')
  if pickled := sorted(f for f in os.listdir(folder) if f.endswith(('.bin', '.pt', '.pth', '.pkl'))):
    raise InputError(f'{os.path.join(folder, pickled[0])}: pickled weights are never opened, they can run code; '
                     'convert them to safetensors')
  raise InputError(f'{folder}: no *.safetensors here; give a folder with config.json and weights')


def _block(source: Source, leaf: names.Leaf, rows: dict[str, int], index: Index, dtype: np.dtype) -> np.ndarray:
  """The block `index` of a parameter, gathered from the pieces that overlap it."""
  want = [s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)]
  out = _empty([stop - start for start, stop in want], dtype)
  for name, piece in leaf.parts:
    have = names.bounds(piece)
    both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(want, have)]
    if any(a >= b for a, b in both):
      continue
    inside = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, have))[len(have) - len(piece.shape):]
    target = out[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, want))]
    target[...] = _read(source, name, piece, rows[name], inside).reshape(target.shape)
  return out


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
  """64-byte aligned, so that `jax.device_put` on a CPU takes the array as it is, without a second copy of it."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start:start + size].view(dtype).reshape(shape)


def _read(source: Source, name: str, piece: names.Piece, rows: int, inside: Index) -> np.ndarray:
  """A block of a piece. Only matrices of one layer and projector are read whole; a fused expert tensor by its slice."""
  whole = piece.rows == (0, rows)
  if piece.rule == 'same' and whole and source.shapes[name] == piece.shape:
    return source.read(name, inside)
  if piece.rule == 'swap':
    return source.read(name, (*inside[:-2], inside[-1], inside[-2])).swapaxes(-1, -2)
  stored = source.read(name, () if whole else (slice(*piece.rows),))
  return names.to_ours(piece.rule, stored, piece.shape)[inside]


def _more(found: list[str]) -> str:
  return f' (and {len(found) - 1} more)' if len(found) > 1 else ''
