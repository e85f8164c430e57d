"""`keye bench video`: speed of reading clips on one core, beside bare PyAV (launch/bench_video.py).

`keye bench attention`: dense, masked dense and sparse attention of one layer as the row grows, forward and backward,
prefill and decoding (launch/bench_attention.py).

`keye bench balance`: how long data ranks wait for each other, simulated (launch/bench_balance.py).

`keye bench model`: speed of one mid-sized decoder on this machine's CPU, beside transformers if asked.

Hidden 512, 8 layers, 8 query and 2 KV heads of 64, 32 experts of 256 of which 4 a token, vocabulary 8192, float32.
Both sides do the same task in turns, twice a turn of which the second counts; see launch/bench_rounds.py for when the
numbers count. A prefill is to give the last token's logits: the peer does it as `logits_to_keep=1` without a cache, we
as generation does, which keeps the caches and leaves out of the last layer what these results do not need.
"""
import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data_pipelines.errors import InputError
from launch import bench_rounds, results

ROOT = pathlib.Path(__file__).parent.parent
# Seconds before the first round of a task and, of one side's calls, before the one that counts. The first rounds of a
# prefill in a virtual machine took 1.5 times as long as the others on one side and 1.05 times on the other.
WARM, AWAKE = 20, 8


class Task(NamedTuple):
  name: str
  kind: str          # prefill, train or decode
  tokens: int
  new: int           # decoded tokens
  floor: float       # ratio to the peer that the claim needs

  @property
  def work(self) -> int:
    """Tokens that the rate counts."""
    return self.new or self.tokens


TASKS = [Task('prefill 2048', 'prefill', 2048, 0, 1.2), Task('prefill 8192', 'prefill', 8192, 0, 1.2),
         Task('train 2048', 'train', 2048, 0, 1.2), Task('decode after 1024', 'decode', 1024, 64, 1.2)]
CLAIM = 'prefill, training step and greedy decoding on 2 CPU threads are at least 1.2 times as fast as in transformers'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('what', choices=('model', 'video', 'attention', 'balance'))
  parser.add_argument('--video', action='append', metavar='FILE', help='`video`: read these files; default: real clips')
  parser.add_argument('--step-seconds', type=float, default=1.0,
                      help='`video`: would an accelerator with such steps wait for this host?')
  parser.add_argument('--clips', type=int, default=8, help='`video`: of one step')
  parser.add_argument('--peer', choices=('transformers',), help='the other side; needs the extra `parity`')
  parser.add_argument('--peer-python', default=sys.executable, help='interpreter that has the peer')
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--task', action='append', choices=[t.name for t in TASKS], help='only these; several times')
  parser.add_argument('--dsa', type=int, default=0, metavar='TOKENS',
                      help='instead: the parts of sparse attention of one layer from 8192 to TOKENS')
  chosen = dict(action='append', help='`attention`: only these; several times')
  parser.add_argument('--length', type=int, metavar='TOKENS', **chosen)
  parser.add_argument('--union', choices=('1', '2', '4', '8', 'random'), **chosen)
  parser.add_argument('--phase', choices=('prefill', 'decode'), **chosen)
  parser.add_argument('--direction', choices=('forward', 'backward'), **chosen)
  parser.add_argument('--batch', type=int, metavar='SEQUENCES', **chosen)
  parser.add_argument('--seconds', type=float, default=float('inf'),
                      help='`attention`: begin nothing after so long; what is left out is in the record')
  parser.add_argument('--ranks', type=int, default=8, help='`balance`: groups of devices that share a row')
  parser.add_argument('--batches', type=int, default=20, help='`balance`: steps')
  parser.add_argument('--seed', type=int, default=0, help='`balance`')
  parser.add_argument('--json', action='store_true', help='print the evidence record instead of a table')
  parser.add_argument('--out', help='also write the evidence record to this file')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'keye bench takes no {config_args[0]}')
  if args.rounds < 1 or args.threads < 1 or args.clips < 1 or min(args.batch or [1]) < 1:
    raise InputError('keye bench: --rounds, --threads, --clips and --batch must be at least 1')
  if not args.step_seconds > 0:
    raise InputError(f'keye bench: --step-seconds {args.step_seconds:g} must be more than 0')
  if args.what == 'video':
    from launch import bench_video
    return bench_video.run(args)
  if args.what == 'balance':
    from launch import bench_balance
    return bench_balance.run(args)
  limit_threads(args.threads)
  if args.what == 'attention':
    from launch import bench_attention
    return bench_attention.run(args)
  if args.dsa:
    from launch import bench_dsa
    return bench_dsa.run(args)
  from launch import bench_model
  tasks = [t for t in TASKS if not args.task or t.name in args.task]
  peer = Peer(args.peer_python, bench_model.peer_shape(bench_model.MODEL), args.threads) if args.peer else None
  try:
    found = measure(tasks, bench_model, peer, args.rounds)
  finally:
    if peer:
      peer.close()
  out = record(tasks, found, args, peer.versions if peer else {})
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1) + '\n')
  print(json.dumps(out) if args.json else table(out))
  return 0


def limit_threads(threads: int) -> None:
  """jax takes a thread for each core the process may use when it starts, so this comes before it.

  Raises InputError when the machine has fewer cores, or does not let a process choose its own."""
  if not hasattr(os, 'sched_setaffinity'):
    raise InputError('keye bench: this system cannot pin a process to cores; run it on Linux')
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < threads:
    raise InputError(f'keye bench: --threads {threads}, but this process may use {len(cores)} cores')
  os.sched_setaffinity(0, cores[:threads])


class Peer:
  """transformers in a process of its own, one task at a time; it waits without spinning in between."""

  def __init__(self, python: str, shape: dict, threads: int):
    env = os.environ | {'OMP_NUM_THREADS': str(threads), 'OMP_WAIT_POLICY': 'passive', 'HF_HUB_OFFLINE': '1'}
    try:
      self.process = subprocess.Popen(
          [python, str(pathlib.Path(__file__).with_name('bench_peer.py')), json.dumps(shape), str(threads)],
          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    except OSError as e:
      raise InputError(f'--peer-python {python}: {e.strerror}') from e
    self.versions = self._answer()

  def ask(self, task: Task) -> float:
    self.process.stdin.write(json.dumps({'task': task.kind, 'tokens': task.tokens, 'new': task.new}) + '\n')
    self.process.stdin.flush()
    return self._answer()['seconds']

  def _answer(self) -> dict:
    line = self.process.stdout.readline()
    if not line:
      last = (self.process.stderr.read().strip().splitlines() or ['it said nothing'])[-1]
      raise InputError(f'the peer stopped: {last}; install the extra `parity` or name another --peer-python')
    return json.loads(line)

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def measure(tasks: Sequence[Task], bench_model, peer: Peer | None, rounds: int) -> dict[str, bench_rounds.Rounds]:
  import jax

  from launch import bench_timing
  config = bench_model.MODEL
  params = bench_model.keye.init(config, jax.random.key(0))
  probe, pids = bench_timing.probe(), [peer.process.pid] if peer else []
  found, started = {}, time.monotonic()
  for n, task in enumerate(tasks):
    make = getattr(bench_model, task.kind)
    ours = make(config, params, task.tokens, *([task.new] if task.new else []))
    sides = {'keye_jax': ours}
    if peer:
      sides['transformers'] = lambda task=task: peer.ask(task)
    sides = {name: awake(side) for name, side in sides.items()}
    say(f'{task.name}: warming up')
    begun = time.monotonic()
    while time.monotonic() - begun < WARM:
      for side in sides.values():
        side()
    begun = time.monotonic()

    def progress(done, seconds, task=task, n=n, begun=begun):
      left = (time.monotonic() - begun) / done * (rounds - done)
      rates = ', '.join(f'{name} {task.work / s[-1]:.0f} tokens/s' for name, s in seconds.items())
      later = f', then {len(tasks) - n - 1} more tasks' if n + 1 < len(tasks) else ''
      say(f'{task.name}: round {done} of {rounds}: {rates}; {left:.0f} s left{later}')

    found[task.name] = bench_rounds.alternate(sides, probe, rounds, pids, progress)
    del ours, sides
  say(f'done in {time.monotonic() - started:.0f} s')
  return found


def awake(side: Callable[[], float]) -> Callable[[], float]:
  """`side` for AWAKE seconds and at least twice, of which the last call counts. In a virtual machine a training step
  right after 6 s of waiting takes 1.4 times as long, the next one some 1.05 times (docs/model_speed.md)."""
  def run() -> float:
    seconds = [side(), side()]
    while sum(seconds) < AWAKE:
      seconds.append(side())
    return seconds[-1]
  return run


def record(tasks, found, args, peer_versions: dict) -> dict:
  """The evidence record: a claim, what was measured, and whether that shows it."""
  void = {name: why for name, r in found.items() if (why := bench_rounds.void(r))}
  sides = {side: {t.name: bench_rounds.rates(found[t.name].seconds[side], t.work) for t in tasks}
           for side in next(iter(found.values())).seconds} if found else {}
  each = {t.name: [theirs / ours for ours, theirs in zip(*(found[t.name].seconds[side] for side in (
      'keye_jax', 'transformers')))] for t in tasks} if args.peer else {}
  ratios = {name: statistics.median(values) for name, values in each.items()}
  intervals = {name: bench_rounds.median_interval(values) for name, values in each.items()}
  whole = bool(args.peer) and len(tasks) == len(TASKS) and args.rounds >= bench_rounds.MIN_ROUNDS
  short = [f'{t.name} {ratios[t.name]:.2f} ({intervals[t.name][0]:.2f} to {intervals[t.name][1]:.2f})' for t in tasks
           if whole and intervals[t.name][0] < t.floor]
  why = ('; '.join(f'{k}: void, {v}' for k, v in void.items()) or
         ('' if args.peer else 'no peer was measured') or
         ('' if whole else f'the claim needs all tasks and at least {bench_rounds.MIN_ROUNDS} rounds') or
         (f'not above the floor: {", ".join(short)}' if short else 'every interval lies at or above its floor'))
  flat = lambda rates: {f'{name}, {k} tokens/s': v for name, both in rates.items() for k, v in both.items()}
  return {
      'claim': CLAIM, 'command': results.command(sys.argv[1:]), 'commit': results.commit(),
      'hardware': hardware(),
      'versions': versions() | peer_versions, 'n': args.rounds,
      'baselines': {k: flat(v) for k, v in sides.items() if k != 'keye_jax'},
      'arms': {k: {'0': flat(v)} for k, v in sides.items() if k == 'keye_jax'},
      'share of one large product': shares(tasks, found), 'medians of ratios': ratios,
      'floors': {t.name: t.floor for t in tasks},
      'intervals': intervals,
      'rounds': {name: {'seconds': r.seconds, 'probe seconds': r.probe, 'cores of others': r.others}
                 for name, r in found.items()},
      'void': void,
      'verdict': 'shown' if whole and not void and not short else 'not shown', 'why': why,
  }


def shares(tasks: Sequence[Task], found) -> dict[str, dict[str, float]]:
  """{task: {side: FLOP/s of the products that it makes, over those of the fixed product between the rounds}};
  medians. How much of its time is left to everything but products, and to products below that rate."""
  from launch import bench_model
  from launch.bench_timing import PROBE_FLOPS
  out = {}
  for t in tasks:
    work = functools.partial(bench_model.flops, bench_model.MODEL, t.kind, t.tokens)
    if work(whole=True):
      seconds, probe = found[t.name].seconds, statistics.median(found[t.name].probe)
      out[t.name] = {side: work(whole=side != 'keye_jax') / statistics.median(s) * probe / PROBE_FLOPS
                     for side, s in seconds.items()}
  return out


def hardware() -> str:
  """The host, with what its processor multiplies by."""
  flags = next((line.split() for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines()
                if line.startswith('flags')), ())
  simd = [f for f in ('avx2', 'fma', 'avx512f', 'avx512_bf16', 'amx_tile') if f in flags]
  return f'{results.hardware()} ({", ".join(simd)})' if simd else results.hardware()


def versions() -> dict:
  import importlib.metadata
  out = {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy')}
  return {'python': sys.version.split()[0]} | out


def table(out: dict) -> str:
  lines = []
  for name in out['rounds']:
    cells = [f'{side} {found[f"{name}, median tokens/s"]:.0f} (best {found[f"{name}, best tokens/s"]:.0f})'
             for side, found in [*((k, v['0']) for k, v in out['arms'].items()), *out['baselines'].items()]]
    ratio, share = out['medians of ratios'].get(name), out['share of one large product'].get(name, {})
    cells += [f'products at {", ".join(f"{s:.0%}" for s in share.values())} of one large one'] * bool(share)
    lines.append(f'{name:<18} {"  ".join(cells)} tokens/s' + (f'  x {ratio:.2f}' if ratio else '') +
                 (f'  VOID: {out["void"][name]}' if name in out['void'] else ''))
  return '\n'.join([*lines, f'{out["verdict"]}: {out["why"]}'])


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
