"""Checkpoints of a run: Orbax v1 writes the arrays, a digest file per process makes the result whole.

    RUN/checkpoints/STEP/state/...         arrays in their shards, written by Orbax and renamed into place
    RUN/checkpoints/STEP/host_0.json       what process 0 keeps outside arrays: data position, config, ...
    RUN/checkpoints/STEP/digest_0.json     xxh3 of every file that process 0 wrote; comes last

A checkpoint without all its digests, or with a file that differs from its digest, is not whole. Orbax alone restores
flipped bits without a word, so restoring verifies first and falls back to the checkpoint before.
"""
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from data_pipelines.errors import InputError

FOLDER = 'checkpoints'
CUT_OFF = '.orbax-checkpoint-tmp'      # in the name of what Orbax has not committed
DAMAGED = '.damaged'                   # in the name of what we set aside
_CHUNK = 1 << 24                       # bytes read at a time


class Restored(NamedTuple):
  step: int
  state: Any
  hosts: list[dict[str, Any]]      # what each process gave to `save`, by its index then


class Params(NamedTuple):
  step: int
  params: dict[str, Any]     # nested dict
  host: dict[str, Any]       # what process 0 gave to `save`


class Checkpoints:
  """The checkpoints of one run folder. One save is under way at a time, in a thread.

  keep: number of whole checkpoints kept; with several processes one more may stay until the next save, because the
  newest is not whole before the last of them has written its digest. report: receives a line whenever something is not
  as it should be.
  """

  def __init__(self, run: str | os.PathLike, keep: int, report: Callable[[str], None]):
    self.folder, self.keep, self.report = pathlib.Path(run).absolute() / FOLDER, keep, report
    self._thread, self._error, self._step = None, None, None

  def save(self, step: int, state: Any, host: dict[str, Any]) -> None:
    """Copies `state` off the devices, then writes in the background.

    host: this process's JSON values. Raises InputError when this save cannot start or the one before failed.
    """
    self.wait()
    self._step, path = step, self.folder / str(step)
    try:
      if jax.process_index() == 0:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)       # not whole, or the run would have resumed from it
      response = ocp.save_async(path, state, checkpointable_name='state')
    except Exception as e:
      raise self._failure(e) from e
    self._thread = threading.Thread(target=self._finish, args=(response, path, json.dumps(host)), name='checkpoint')
    self._thread.start()

  def _finish(self, response, path: pathlib.Path, host: str) -> None:
    try:
      response.result()                               # all processes have written and process 0 has renamed
      (path / f'host_{jax.process_index()}.json').write_text(host)
      _write_digests(path)
      if jax.process_index() == 0:
        for old in whole(self.folder)[:-self.keep]:
          shutil.rmtree(self.folder / str(old))
    except Exception as e:                            # raised where the training runs, by `check` or `wait`
      self._error = e

  def check(self) -> None:
    """Raises InputError if the last save failed. Does not wait for one under way."""
    if self._error is not None:
      error, self._error = self._error, None
      raise self._failure(error) from error

  def wait(self) -> None:
    """Waits for the save under way. Raises InputError if it failed."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    self.check()

  def _failure(self, error: Exception) -> InputError:
    """A failed save in one line; removes what it left, so that its space is free again."""
    kept = whole(self.folder)
    gone = 0
    for _ in range(50):            # other threads of the save may still be writing, and make their folders again
      left = [p for p in self.folder.glob(f'{self._step}*')
              if p.name.startswith(f'{self._step}{CUT_OFF}') or (p.name == str(self._step) and self._step not in kept)]
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      gone = 0 if left else gone + 1
      if gone == 5:
        break
      time.sleep(0.1)
    text = ' '.join(str(error).split())
    known = re.search('No space left on device|Disk quota exceeded|File too large|Read-only file system'
                      '|Permission denied', text)
    last = f'step {kept[-1]} is the last whole one' if kept else 'there is no earlier one'
    return InputError(f'{self.folder / str(self._step)}: the checkpoint could not be saved: '
                      f'{known.group(0) if known else text}; {last}. Make room and run the same command again')

  def exist(self) -> bool:
    """Whether there is a checkpoint to go on from, whole or damaged."""
    return bool(_agreed(whole(self.folder)))

  def tidy(self) -> None:
    """Removes saves that were cut off. Only a process that trains in the run folder may call this."""
    if jax.process_index() == 0 and self.folder.is_dir():
      complete = whole(self.folder)
      for path in sorted(self.folder.iterdir()):
        if CUT_OFF in path.name or (path.name.isdigit() and int(path.name) not in complete):
          self.report(f'{path}: this save was cut off; removed')
          shutil.rmtree(path)

  def restore(self, like: Any) -> Restored | None:
    """The newest whole checkpoint, in the structure, dtypes and shardings of `like`; None when there is none.

    like: tree of arrays or ShapeDtypeStructs. Damaged checkpoints are reported, skipped and renamed. Any number of
    processes may have saved it. Raises InputError when only damaged ones are left and when keys or shapes do not fit.
    """
    found = _newest(self.folder, self.report)
    if found is None:
      return None
    path, damaged = found
    wanted = _shapes(like)
    _check_fit(path, _stored_shapes(path), wanted)
    state = ocp.load(path, _concrete(like), checkpointable_name='state')
    hosts = [json.loads((path / f'host_{i}.json').read_text()) for i in range(_digest(path, 0)['processes'])]
    if jax.process_index() == 0:
      for bad in damaged:
        bad.rename(bad.with_name(f'{bad.name}{DAMAGED}-{os.getpid()}'))
    return Restored(int(path.name), state, hosts)


def load_params(run: str | os.PathLike, like: Any, report: Callable[[str], None]) -> Params:
  """Parameters of a run folder's newest whole checkpoint, trained and frozen merged, without the optimizer.

  like: nested dict of ShapeDtypeStructs (dtype and sharding to load in). report: told of damaged checkpoints.
  Raises InputError when there is no whole checkpoint and when keys or shapes do not fit `like`.
  """
  found = _newest(pathlib.Path(run).absolute() / FOLDER, report)
  if found is None:
    raise InputError(f'{run}: there is no whole checkpoint in this run folder')
  path, _ = found
  shapes, parts = {}, {}
  for stored, shape in _stored_shapes(path).items():
    part, _, name = stored.partition('/')
    if part in ('train', 'frozen'):
      shapes[name], parts[name] = shape, part
  _check_fit(path, shapes, _shapes(like))
  tree = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(_concrete(like))[0]:
    _put(tree, (parts[_name(keys)], *_name(keys).split('/')), leaf)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  with context:
    loaded = ocp.load(path, tree, checkpointable_name='state')
  params = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(loaded)[0]:
    _put(params, _name(keys).split('/')[1:], leaf)
  return Params(int(path.name), params, json.loads((path / 'host_0.json').read_text()))


def digest(run: str | os.PathLike) -> str:
  """One digest of everything in a run folder's newest whole checkpoint, whose files are read. Raises InputError when
  there is none."""
  found = _newest(pathlib.Path(run).absolute() / FOLDER, lambda line: None)
  if found is None:
    raise InputError(f'{run}: there is no whole checkpoint in this run folder')
  path, _ = found
  files = [_digest(path, i)['files'] for i in range(_digest(path, 0)['processes'])]
  return xxhash.xxh3_128(json.dumps([int(path.name), files], sort_keys=True).encode()).hexdigest()


def is_run(folder: str | os.PathLike) -> bool:
  """Whether this is a run folder that has been saved in (and not, say, a Hugging Face folder)."""
  return (pathlib.Path(folder) / FOLDER).is_dir()


def whole(folder: pathlib.Path) -> list[int]:
  """Steps whose checkpoint has all its digests, ascending. Their contents are not read."""
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and _complete(p))


def damage(path: pathlib.Path) -> str | None:
  """What is wrong with a checkpoint that has all its digests; None when every file is as it was written.

  Reads this process's share of the files, and agrees with the other processes.
  """
  first = _digest(path, 0)
  if first is None:
    return 'digest_0.json cannot be read'

  def wrong(item):
    name, expected = item
    try:
      return None if hash_file(path / name) == expected else f'{name} differs from its digest'
    except OSError as e:
      return f'{name}: {e.strerror}'

  why = None
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for i in range(jax.process_index(), first['processes'], jax.process_count()):
      digest = _digest(path, i)
      found = pool.map(wrong, sorted(digest['files'].items())) if digest else [f'digest_{i}.json cannot be read']
      why = why or next((w for w in found if w), None)
  if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(why is not None)).any():
    why = why or 'another process found a file that differs from its digest'
  return why


def _newest(folder: pathlib.Path, report) -> tuple[pathlib.Path, list[pathlib.Path]] | None:
  """(newest whole checkpoint, the damaged ones after it); None when there is no checkpoint at all."""
  damaged = []
  for step in reversed(_agreed(whole(folder))):
    path = folder / str(step)
    why = damage(path)
    if not why:
      return path, damaged
    damaged.append(path)
    report(f'{path}: damaged checkpoint ({why}); trying the one before')
  if damaged:
    raise InputError(f'{damaged[0]}: damaged, and there is no other whole checkpoint; restore a copy of it, or move '
                     f'{folder} away to start again')
  return None


def _agreed(steps: list[int]) -> list[int]:
  """The steps that process 0 sees: on a network file system others may see them later, or still see removed ones."""
  if jax.process_count() == 1:
    return steps
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
  return multihost_utils.broadcast_one_to_all(np.resize(np.array(steps or [0], np.int32), count)).tolist()


def _write_digests(path: pathlib.Path) -> None:
  me, files = jax.process_index(), {}
  for file in sorted(p for p in path.rglob('*') if p.is_file()):
    name = file.relative_to(path).as_posix()
    writer = re.search(r'(?:process_|^host_)(\d+)', name)
    if int(writer.group(1) if writer else 0) == me and not name.startswith('digest_'):
      files[name] = hash_file(file)
  final = path / f'digest_{me}.json'
  part = final.with_suffix('.part')
  with open(part, 'w') as f:
    json.dump({'processes': jax.process_count(), 'files': files}, f)
    f.flush()
    os.fsync(f.fileno())
  part.rename(final)


def _digest(path: pathlib.Path, process: int) -> dict | None:
  try:
    value = json.loads((path / f'digest_{process}.json').read_text())
    return value if value['processes'] and isinstance(value['files'], dict) else None
  except (OSError, ValueError, TypeError, KeyError):
    return None


def _complete(path: pathlib.Path) -> bool:
  """Whether every process's digest is there. One that cannot be read is damage, not a save that was cut off."""
  first = _digest(path, 0)
  if first is None:
    return (path / 'digest_0.json').exists()
  return all((path / f'digest_{i}.json').exists() for i in range(first['processes']))


def hash_file(file: pathlib.Path) -> str:
  """xxh3 of a file's bytes."""
  digest = xxhash.xxh3_128()
  with open(file, 'rb') as f:
    while chunk := f.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def _name(path) -> str:
  """'opt/0/mu/embed': how Orbax names what attributes, dict keys and positions lead to."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def _put(tree: dict, path, leaf) -> None:
  *above, last = path
  for name in above:
    tree = tree.setdefault(name, {})
  tree[last] = leaf


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  # A typed key is stored as the words it is made of.
  shape = lambda x: (jax.eval_shape(jax.random.key_data, x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
                     else x).shape
  return {_name(path): tuple(shape(leaf)) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _stored_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  tree = ocp.metadata(path, checkpointable_name='state').metadata
  return {_name(keys): tuple(leaf.shape) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check_fit(path: pathlib.Path, stored: dict, wanted: dict) -> None:
  faults = [f'{n} has shape {stored[n]} there and {wanted[n]} in this model' for n in sorted(stored.keys() & wanted)
            if stored[n] != wanted[n]]
  faults += [f'{n} is missing there' for n in sorted(wanted.keys() - stored)]
  faults += [f'{n} is there but not in this model' for n in sorted(stored.keys() - wanted)]
  if faults:
    more = f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''
    raise InputError(f'{path}: this checkpoint does not fit: {faults[0]}{more}')


def _concrete(tree: Any) -> Any:
  """ShapeDtypeStructs whose shardings name real devices. A leaf without one is on every device of the mesh, if any:
  on the first device alone, the other processes of a run could not hold it."""
  mesh = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()
  anywhere = jax.NamedSharding(mesh, jax.P()) if mesh else jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def one(x):
    where = x.sharding
    if isinstance(where, jax.NamedSharding) and isinstance(where.mesh, jax.sharding.AbstractMesh):
      where = jax.NamedSharding(mesh, where.spec) if mesh else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=anywhere if where is None else where)
  return jax.tree.map(one, tree)
