"""`keye launch`: hand a command to a cluster's own engine, as one process a host.

    keye launch --target gke --accelerator tpu-v5p-slice --topology 4x4x8 --image IMAGE --dry-run -- \\
        train --config configs/sft.py:30b --out /runs/a

--dry-run prints what the engine is given: a JobSet with a Kueue queue, a batch script, a SkyPilot task or the request
of a Ray job. Without it the engine's client (kubectl, sbatch, sky, ray) gets it. The engine starts the command again
after a failure, and the run goes on from its last checkpoint; wrong input (exit code 2) is not tried again. --out must
be a folder that all hosts see.
"""
import argparse
import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NoReturn

from data_pipelines.errors import InputError
from launch import cli
from launch.cluster import gke, job, ray, skypilot, slurm

TARGETS = {'gke': gke, 'slurm': slurm, 'skypilot': skypilot, 'ray': ray}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--target', required=True, choices=TARGETS)
  parser.add_argument('--dry-run', action='store_true', help='print it, submit nothing')
  parser.add_argument('--name', default='keye', help='of the job, also in DNS names')
  parser.add_argument('--hosts', type=int, default=0, help='processes of the run; or --topology')
  parser.add_argument('--devices', type=int, default=0, help='GPUs or chips of a host; 4 with --topology')
  parser.add_argument('--accelerator', default='', help='tpu-v5p-slice or nvidia-h100-80gb (gke), h100 (slurm), '
                      'H100 or tpu-v5p-32 (skypilot), H100 or TPU (ray)')
  parser.add_argument('--topology', default='', help='of a TPU slice in chips, 4x4x8 (gke)')
  parser.add_argument('--image', default='', help='container with keye installed (gke needs one)')
  parser.add_argument('--queue', default='', help='LocalQueue of Kueue, or partition of Slurm')
  parser.add_argument('--restarts', type=int, default=10, help='how often to start again after failures')
  parser.add_argument('command', nargs='+', metavar='-- COMMAND', help='what to run, without `keye`')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'{config_args[0]}: belongs to the command that is launched; write it after --')
  check(args.command)
  target = TARGETS[args.target]
  text = target.render(describe(args))
  if args.dry_run:
    print(text, end='')
    return 0
  return submit(target.SUBMIT, text, as_file=args.target == 'skypilot')


def describe(args: argparse.Namespace) -> job.Job:
  """The job that the arguments ask for. Raises InputError naming the argument that is missing or contradicts."""
  if not re.fullmatch(r'[a-z]([-a-z0-9]{0,26}[a-z0-9])?', args.name):
    raise InputError(f'--name {args.name}: at most 28 of a-z, 0-9 and -, a letter first')
  devices, hosts = args.devices, args.hosts
  if args.topology:
    if args.target != 'gke':
      raise InputError(f'--topology is for gke; {args.target} takes --hosts and --accelerator')
    devices = devices or 4
    hosts = job.tpu_hosts(args.topology, devices)
    if args.hosts not in (0, hosts):
      raise InputError(f'--hosts {args.hosts}: a slice of {args.topology} has {hosts} hosts with {devices} chips')
  if hosts < 1 or devices < 0 or args.restarts < 0:
    raise InputError('--hosts must be given and at least 1; --devices and --restarts are not negative')
  if args.target == 'gke' and not (args.image and args.accelerator and devices):
    raise InputError('gke needs --image, --accelerator, and --topology (TPU) or --devices and --hosts (GPU)')
  return job.Job(args.name, ('keye', *args.command), hosts, devices, args.accelerator, args.topology, args.image,
                 args.queue, args.restarts)


def check(command: Sequence[str]) -> None:
  """Raises InputError when the command line would be refused on the hosts, where nobody sees it at once."""
  name, *rest = command
  if name not in cli.COMMANDS or name in ('launch', 'quickstart'):
    raise InputError(f'keye launch runs a command such as train, not {name!r}')
  module = importlib.import_module(cli.COMMANDS[name][0])
  parser = _Parser(f'keye {name}', allow_abbrev=False)
  module.add_arguments(parser)
  cli.split(parser, rest)


class _Parser(argparse.ArgumentParser):

  def error(self, message: str) -> NoReturn:
    raise InputError(f'{self.prog}: {message}')


def submit(client: Sequence[str], text: str, as_file: bool) -> int:
  """Gives the text to the engine's client; returns its exit code. Raises InputError when it is not installed."""
  if shutil.which(client[0]) is None:
    raise InputError(f'{client[0]}: not found; install it here, or take what --dry-run prints to where it is')
  if not as_file:
    return subprocess.run(client, input=text, text=True).returncode
  with tempfile.NamedTemporaryFile('w', suffix='.yaml') as file:
    file.write(text)
    file.flush()
    return subprocess.run([*client, file.name]).returncode
