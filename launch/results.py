"""Evidence files: docs/results/<name>.json, what was claimed and everything needed to check it."""
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

FOLDER = pathlib.Path(__file__).parent.parent / 'docs' / 'results'
README = FOLDER.parent.parent / 'README.md'
START, END = '<!-- results:{} -->', '<!-- /results -->'         # around what a page shows of a file
COMMIT = 'KEYE_COMMIT'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'av')


def record(name: str, claim: str, n: int, baselines: Mapping[str, Any], arms: Mapping[str, Any],
           intervals: Mapping[str, Any], why_not: str, **more: Any) -> pathlib.Path:
  """Writes the file and returns its path. why_not: what the claim lacks; '' when it is shown.

  baselines: {name: {metric: value}}; arms: {arm: {seed: {metric: value}}}; intervals: {arm: {metric: [low, high]}}.
  """
  content = {'claim': claim, **made(), 'n': n, 'baselines': baselines, 'arms': arms, 'intervals': intervals,
             'verdict': 'not shown' if why_not else 'shown', 'why': why_not, **more}
  FOLDER.mkdir(parents=True, exist_ok=True)
  path = FOLDER / f'{name}.json'
  path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
  return path


def made() -> dict[str, Any]:
  """What an evidence file says of how it was made."""
  return {'command': command(sys.argv[1:]), 'commit': commit(), 'hardware': hardware(), 'versions': versions()}


def readme_block(said: Mapping[str, Any]) -> str:
  """The table of docs/results/quickstart.json as the README shows it."""
  rows = {arm: next(iter(seeds.values())) for arm, seeds in said['arms'].items()} | said['baselines']
  names = list(dict.fromkeys(name for values in rows.values() for name in values if name != 'strict'))
  short = lambda name: name.removeprefix('accuracy/').replace('_', ' ')
  cell = lambda values, name: f'{values[name]:.2f}' if name in values else '–'
  lines = [f'| {said["n"]} held-out questions | {" | ".join(map(short, names))} |', '|---' * (len(names) + 1) + '|']
  lines += [f'| {arm} | {" | ".join(cell(values, name) for name in names)} |' for arm, values in rows.items()]
  minutes, commit_ = sum(said['seconds'].values()) / 60, said['commit'][:10]
  lines += ['', f'`{said["command"]}`: {said["verdict"]}' + (f' ({said["why"]})' if said['why'] else '')
            + f'. {minutes:.1f} minutes and {said["peak_gib"]:.1f} GiB on {said["hardware"]}; '
            f'jax {said["versions"]["jax"]}, commit {commit_}. Details: `docs/results/quickstart.json`.']
  return '\n'.join(lines)


def refresh_readme() -> None:
  put(README, 'quickstart', readme_block(read('quickstart')))


def read(name: str) -> dict[str, Any] | None:
  """What is recorded; None before anything is."""
  path = FOLDER / f'{name}.json'
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def put(page: pathlib.Path, name: str, text: str) -> None:
  """Replaces what a page shows of docs/results/{name}.json."""
  before, rest = page.read_text(encoding='utf-8').split(START.format(name))
  page.write_text(f'{before}{START.format(name)}\n{text}\n{END}{rest.split(END, 1)[1]}', encoding='utf-8')


def shown(page: pathlib.Path, name: str) -> str:
  return page.read_text(encoding='utf-8').split(START.format(name))[1].split(END, 1)[0].strip()


def command(arguments: Sequence[str]) -> str:
  """What to type, without the folders of this machine: of an absolute path its last name stays."""
  short = lambda word: pathlib.PurePath(word).name if pathlib.PurePath(word).is_absolute() else word
  return shlex.join(['keye', *('='.join(map(short, word.split('='))) for word in arguments)])


@functools.cache
def commit() -> str:
  """The commit checked out at the first call, with '+changes' when files differ from it; '' outside a checkout. Of a
  copy that was made without its history, KEYE_COMMIT of the environment says it."""
  if said := os.environ.get(COMMIT, ''):
    return said
  def git(*args):
    return subprocess.run(['git', *args], cwd=FOLDER.parent.parent, capture_output=True, text=True).stdout.strip()
  try:
    return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain', '--untracked-files=no') else '')
  except FileNotFoundError:
    return ''


def hardware() -> str:
  """Accelerators that jax sees, processor, usable cores and memory."""
  model, memory = platform.machine(), 0
  try:
    model = processor(pathlib.Path('/proc/cpuinfo').read_text()) or model
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  except OSError:
    pass
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return accelerators() + f'{model}, {cores} cores' + (f', {memory / 2**30:.0f} GiB' if memory else '')


def processor(cpuinfo: str) -> str:
  """Name, family and model of the first processor in the text of /proc/cpuinfo; '' where it has none. A virtual machine
  may say "AMD EPYC" of processors whose products differ by a factor of two."""
  said = dict(re.findall(r'^(model name|cpu family|model)[ \t]*: (.+)$', cpuinfo.split('\n\n')[0], re.M))
  name, family, model = (said.get(key, '').strip() for key in ('model name', 'cpu family', 'model'))
  return name + (f' (family {family}, model {model})' if name and family and model else '')


def accelerators() -> str:
  """'4 x NVIDIA H100 80GB HBM3; ', '' when computations run on the processor."""
  import jax  # not when this file is imported: the command line sets what jax reads then
  devices = jax.devices()
  if devices[0].platform == 'cpu':
    return ''
  return (f'{len(devices)} x ' if len(devices) > 1 else '') + devices[0].device_kind + '; '


def versions() -> dict[str, str]:
  return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
