"""Compiles the rows of its argument (a JSON list) and prints one JSON line for each.

It runs in a process of its own, since the environment of a compiler for absent devices is not that of the caller and
a compiler may take its process down.
"""
import contextlib
import json
import os
import re
import sys
import time

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.aot.programs import program
from pallas_kernels.aot.rows import TARGETS, Row

# An H100 SXM as XLA describes it.
H100 = '''
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
'''


def mesh(target: str):
  """A mesh of one device of the target."""
  _, platform, topology = TARGETS[target]
  if platform == 'cuda':
    found = topologies.get_topology_desc(platform=platform, topology_name='', target_config=H100, topology=topology)
  else:
    found = topologies.get_topology_desc(platform=platform, topology_name=topology)
  return jax.make_mesh((1,), ('device',), (AxisType.Explicit,), devices=found.devices[:1])


def compile_row(row: Row) -> dict:
  """{implementation, seconds, bytes ...} of a compiled row. Raises what the compiler raises."""
  on = mesh(row.target)
  with jax.set_mesh(on):
    implementation = dispatch.choose(row.op, None)
    fn, arguments = program(row)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(on, P()))
    local = jax.shard_map(fn, in_specs=P(), out_specs=P(), check_vma=False)
    started = time.monotonic()
    compiled = jax.jit(local).trace(*jax.tree.map(place, arguments)).lower().compile()
    seconds = time.monotonic() - started
  memory = compiled.memory_analysis()
  return {'implementation': implementation, 'seconds': round(seconds, 1),
          'argument bytes': memory.argument_size_in_bytes, 'output bytes': memory.output_size_in_bytes,
          'temp bytes': memory.temp_size_in_bytes, **kernels(compiled.as_text(), row.target)}


def kernels(text: str, target: str) -> dict:
  """Number of Pallas kernels in a compiled program and the most on-chip memory that one of them takes."""
  calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
  if TARGETS[target][1] != 'tpu' or not calls:
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
    for spec in json.loads(sys.argv[1]):
      row = Row(*spec)
      try:
        found = compile_row(row)
      except Exception as e:     # whatever a compiler says is the result of the row
        found = {'error': first_lines(e)}
      print(json.dumps(found), file=answers, flush=True)


if __name__ == '__main__':
  main()
