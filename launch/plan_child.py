"""The compiling half of `keye plan`, in a process of its own, since the environment of a compiler for absent devices
is not that of the caller. Its argument is a JSON object of `request`; it prints one JSON object."""
import contextlib
import json
import os
import sys
from typing import Any

from data_pipelines.errors import InputError
from keye_jax import planning, sharding
from launch.run_config import load
from pallas_kernels.aot.topology import devices as absent


def request(config: str, overrides: list[str], topology: str, efficiency: float, what: str) -> dict[str, Any]:
  return dict(config=config, overrides=overrides, topology=topology, efficiency=efficiency, what=what)


def planned(config: str, overrides: list[str], topology: str, efficiency: float, what: str) -> dict[str, Any]:
  run, chip = load(config, overrides), planning.chip_of(topology)
  try:
    devices = absent(topology)
  except Exception as e:     # whatever the plugin says of a name that it does not know
    raise InputError(f'--topology {topology}: {planning.first_lines(e)}') from None
  need = run.mesh.data * run.mesh.context * run.mesh.expert
  if need != len(devices):
    raise InputError(f'mesh data x context x expert = {run.mesh.data} x {run.mesh.context} x {run.mesh.expert} is '
                     f'{need} devices, {topology} has {len(devices)}')
  sharding.use_mesh(run.mesh, devices)
  return {'config': config, 'overrides': overrides, 'topology': topology, 'device': devices[0].device_kind,
          **planning.plan(run, chip, efficiency, what)}


def main() -> None:
  answers = os.fdopen(os.dup(1), 'w')
  with contextlib.redirect_stdout(sys.stderr):           # a compiler may write to stdout
    try:
      found = planned(**json.loads(sys.argv[1]))
    except InputError as e:
      found = {'error': str(e)}
  print(json.dumps(found), file=answers, flush=True)


if __name__ == '__main__':
  main()
