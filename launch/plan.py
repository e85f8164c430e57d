"""`keye plan`: what a run would need of TPUs or GPUs that are not here.

Compiles the real training step (supervised, of the indexers alone, or on a policy's responses; or the prefill, or a
decoding step) ahead of time, on a CPU, for every device of a slice, and says what a device holds and does: bytes
against its memory, the implementation of every op, FLOPs, traffic and the time that each would take at least. Exit code
1 when it does not fit. Needs the compilers of 'keye_jax[aot]'.
"""
import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from data_pipelines.errors import InputError
from keye_jax import planning
from launch import plan_child
from launch.plan_advice import advice
from launch.run_config import HELP, load
from pallas_kernels.aot.__main__ import ENVIRONMENT
from pallas_kernels.aot.rows import installed

GIB = 2**30
PARTS = ('parameters', 'optimizer', 'cache', 'batch', 'arguments', 'results', 'temporaries', 'peak', 'hbm')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, help=HELP)
  parser.add_argument('--topology', required=True, help='slice, e.g. v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, or GPUs, '
                      'h100:8; its devices must fill the mesh of the config')
  parser.add_argument('--what', choices=planning.WHATS, default='train',
                      help="the training step, that of the indexers alone (warmup) or on a policy's responses (rl), or "
                      'on its batch the prefill, or one decoding step; default %(default)s')
  parser.add_argument('--efficiency', type=float, default=0.5,
                      help='share of its bfloat16 peak that a device reaches in matrix products; an assumption, '
                      'default %(default)s')
  parser.add_argument('--json', action='store_true', help='one JSON object instead of text')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if not 0 < args.efficiency <= 1:
    raise InputError(f'--efficiency {args.efficiency} must be above 0 and at most 1')
  config = load(args.config, config_args)
  planning.chip_of(args.topology)
  if not installed(target := args.topology.partition(':')[0]):
    raise InputError(f"the compiler for {target} is missing: pip install 'keye_jax[aot]'")
  found = compiled(plan_child.request(args.config, list(config_args), args.topology, args.efficiency,
                                      args.what))
  found['advice'] = advice(config, found)
  print(json.dumps(found) if args.json else text(found))
  return 0 if found['bytes']['fits'] else 1


def compiled(request: dict[str, Any]) -> dict[str, Any]:
  """What the child process found. Raises InputError for what it refuses."""
  child = subprocess.run([sys.executable, '-m', 'launch.plan_child', json.dumps(request)], capture_output=True,
                         text=True, env=os.environ | ENVIRONMENT)
  if child.returncode or not child.stdout:
    raise RuntimeError(f'the planning process ended with code {child.returncode}: {child.stderr[-2000:]}')
  found = json.loads(child.stdout)
  if 'error' in found:
    raise InputError(found['error'])
  return found


def text(found: dict[str, Any]) -> str:
  """The plan as lines for people."""
  size = found['bytes']
  mesh = ' x '.join(f'{name} {n}' for name, n in found['mesh'].items())
  rows = [f'{found["config"]} on {found["topology"]} ({found["device"]}), {found["what"]}: {mesh}, layout '
          f'{found["layout"]}', f'batch: {found["batch"]}', '', 'bytes of a device']
  rows += [f'  {name:<12} {size[name] / GIB:>9.2f} GiB' for name in PARTS if name in size]
  rows += [f'  the compiler says: {size["compiler"]}'] if 'compiler' in size else []
  rows += ['', 'largest arrays that it keeps for itself'] if found['largest'] else []
  rows += [f'  {x["bytes"] / GIB:>9.2f} GiB  {x["shape"]}  {x["op"]}' for x in found['largest']]
  rows += ['', 'implementation of each op'] + [f'  {name:<28} {how}' for name, how in found['ops'].items()]
  sent = ', '.join(f'{axis} {n / GIB:.1f} GiB' for axis, n in found['sent_bytes'].items() if n)
  rows += ['', f'a step, of one device, at {found["efficiency"]:.0%} of its peak in matrix products (assumed)',
           f'  compute_s {found["compute_s"]:>9.2f}   {found["flops"] / 1e12:,.0f} TFLOP, and up to '
           f'{found["masked_flops"] / 1e12:,.0f} TFLOP on masked places of visited tiles; '
           f'{found["compute_s_without_masked"]:.2f} s without those',
           f'  hbm_s     {found["hbm_s"]:>9.2f}   {found["hbm_bytes"] / GIB:,.0f} GiB, everything elementwise fused'
           + (f'; {found["hbm_s_without_masked"]:.2f} s when neighbouring queries select the same keys'
              if found['hbm_s_without_masked'] < found['hbm_s'] else ''),
           f'  ici_s     {found["ici_s"]:>9.2f}   {sent or "nothing sent"}',
           f'  step_s    {found["step_s"]:>9.2f}   the longest of the three, when they overlap fully',
           f'  bound     {found["model_flops_bound_s"]:>9.2f}   a bound: {found["model_flops"] / 1e12:,.0f} TFLOP of '
           'the model itself at full peak', '',
           ('fits' if size['fits'] else 'DOES NOT FIT') + f'; compiled in {size["compile seconds"]} s']
  return '\n'.join(rows + [f'- {line}' for line in found['advice']])
