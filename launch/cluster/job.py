"""A run as the cluster files describe it: one process a host, all with the same command, told who they are by
KEYE_COORDINATOR, KEYE_PROCESSES and KEYE_PROCESS (launch/runtime.py).

Exit codes decide whether to start again: 2 is wrong input, which stays wrong; anything else goes on from the last
checkpoint with the same command.
"""
import dataclasses
import math

from data_pipelines.errors import InputError

PORT = 8476              # of the coordinator, on the host of process 0
WRONG_INPUT = 2
AGAIN = (1, 75, 130, 137, 143)        # a bug or lost device, a lost process, SIGINT, SIGKILL, SIGTERM
GRACE_SECONDS = 300      # between SIGTERM and SIGKILL: the step under way ends, and a checkpoint is written


@dataclasses.dataclass(frozen=True)
class Job:
  name: str
  command: tuple[str, ...]      # 'keye', 'train', ...
  hosts: int                    # of one slice
  devices: int                  # chips or GPUs of one host
  accelerator: str              # the target's name for it; '' for its default
  topology: str                 # of a TPU slice, '4x4x8'; '' elsewhere
  image: str                    # container; '' where the target runs without
  queue: str                    # Kueue's LocalQueue or Slurm's partition; '' for the default
  restarts: int


def tpu_hosts(topology: str, devices: int) -> int:
  """Hosts of a slice. Raises InputError when the topology is not written as 4x4 or 4x4x8, or is no whole hosts."""
  try:
    chips = math.prod(int(n) for n in topology.split('x'))
  except ValueError:
    raise InputError(f'--topology {topology}: write chips by axis, as in 4x4 or 4x4x8') from None
  if chips < 1 or chips % devices:
    raise InputError(f'--topology {topology}: {chips} chips are no whole number of hosts with {devices} chips each')
  return chips // devices
