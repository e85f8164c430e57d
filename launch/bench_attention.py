"""`keye bench attention`: one layer's attention in the shape of Keye-VL-2.0-30B-A3B as the row grows: dense, masked
dense and sparse.

32 query and 4 KV heads of 128, an indexer of 16 heads of 64, k = 2048. What sparse attention costs depends on how far
the picks of neighbouring queries agree: u(16), the keys that 16 neighbours select together over k, is 1 when they are
the same. Inputs are made, from a seed, so that u is about 1, 2, 4 and 8 at the end of the row, and 'random' for queries
that have nothing in common; what u really is stands in each row, since short rows do not hold enough keys for a large
one.

    dense          blocked dense attention
    masked_dense   the fused op over every key tile that holds a selected key, under the mask of the selection
    sparse         the fused op by the way that the lengths choose (pallas_kernels/dsa_attention/way.py), without the
                   indexer's loss; in decoding caches in pages (pallas_kernels/dsa_decode)
    score          all index scores, reduced to their maxima
    select         what the exact top-k adds to that
    selection      both together, where scores were not timed beside it
    attend         attention to a selection that is given; on a GPU and in decoding `sparse` less a selection
    training       backward only: the fused op with the indexer's loss and all gradients, what an update runs

Backward is the forward pass and the gradients of q, k and v; decode one new token after the others. Rows that do not
depend on u are measured once, beside the inputs of u = 4, or beside the first when that is not asked for. Each has its
FLOPs, least bytes and the fraction of this device's roofline, which is measured in the same run.

On a CPU all is float32. Of a row of prefill one query in 8 is at work, in runs of 128 spread evenly over it, with all
keys: an eighth of the row's work, as a device of eight has that share it. Parts that go over whole tiles are measured
up to 65536 tokens. Other processes make a run void, and since such machines change their speed, the claim is judged by
the rounds that suit it least: the fastest of dense attention, the slowest of the rest. Growth is that of the medians.

On a GPU all is bfloat16, in whole rows of up to 262144 tokens and decoding steps of 16 and 64 sequences, and dense
attention is that of others, timed in the same rounds (launch/bench_attention_peers.py); our own, which is made for CPUs
and starts many small programs there, only up to 32768 tokens. Programs are compiled ahead, by as many cores as
`--threads` allows. The output of the last queries is compared with the definition of sparse attention there (`off`).

The cells that the claim needs come first. `--out` is written after each cell; a record that is there already is gone on
with, its cells are not measured again. `--seconds` ends the run at the first cell after so long; what it leaves out is
in the record. A part that fails is a row with its error.
"""
import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import InputError
from launch import bench_attention_parts as parts
from launch import bench_attention_peers as peers
from launch import bench_attention_settings as settings
from launch import bench_roofline, bench_rounds, results
from launch.bench_attention_compile import Made, compiled, first_lines, key
from launch.bench_attention_parts import Shape
from launch.bench_attention_record import record, summary, table, this_run
from launch.bench_attention_settings import KINDS, UNIONS, Cell, Part, Setting
from launch.bench_timing import timed
from pallas_kernels import dispatch


def run(args: argparse.Namespace) -> int:
  """Called by launch/bench.py once the threads are limited."""
  started = time.monotonic()
  setting, say = settings.of(dispatch.platform()), lambda text: print(text, file=sys.stderr, flush=True)
  absent = {name: why for name, why in peers.missing().items() if name in setting.parts}
  setting = setting._replace(parts=[name for name in setting.parts if name not in absent])
  left, old = chosen(args, setting), earlier(args.out)
  rows, before = old.get('rows', []), [*old['earlier runs'], this_run(old)] if old else []
  left = [cell for cell in left if not any(measured(cell, row) for row in rows)]
  roof = bench_roofline.measure(setting.dtype, setting.side, setting.numbers, calls=setting.roof_calls)
  lengths = sorted({cell.tokens for cell in left} | {row['tokens'] for row in rows})
  omitted = lambda: [f'{name}: {why}' for name, why in absent.items()] + [settings.title(cell) for cell in left]
  out = lambda: record(rows, lengths, setting, roof, args.rounds, omitted(), before)
  for cell, found in measure(Shape(), list(left), setting, roof, args.rounds, say, started + args.seconds):
    rows += found
    left.remove(cell)
    say('  ' + summary(found))
    if args.out:
      save(pathlib.Path(args.out), out())
  if args.out:
    save(pathlib.Path(args.out), out())
  print(json.dumps(out()) if args.json else table(out()))
  return 0


def earlier(path: str | None) -> dict:
  """The record to go on with, {} when there is none. Raises InputError for a file that is no record, or of other
  hardware."""
  file = pathlib.Path(path or '')
  if not path or not file.exists():
    return {}
  try:
    found = json.loads(file.read_text())
    this_run(found), found['rows'], found['earlier runs']
  except (ValueError, KeyError) as e:
    raise InputError(f'--out {path}: there is a file that is no record of this benchmark; name another') from e
  if found['hardware'] != results.hardware():
    raise InputError(f'--out {path}: its rows are of {found["hardware"]}; name another file')
  return found


def measured(cell: Cell, row: dict) -> bool:
  return (*cell[:4], cell.union) == tuple(row[name] for name in ('phase', 'direction', 'tokens', 'batch', 'union'))


def save(path: pathlib.Path, out: dict) -> None:
  """A run that is killed leaves the record of its last cell, whole."""
  beside = path.with_name(path.name + '.part')
  beside.write_text(json.dumps(out, indent=1) + '\n')
  beside.replace(path)


def chosen(args: argparse.Namespace, setting: Setting) -> list[Cell]:
  """Raises InputError for a length at which nothing is left out, or when no row is left."""
  lengths = sorted(set(args.length or setting.lengths))
  if lengths[0] <= Shape().topk:
    raise InputError(f'--length {lengths[0]}: a row needs more than k = {Shape().topk} tokens, '
                     'else all of them are selected')
  kinds = [k for k in KINDS if k[0] in (args.phase or k) and k[1] in (args.direction or k)]
  if not kinds:
    raise InputError('decoding has no backward pass; choose another --phase or --direction')
  if args.length:
    setting = setting._replace(unions=())
  if bad := [n for n in lengths if setting.share > 1 and n % (setting.share * parts.RUN)]:
    raise InputError(f'--length {bad[0]}: one query in {setting.share} is measured, in runs of {parts.RUN}; write a '
                     f'multiple of {setting.share * parts.RUN}')
  unions = [u for u in UNIONS if str(u) in (args.union or map(str, UNIONS))]
  return settings.cells(setting, lengths, unions, kinds, sorted(set(args.batch or setting.batches)))


def measure(shape: Shape, cells: Sequence[Cell], setting: Setting, roof: bench_roofline.Roofline, rounds: int,
            say: Callable[[str], None], until: float = float('inf')) -> Iterator[tuple[Cell, list[dict]]]:
  """Each cell with its rows, one a part; no cell begins after `until` on the monotonic clock."""
  made: Made = compiled(shape, cells, setting, say, until) if setting.workers else {}
  for cell in cells:
    if time.monotonic() >= until:
      return
    if not setting.workers:
      made |= compiled(shape, [cell], setting, say, until, made)
    yield cell, measure_cell(shape, cell, setting, made, roof, rounds, say)


def measure_cell(shape: Shape, cell: Cell, setting: Setting, made: Made, roof: bench_roofline.Roofline, rounds: int,
                 say: Callable[[str], None]) -> list[dict]:
  """One row a part: seconds (best, median, worst of the rounds), FLOPs, bytes, fraction of the roofline, temporaries,
  whether void; or the error of a part. Whatever a device or a compiler raises is the result of a row."""
  about = {'phase': cell.phase, 'direction': cell.direction, 'tokens': cell.tokens, 'batch': cell.batch,
           'union': cell.union}
  names = settings.parts(setting, cell)
  failed = lambda names, why: [{**about, 'part': name, 'error': why} for name in names]
  try:
    x, u = prepared(shape, cell, setting, names)
  except Exception as e:
    return failed(names, first_lines(e))
  a, rows, programs, calls, once, ends = parts.arguments(x, cell.direction), [], {}, {}, 0.0, {}
  for name in names:
    program = made[key(cell, name)]
    if isinstance(program, str):
      rows += failed([name], program)
      continue
    try:
      seconds, out = warm(program, a, setting.shortest)
    except Exception as e:
      rows += failed([name], first_lines(e))
      continue
    if cell[:2] == ('prefill', 'forward') and name in ('sparse', 'reference'):
      ends[name] = out[:, -parts.CHECKED:]
    del out
    if name != 'reference':
      programs[name], calls[name] = program, max(int(setting.shortest / max(seconds, 1e-6)), 1)
      once += seconds * calls[name]
  count = int(min(rounds, max(2, setting.longest / max(once, 1e-6))))
  say(f'{settings.title(cell)}: u = {u:.2f}, about {once * count:.0f} s')
  sides = {name: lambda fn=fn, n=calls[name]: timed(fn, *a, calls=n)[0] for name, fn in programs.items()}
  try:
    found = bench_rounds.alternate(sides, None, count)
  except Exception as e:
    return rows + failed(programs, first_lines(e))
  width = jnp.dtype(setting.dtype).itemsize
  for name, seconds in parts.differences(found.seconds).items():
    need = parts.work(shape, cell.tokens, Part(cell.phase, cell.direction, name), u, cell.batch, width, setting.share)
    best, program = min(seconds), programs.get(name)
    rows.append({**about, 'part': name, 'u': round(u, 3), 'rounds': count,
                 'seconds': {'best': best, 'median': float(np.median(seconds)), 'worst': max(seconds)}, **need,
                 'roofline': bench_roofline.fraction(roof, need['flops'], need['bytes'], best),
                 'temp bytes': program and program.memory_analysis().temp_size_in_bytes,
                 'off': off(**ends) if name == 'sparse' and len(ends) == 2 else None,
                 'void': bench_rounds.void(found) if setting.watched else ''})
  return rows


def prepared(shape: Shape, cell: Cell, setting: Setting, names: Sequence[str]) -> tuple[parts.Inputs, float]:
  """(inputs of a cell, their u)."""
  if cell.phase == 'decode':
    x, u = parts.decode_inputs(shape, cell.tokens, cell.batch, setting.dtype), 1.0
  else:
    x = parts.inputs(shape, cell.tokens, cell.union, setting.dtype, setting.share)
    u = parts.union_factor(shape, x)
  return parts.prepare(shape, cell, names, x), u


def warm(program: Callable, a: tuple, shortest: float) -> tuple[float, jax.Array]:
  """(seconds, result) of the first call; of the second, where a program is short and calls are counted by them."""
  seconds, out = timed(program, *a)
  return timed(program, *a) if seconds < 20 * shortest else (seconds, out)


def off(sparse: jax.Array, reference: jax.Array) -> float:
  """Norm of the difference over the norm."""
  sparse, reference = sparse.astype(jnp.float32), reference.astype(jnp.float32)
  return float(jnp.linalg.norm((sparse - reference).reshape(-1)) / jnp.linalg.norm(reference.reshape(-1)))
