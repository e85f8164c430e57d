"""What a process sets up once, before it touches a device: the processes of the run and the mesh."""
import os
from collections.abc import Mapping

import absl.logging
import jax

from data_pipelines.errors import InputError
from keye_jax import sharding
from keye_jax.config import MeshConfig
from launch import together

# Set by whoever starts the processes of one run; `keye launch` does.
COORDINATOR, PROCESSES, PROCESS = 'KEYE_COORDINATOR', 'KEYE_PROCESSES', 'KEYE_PROCESS'
DISTRIBUTED = 'KEYE_DISTRIBUTED'


def start(name: str, mesh: MeshConfig | None = None) -> None:
  """jax.distributed when there are several processes, and the mesh.

  name: of the command. mesh: None or 1 x 1 x 1 runs as a plain program on the first device. Raises InputError when the
  environment contradicts itself, the other processes do not come, or the devices do not fill the mesh.
  """
  absl.logging.set_verbosity(absl.logging.FATAL)     # Orbax logs a traceback for what we report in one line
  found = processes(os.environ)
  if found is not None:
    together.end_aborts_in_words(name)
    try:
      jax.distributed.initialize(**found)
    except (RuntimeError, ValueError) as e:
      where = found.get('coordinator_address', 'the cluster')
      raise InputError(f'the processes of the run did not come together at {where}: '
                       f'{" ".join(str(e).split())[:300]}') from None
  if mesh is None or mesh == MeshConfig():
    if jax.process_count() > 1:
      raise InputError(f'mesh: 1 x 1 x 1 is one device for {jax.process_count()} processes; set --config.mesh.data')
  else:
    try:
      sharding.use_mesh(mesh)
    except ValueError as e:
      raise InputError(str(e)) from None


def processes(env: Mapping[str, str]) -> dict | None:
  """Arguments of jax.distributed.initialize, {} where jax finds them itself, None for a run of one process.

  KEYE_COORDINATOR=host:port with KEYE_PROCESSES and KEYE_PROCESS names the processes. Else jax finds them: in a Slurm
  step of several tasks, on a TPU slice of several hosts as GKE describes it (TPU_WORKER_HOSTNAMES), and, on TPU VMs and
  wherever else, when KEYE_DISTRIBUTED is set. Raises InputError naming the variable that is missing or no number.
  """
  if env.get(COORDINATOR):
    try:
      count, index = int(env[PROCESSES]), int(env[PROCESS])
    except (KeyError, ValueError) as e:
      raise InputError(f'{COORDINATOR} is set, so {PROCESSES} and {PROCESS} must be numbers: {e}') from None
    if ':' not in env[COORDINATOR] or not 0 <= index < count:
      raise InputError(f'{COORDINATOR}={env[COORDINATOR]} must be host:port, and {PROCESS}={index} from 0 to '
                       f'{PROCESSES}={count} less one')
    # Without detection: Slurm's would give each process the device of its number on the host, and no other.
    return {'coordinator_address': env[COORDINATOR], 'num_processes': count, 'process_id': index,
            'cluster_detection_method': 'deactivate'}
  steps = int(env.get('SLURM_STEP_NUM_TASKS', '1') or 1)
  hosts = env.get('TPU_WORKER_HOSTNAMES', '').split(',')
  tpu = len(hosts) > 1 and 'cpu' not in env.get('JAX_PLATFORMS', '')
  return {} if env.get(DISTRIBUTED) or steps > 1 or tpu else None
