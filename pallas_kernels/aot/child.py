"""Compiles the rows of its argument (JSON: rows, and whether shared memory is asked for) and prints one JSON line for
each.

It runs in a process of its own, since the environment of a compiler for absent devices is not that of the caller and
a compiler may take its process down.
"""
import contextlib
import json
import os
import re
import sys
import tempfile
import time

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.aot.gpu_kernels import DUMP, assembled
from pallas_kernels.aot.programs import program
from pallas_kernels.aot.rows import TARGETS, Row
from pallas_kernels.aot.topology import devices


def mesh(target: str):
  """A mesh of one device of the target."""
  return jax.make_mesh((1,), ('device',), (AxisType.Explicit,), devices=devices(TARGETS[target][2])[:1])


def compile_row(row: Row, shared: bool) -> dict:
  """{implementation, seconds, bytes ...} of a compiled row. Raises what the compiler raises."""
  on = mesh(row.target)
  with jax.set_mesh(on):
    implementation = dispatch.choose(row.op, None)
    fn, arguments = program(row)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on, P()))
    local = jax.shard_map(fn, in_specs=P(), out_specs=P(), check_vma=False)
    started, gpu = time.monotonic(), TARGETS[row.target][1] == 'cuda'
    lowered = jax.jit(local).trace(*jax.tree.map(place, arguments)).lower()
    with tempfile.TemporaryDirectory() as folder:
      compiled = lowered.compile({'xla_dump_to': folder} | (DUMP if shared else {}) if gpu else None)
      seconds = time.monotonic() - started
      found = {'gpu kernels': assembled(folder)} if gpu else kernels(compiled.as_text())
  memory = compiled.memory_analysis()
  return {'implementation': implementation, 'seconds': round(seconds, 1),
          'argument bytes': memory.argument_size_in_bytes, 'output bytes': memory.output_size_in_bytes,
          'temp bytes': memory.temp_size_in_bytes, **found}


def kernels(text: str) -> dict:
  """Number of Pallas kernels in a program compiled for a TPU and the most on-chip memory that one of them takes."""
  calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
  if not calls:
    return {}
  used = [int(n) for line in calls for n in re.findall(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', line)]
  return {'kernels': len(calls), **({'vmem bytes': max(used)} if used else {})}


def first_lines(error: Exception) -> str:
  """The error in a few lines: a compiler appends its whole allocation table."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return f'{type(error).__name__}: {" ".join(lines[:3])}'[:600]


def main() -> None:
  answers = os.fdopen(os.dup(1), 'w')
  with contextlib.redirect_stdout(sys.stderr):           # a compiler may write to stdout
    specs, shared = json.loads(sys.argv[1])
    for spec in specs:
      try:
        found = compile_row(Row(*spec), shared)
      except Exception as e:     # whatever a compiler says is the result of the row
        found = {'error': first_lines(e)}
      print(json.dumps(found), file=answers, flush=True)


if __name__ == '__main__':
  main()
