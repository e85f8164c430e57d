"""The command line: `keye COMMAND ...`. A command's module is imported when it is called, not before.

Exit codes: 0 done; 1 a check that failed, or a bug (with its traceback); 2 wrong input (one line on stderr that says
what and where); 130 and 143 ended by SIGINT and SIGTERM, after `keye train` has saved.
"""
import argparse
import difflib
import glob
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence

from data_pipelines.errors import InputError

COMMANDS = {
    'quickstart': ('launch.quickstart', 'data, training, evaluation, an answer about a clip and an export, on a CPU'),
    'describe': ('launch.describe', 'parameters, bytes and FLOPs of a config, without allocating it'),
    'plan': ('launch.plan', 'what a run needs of TPUs that are not here, compiled ahead of time'),
    'data': ('launch.data', 'make or check a dataset'),
    'train': ('launch.train', 'train or fine-tune a model; run again to go on'),
    'ladder': ('launch.ladder', 'every stage of training, small, each scored on held-out clips'),
    'retrofit': ('launch.retrofit', 'give a trained dense model sparse attention and measure what it costs'),
    'evaluate': ('launch.evaluate', 'score a model on a question file beside trivial baselines'),
    'generate': ('launch.generate', 'answer a prompt about images and videos'),
    'import': ('launch.import_', 'check a Hugging Face folder or GGUF file and make it a run'),
    'assemble': ('launch.assemble', 'put a language model and a vision encoder together, to begin pre-training with'),
    'export': ('launch.export', 'write a complete Hugging Face folder'),
    'launch': ('launch.launch', 'hand a command to Kubernetes, Slurm, SkyPilot or Ray'),
    'bench': ('launch.bench', 'measure speed, beside a peer if asked'),
}

ACCELERATORS = '/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*'
KEEP_MEMORY = 'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000'


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


def entry() -> int:
  """The command `keye`: as `main`, in a process that keeps its memory.

  XLA for CPUs takes the temporaries of each step from the C library and gives them back; glibc returns such blocks to
  the kernel, which clears every page again for the next step. Kept, and in huge pages, they make a small training step
  about a fifth faster. glibc reads this when a process starts, so the process begins again under the same number.
  Not where there is an accelerator: temporaries are on it.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ and not any(map(glob.glob, ACCELERATORS)):
    os.execve(sys.executable, sys.orig_argv, os.environ | {'GLIBC_TUNABLES': KEEP_MEMORY})
  return main()


def keep_compilations() -> None:
  """Compiled programs are kept under $KEYE_CACHE (~/.cache/keye_jax) between commands, unless jax is told otherwise.

  Said through the environment, before jax is imported, so that child processes do the same.
  """
  root = pathlib.Path(os.environ.get('KEYE_CACHE') or pathlib.Path.home() / '.cache' / 'keye_jax')
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(root / 'jax'))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
  if not any(map(glob.glob, ACCELERATORS)):
    # Of a program that was kept, XLA for CPUs says in 2,000 characters that the processor lacks `prefer-no-gather`,
    # which is a preference of the compiler. What goes wrong is raised as an exception, with this or without it.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


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
  sys.exit(entry())
