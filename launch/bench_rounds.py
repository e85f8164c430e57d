"""How two programs are timed against each other on one machine: A B A B ..., watched for disturbance.

A ratio is only worth printing when nothing else ran: other processes make the run void. A machine that changes its
speed, as virtual ones do by half within seconds, changes it for both: a ratio is that of a round, and a claim holds
when the interval of their median lies above what is claimed.
"""
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

OTHERS = 0.10           # cores that other processes may use, on average
SETTLE = 0.3            # seconds after the probe, whose threads wait busily for a while, at the first side's cost
MIN_ROUNDS = 6          # of an interval: the median lies outside of 5 values once in 16 times


class Rounds(NamedTuple):
  seconds: dict[str, list[float]]     # of each side, in the order they ran
  probe: list[float]                  # seconds of the fixed product before each round
  others: float | None                # cores used by other processes; None where /proc does not tell


class Cpu(NamedTuple):
  """Seconds of processor time since boot and since the start of our processes."""
  wall: float
  machine: float
  own: float


def alternate(sides: Mapping[str, Callable[[], float]], probe: Callable[[], float] | None, rounds: int,
              pids: Sequence[int] = (), progress: Callable[[int, dict[str, list[float]]], None] = lambda *_: None
              ) -> Rounds:
  """Runs each side once a round, in turn. A side returns the seconds it took; `pids` are its other processes. probe:
  None where it does not matter whether the processor keeps its speed."""
  seconds, probes = {name: [] for name in sides}, []
  before = cpu(pids)
  for n in range(rounds):
    if probe:
      probes.append(probe())
      time.sleep(SETTLE)
    for name, side in sides.items():
      seconds[name].append(side())
    progress(n + 1, seconds)
  return Rounds(seconds, probes, others(before, cpu(pids)))


def void(rounds: Rounds) -> str:
  """Why the rounds mean nothing, or ''."""
  if rounds.others is not None and rounds.others > OTHERS:
    return f'other processes used {rounds.others:.2f} cores on average (limit {OTHERS:.2f})'
  return ''


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
  """95% interval of the median of what the values are drawn from, whatever its distribution: as many of n values lie
  below the median as heads fall in n throws of a coin. None for fewer than MIN_ROUNDS values."""
  ordered, n = sorted(values), len(values)
  if n < MIN_ROUNDS:
    return None
  left_out = max(k for k in range(n // 2) if sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n <= 0.025)
  return ordered[left_out], ordered[n - 1 - left_out]


def rates(seconds: Sequence[float], work: float) -> dict[str, float]:
  """work / seconds: median and best of the rounds."""
  return {'median': work / statistics.median(seconds), 'best': work / min(seconds)}


def cpu(pids: Sequence[int] = ()) -> Cpu | None:
  """Processor time of the machine and of ours: this process and `pids`. None where there is no /proc."""
  try:
    fields = pathlib.Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:]
    tick = os.sysconf('SC_CLK_TCK')
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    own = 0
    for pid in (os.getpid(), *pids):
      stat = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
      own += int(stat[11]) + int(stat[12])
  except (OSError, ValueError):
    return None
  return Cpu(time.monotonic(), (user + nice + system + irq + softirq + steal) / tick, own / tick)


def others(before: Cpu | None, after: Cpu | None) -> float | None:
  """Cores that processes other than ours used in between; what a hypervisor took away counts as theirs."""
  if before is None or after is None:
    return None
  busy = (after.machine - before.machine) - (after.own - before.own)
  return max(0.0, busy / max(after.wall - before.wall, 1e-9))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
  """Slope of log seconds over log size, by least squares: 1 is linear growth, 2 quadratic."""
  import numpy as np
  return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
