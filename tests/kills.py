"""`kill -9` of one of two processes of a run, again and again: `python -m tests.kills --kills 20 --seed 0`.

Prints what each kill did, and ends with exit code 1 when the run that comes out of them has one loss or gradient norm
that differs in a bit from those of a run left alone.
"""
import argparse
import pathlib
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from launch import together
from tests import tiny_run
from tests.processes import finish, last_step, losses, saving, start, wait, write_config

GONE = f'process of the run {together.AGAIN}', f'process 0 {together.AGAIN}'


class Kill(NamedTuple):
  victim: int          # process
  step: int            # not before this one is logged
  in_save: bool        # while a checkpoint is being written


def drawn(seed: int, kills: int, steps: int, save_every: int) -> Iterator[Kill]:
  """One in each of `kills` equal parts of a run, so that it gets on; the last leaves room for another save."""
  rng, part = random.Random(seed), (steps - 2 * save_every) // kills
  for i in range(kills):
    yield Kill(rng.randrange(2), i * part + rng.randrange(1, part + 1), rng.random() < 0.5)


def survive(config: pathlib.Path, out: pathlib.Path, kill: Kill) -> str:
  """Runs until the kill, asserts how the other process ends, and returns its last line."""
  processes = start(config, out)
  wait(processes, lambda: last_step(out) >= kill.step and (not kill.in_save or saving(out)))
  processes[kill.victim].kill()
  ended = finish(processes)
  (code, _, err), victim = ended[1 - kill.victim], ended[kill.victim][0]
  assert (victim, code) == (-signal.SIGKILL, together.LOST), f'{kill}: {victim}, {code}: {err}'
  last = err.splitlines()[-1]
  assert last.startswith(f'keye train: process {1 - kill.victim} of 2: ') and last.endswith(GONE), f'{kill}: {err}'
  return last


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  train = dict(steps=20 * args.kills, log_every=1, save_every=9)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    config = write_config(folder / 'two.py', tiny_run.dataset(folder / 'data'), 2, **train)
    whole, out = folder / 'whole', folder / 'out'
    assert [code for code, _, _ in finish(start(config, whole))] == [0, 0]
    for i, kill in enumerate(drawn(args.seed, args.kills, train['steps'], train['save_every'])):
      last = survive(config, out, kill)
      print(f'{i + 1}/{args.kills} {kill}, step {last_step(out)}: {last}', flush=True)
    assert [code for code, _, _ in finish(start(config, out))] == [0, 0]
    same = losses(out) == losses(whole)
  print(f'{args.kills} kills, {train["steps"]} steps: the losses and gradient norms are '
        + ('those of the run left alone, bit for bit' if same else 'NOT those of the run left alone'))
  return int(not same)


if __name__ == '__main__':
  sys.exit(main())
