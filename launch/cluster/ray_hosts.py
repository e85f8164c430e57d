"""The driver of a Ray job: reserves the hosts, starts one process of the run on each, starts all again when they fail.

`python -m launch.cluster.ray_hosts --hosts 8 --devices 8 -- keye train ...` inside a Ray cluster; with --submit it
hands the request on its standard input to the cluster at RAY_ADDRESS. Ray places the processes; that is all it does.
"""
import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from launch.cluster.job import PORT, WRONG_INPUT


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code of the run: the first of its processes' that is not 0."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--submit', action='store_true')
  parser.add_argument('--hosts', type=int, default=1)
  parser.add_argument('--devices', type=int, default=0, help='GPUs, or chips of the resource `TPU`, of each host')
  parser.add_argument('--accelerator', default='', help="Ray's accelerator_type; TPU for chips")
  parser.add_argument('--restarts', type=int, default=0)
  parser.add_argument('command', nargs='*')
  args = parser.parse_args(argv)
  if args.submit:
    from ray.job_submission import JobSubmissionClient
    print(JobSubmissionClient().submit_job(**json.load(sys.stdin)))
    return 0
  import ray
  ray.init()
  for _ in range(args.restarts + 1):
    code = run(ray, args)
    if code in (0, WRONG_INPUT):
      break
  return code


def run(ray, args) -> int:
  """Starts the processes once and waits for all of them. A host that is lost counts as exit code 1."""
  from ray.util.placement_group import placement_group, remove_placement_group
  from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
  device = 'TPU' if args.accelerator.startswith('TPU') else 'GPU'
  bundle = {'CPU': 1} | ({device: args.devices} if args.devices else {})
  group = placement_group([bundle] * args.hosts, strategy='STRICT_SPREAD')
  ray.get(group.ready())

  def on(host: int, work):
    options = {'num_cpus': 1, 'max_retries': 0, 'scheduling_strategy':
               PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=host)}
    if args.devices:
      options |= {'num_gpus': args.devices} if device == 'GPU' else {'resources': {'TPU': args.devices}}
    return ray.remote(work).options(**options)

  try:
    coordinator = f'{ray.get(on(0, address).remote())}:{PORT}'
    cluster = ray.get_runtime_context().gcs_address
    started = [on(host, start).remote(args.command, coordinator, args.hosts, host, cluster)
               for host in range(args.hosts)]
    codes = []
    for ref in started:
      try:
        codes.append(ray.get(ref))
      except ray.exceptions.RayError as e:
        print(f'{type(e).__name__}: {str(e).splitlines()[0]}', file=sys.stderr)
        codes.append(1)
    return next((code for code in codes if code), 0)
  finally:
    remove_placement_group(group)


def address() -> str:
  import ray
  return ray.util.get_node_ip_address()


def start(command: Sequence[str], coordinator: str, hosts: int, host: int, cluster: str) -> int:
  # The cluster: where a process of the run finds actors that decode for it, data.readers='ray'.
  env = dict(os.environ, KEYE_COORDINATOR=coordinator, KEYE_PROCESSES=str(hosts), KEYE_PROCESS=str(host),
             RAY_ADDRESS=cluster)
  code = subprocess.run(command, env=env).returncode
  return 128 - code if code < 0 else code


if __name__ == '__main__':
  sys.exit(main())
