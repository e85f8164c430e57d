"""The folder of a run: its resolved config, and one trainer at a time.

    RUN/config.json       the resolved config, every key
    RUN/checkpoints/      see checkpoint.py          RUN/metrics.jsonl, RUN/tensorboard/   see metrics.py
"""
import dataclasses
import fcntl
import json
import os
import pathlib
from typing import Any

import jax

from data_pipelines.errors import InputError
from keye_jax.config import RunConfig, freeze

CONFIG = 'config.json'
LOCK = '.lock'
# Keys that may change between the runs of one folder: how long, how often, on what mesh, and where the data lie. What
# is in the data is compared by its fingerprint.
FREE = ('train.steps', 'train.log_every', 'train.save_every', 'train.keep', 'train.max_bad_steps',
        'train.spike_factor', 'train.heldout', 'train.eval_every', 'train.patience', 'mesh.data', 'mesh.context',
        'mesh.expert', 'data.path', 'data.tokenizer', 'data.cache_mb', 'data.readers', 'data.workers',
        'data.max_wait_seconds')


def read_config(run: str | os.PathLike) -> RunConfig:
  """Raises InputError when the folder has no config.json or one that this version does not understand."""
  path = pathlib.Path(run) / CONFIG
  try:
    return freeze(RunConfig, json.loads(path.read_text()))
  except FileNotFoundError:
    raise InputError(f'{path}: no such file; {run} is not the folder of a run') from None
  except ValueError as e:
    raise InputError(f'{path}: {e}') from None


def write_config(run: str | os.PathLike, config: RunConfig) -> None:
  path = pathlib.Path(run) / CONFIG
  part = path.with_suffix('.part')
  part.write_text(json.dumps(dataclasses.asdict(config), indent=2) + '\n')
  part.replace(path)


def check_same(run: str | os.PathLike, config: RunConfig) -> list[str]:
  """Compares with the config that the run folder was trained with so far.

  Returns 'key: old -> new' for the keys that may differ and do. Raises InputError naming every other one.
  """
  changed = differences(read_config(run), config)
  free = lambda key: key in FREE or (key.startswith('data.sources.') and key.endswith('.path')) or (
      key == 'train.init' and config.lora.targets)        # where the base lies; what it is, its digest says
  if refused := {k: v for k, v in changed.items() if not free(k)}:
    text = '; '.join(f'{k} was {old!r}, now {new!r}' for k, (old, new) in refused.items())
    raise InputError(f'{run}: this run was started with another config: {text}. Use the same, or another --out')
  return [f'{k}: {old!r} -> {new!r}' for k, (old, new) in changed.items()]


def differences(old: Any, new: Any, path: str = '') -> dict[str, tuple[Any, Any]]:
  """{'train.steps': (old, new)} of two dataclasses of one type.

  A source of a mixture goes by its name, 'data.sources.NAME.weight'; one that is absent has weight 0.
  """
  found = {}
  for field in dataclasses.fields(old):
    a, b, name = getattr(old, field.name), getattr(new, field.name), f'{path}{field.name}'
    if dataclasses.is_dataclass(a):
      found |= differences(a, b, f'{name}.')
    elif isinstance(a, tuple) and any(map(dataclasses.is_dataclass, a + b)):
      olds, news = ({x.name: x for x in each} for each in (a, b))
      for key in sorted(olds.keys() | news):
        if key in olds and key in news:
          found |= differences(olds[key], news[key], f'{name}.{key}.')
        else:
          weight = lambda each, key=key: each[key].weight if key in each else 0.0
          found[f'{name}.{key}.weight'] = weight(olds), weight(news)
    elif a != b:
      found[name] = (a, b)
  return found


def lock(run: str | os.PathLike) -> Any:
  """Holds the folder until the returned file is closed or the process ends, however it ends.

  Raises InputError when another process trains in it. Of several processes of one run the first holds it.
  """
  path = pathlib.Path(run)
  path.mkdir(parents=True, exist_ok=True)
  file = open(path / LOCK, 'a')
  if jax.process_index():
    return file
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise InputError(f'{run}: another process is training in this folder; give another --out') from None
  except OSError:
    pass              # some network file systems have no locks
  return file
