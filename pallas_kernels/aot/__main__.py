"""`python -m pallas_kernels.aot --json`: compiles every op, forward and backward, for TPUs and GPUs that are not here.

Needs the compilers of the extra `aot`. Exit code 0 when every row compiled and kept its limit, 1 when one did not,
2 when a compiler is missing or an argument makes no sense.
"""
import argparse
import collections
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from pallas_kernels.aot.rows import DIRECTIONS, LENGTHS, OPS, TARGETS, Row, installed, rows

ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_SKIP_MDS_QUERY': '1',
               'TPU_WORKER_HOSTNAMES': 'localhost', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}
PACKAGES = ('jax', 'jaxlib', 'libtpu', 'jax-cuda12-plugin')
MIB = 2**20


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='python -m pallas_kernels.aot', description=__doc__.split('\n')[0])
  for name, choices in (('op', OPS), ('target', tuple(TARGETS)), ('direction', DIRECTIONS)):
    parser.add_argument(f'--{name}', action='append', default=[], choices=choices, help='only these; several times')
  parser.add_argument('--length', action='append', default=[], type=int,
                      help=f'keys, several times; default {", ".join(map(str, LENGTHS))}')
  parser.add_argument('--shared', action='store_true',
                      help="tell shared memory of a GPU's kernels too, which takes minutes for a row")
  parser.add_argument('--json', action='store_true', help='print one JSON object instead of a table')
  args = parser.parse_args(words)
  if bad := [n for n in args.length if n < 1]:
    parser.error(f'--length {bad[0]}: a length is at least 1')
  return args


def compiled(specs: Sequence[Row], shared: bool = False) -> Iterator[dict]:
  """One result a row, in order. A child process that dies is that row's error, and the rest go on in a new one."""
  specs = list(specs)
  while specs:
    child = subprocess.Popen([sys.executable, '-m', 'pallas_kernels.aot.child', json.dumps([specs, shared])],
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | ENVIRONMENT)
    tail = collections.deque(maxlen=5)
    reader = threading.Thread(target=tail.extend, args=(child.stderr,))
    reader.start()
    for line in child.stdout:
      specs.pop(0)
      yield json.loads(line)
    code = child.wait()
    reader.join()
    if specs:
      specs.pop(0)
      yield {'error': f'the compiler ended its process with code {code}: {" ".join("".join(tail).split())[-500:]}'}


def failed(result: dict) -> bool:
  return 'error' in result or result['temp bytes'] > (result['limit bytes'] or result['temp bytes'])


def line(result: dict) -> str:
  """A row of the table."""
  where = f'{result["target"]:<6} {result["op"]:<16} {result["direction"]:<9} {result["length"]:>7}/{result["shards"]} '
  if 'error' in result:
    return f'{where}FAILED {result["error"]}'
  size = ' '.join(f'{name} {result[f"{name} bytes"] / MIB:>8.0f}' for name in ('argument', 'output', 'temp'))
  limit = f' (limit {result["limit bytes"] / MIB:.0f})' if result['limit bytes'] else ''
  vmem = f', VMEM {result["vmem bytes"] / MIB:.1f}' if 'vmem bytes' in result else ''
  over = ' OVER THE LIMIT' if failed(result) else ''
  end = ''.join(f'\n  {name}: {k["registers"]} registers, {k["spill bytes"]} bytes spilled'
                + (f', {k["shared bytes"]:,} bytes shared' if 'shared bytes' in k else '')
                for name, k in result.get('gpu kernels', {}).items())
  return f'{where}{result["implementation"]:<4} {size} MiB{limit}{vmem}, compiled in {result["seconds"]} s{over}{end}'


def versions() -> dict[str, str]:
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def main(words: Sequence[str] | None = None) -> int:
  args = arguments(words)
  specs = rows(args.op, args.direction, args.target, args.length)
  for target in dict.fromkeys(spec.target for spec in specs):
    if not installed(target):
      print(f'pallas_kernels.aot: {target} needs the package {TARGETS[target][0]}, which is not installed; '
            "pip install 'keye_jax[aot]'", file=sys.stderr)
      return 2
  results = []
  for spec, found in zip(specs, compiled(specs, args.shared)):
    results.append(spec._asdict() | {'limit bytes': spec.limit} | found)
    print(f'{len(results)}/{len(specs)} {line(results[-1])}', file=sys.stderr if args.json else sys.stdout, flush=True)
  if args.json:
    command = ' '.join(['python -m pallas_kernels.aot', *(sys.argv[1:] if words is None else words)])
    print(json.dumps({'command': command, 'versions': versions(), 'rows': results}))
  return int(any(map(failed, results)))


if __name__ == '__main__':
  sys.exit(main())
