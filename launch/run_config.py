"""`--config FILE[:VARIANT] --config.a.b=value` -> a frozen RunConfig, or one line that says which key is wrong."""
import difflib
import importlib.util
import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import config_dict, config_flags

import configs
from data_pipelines.errors import InputError
from keye_jax.config import RunConfig, check, freeze

HELP = 'FILE or FILE:VARIANT, e.g. configs/sft.py:tiny; override keys with --config.optimizer.learning_rate=1e-4'


def load(config: str, overrides: Sequence[str] = ()) -> RunConfig:
  """The run that a config file describes.

  config: 'FILE' or 'FILE:VARIANT'; a file that is not there is also looked for beside the installed packages.
  overrides: '--config.a.b=value' or '--config.a.b', 'value'. Raises InputError naming the file or the key.
  """
  file, _, variant = config.partition(':')
  values = _get_config(_find(file), variant)
  _check_keys(values, overrides)
  argv = ['keye', *overrides]
  own = flags.FlagValues()                # a program that embeds this keeps its own flags
  try:
    parsed = config_flags.DEFINE_config_dict('config', values, flag_values=own, sys_argv=argv)
    rest = own(argv)[1:]
  except flags.Error as e:
    raise InputError(str(e).splitlines()[0].removeprefix('flag ')) from None
  if rest:
    raise InputError(f'{rest[0]!r} is neither an override nor the value of one; write --config.a.b=value')
  try:
    return check(freeze(RunConfig, parsed.value))
  except ValueError as e:
    raise InputError(f'{config}: {e}') from None


def _find(file: str) -> pathlib.Path:
  for path in (pathlib.Path(file), pathlib.Path(configs.__file__).parent.parent / file):
    if path.is_file():
      return path
  raise InputError(f'{file}: no such config file')


def _get_config(path: pathlib.Path, variant: str) -> config_dict.ConfigDict:
  if path.suffix != '.py':
    raise InputError(f'{path}: a config file is Python with a function get_config(variant)')
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as e:
    raise InputError(f'{path}:{e.lineno}: {e.msg}') from None
  if not hasattr(module, 'get_config'):
    raise InputError(f'{path}: has no function get_config(variant)')
  try:
    return module.get_config(variant)
  except ValueError as e:
    raise InputError(str(e)) from None


def _check_keys(values: config_dict.ConfigDict, overrides: Sequence[str]) -> None:
  """Raises InputError for the first override whose key does not exist, with the nearest key that does."""
  known = list(_keys(values))
  for override in overrides:
    key = override.partition('=')[0].removeprefix('--config.')
    if override.startswith('--config.') and key not in known:
      last = key.rpartition('.')[2]
      near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.rpartition('.')[2] == last]
      hint = f'; did you mean --config.{near[0]}?' if near else ''
      raise InputError(f'--config.{key}: no such key{hint}')


def _keys(values, path=''):
  for name, value in values.items():
    if isinstance(value, config_dict.ConfigDict):
      yield from _keys(value, f'{path}{name}.')
    else:
      yield f'{path}{name}'
