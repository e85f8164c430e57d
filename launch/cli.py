"""The command line: `keye COMMAND ...`. A command's module is imported when it is called, not before.

Exit codes: 0 done; 1 a check that failed, or a bug (with its traceback); 2 wrong input (one line on stderr that says
what and where); 130 and 143 ended by SIGINT and SIGTERM, after `keye train` has saved.
"""
import argparse
import difflib
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence

from data_pipelines.errors import InputError

COMMANDS = {
    'quickstart': ('launch.quickstart', 'data, training, evaluation, an answer about a clip and an export, on a CPU'),
    'describe': ('launch.describe', 'parameters, bytes and FLOPs of a config, without allocating it'),
    'data': ('launch.data', 'make or check a dataset'),
    'train': ('launch.train', 'train or fine-tune a model; run again to go on'),
    'evaluate': ('launch.evaluate', 'score a model on a question file beside trivial baselines'),
    'generate': ('launch.generate', 'answer a prompt about images and videos'),
    'import': ('launch.import_', 'check a Hugging Face folder or GGUF file and make it a run'),
    'export': ('launch.export', 'write a complete Hugging Face folder'),
    'launch': ('launch.launch', 'hand a command to Kubernetes, Slurm, SkyPilot or Ray'),
    'bench': ('launch.bench', 'measure speed, beside a peer if asked'),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns its exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ('-h', '--help'):
    print(usage())
    return 0 if argv else 2
  name, *rest = argv
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f'did you mean `keye {near[0]}`?' if near else f'there are {", ".join(COMMANDS)}'
    print(f'keye: no command {name!r}; {hint}', file=sys.stderr)
    return 2
  keep_compilations()
  module = importlib.import_module(COMMANDS[name][0])
  parser = argparse.ArgumentParser(f'keye {name}', description=module.__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  module.add_arguments(parser)
  args, config_args = split(parser, rest)
  try:
    return module.run(args, config_args)
  except InputError as e:
    print(f'keye {name}: {e}', file=sys.stderr)
    return 2
  except BrokenPipeError:        # `keye ... | head`
    sys.stderr.close()
    return 1
  except KeyboardInterrupt:
    return 130


def keep_compilations() -> None:
  """Compiled programs are kept under $KEYE_CACHE (~/.cache/keye_jax) between commands, unless jax is told otherwise.

  Said through the environment, before jax is imported, so that child processes do the same.
  """
  root = pathlib.Path(os.environ.get('KEYE_CACHE') or pathlib.Path.home() / '.cache' / 'keye_jax')
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(root / 'jax'))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')


def split(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """(parsed arguments, '--config.a.b=value' overrides); exits with code 2 on any other unknown argument."""
  args, unknown = parser.parse_known_args(argv)
  overrides, values = [], iter(unknown)
  for arg in values:
    if not arg.startswith('--config.'):
      parser.error(f'unrecognized argument: {arg}')
    overrides.append(arg if '=' in arg else f'{arg}={next(values, "true")}')
  return args, overrides


def usage() -> str:
  width = max(map(len, COMMANDS))
  commands = '\n'.join(f'  {name:<{width}}  {text}' for name, (_, text) in COMMANDS.items())
  return f'usage: keye COMMAND [--help] ...\n\n{commands}\n\n`keye COMMAND --help` shows the arguments of a command.'


if __name__ == '__main__':
  sys.exit(main())
