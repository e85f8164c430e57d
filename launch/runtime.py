"""What a process sets up once, before it touches a device: the processes of the run and the mesh."""
import os

import absl.logging
import jax

from data_pipelines.errors import InputError
from keye_jax import sharding
from keye_jax.config import MeshConfig

# Set by whoever starts the processes of one run; Slurm, Kubernetes and TPU pods are found without it.
COORDINATOR, PROCESSES, PROCESS = 'KEYE_COORDINATOR', 'KEYE_PROCESSES', 'KEYE_PROCESS'


def start(mesh: MeshConfig | None = None) -> None:
  """jax.distributed when the environment says that there are several processes, and the mesh.

  mesh: None or 1 x 1 x 1 runs as a plain program on the first device. KEYE_COORDINATOR=host:port with KEYE_PROCESSES
  and KEYE_PROCESS names the processes of a run; KEYE_DISTRIBUTED=1 lets jax find them in the cluster's environment.
  Raises InputError when the devices do not fill the mesh.
  """
  absl.logging.set_verbosity(absl.logging.FATAL)     # Orbax logs a traceback for what we report in one line
  if os.environ.get(COORDINATOR):
    try:
      jax.distributed.initialize(os.environ[COORDINATOR], int(os.environ[PROCESSES]), int(os.environ[PROCESS]))
    except (KeyError, ValueError) as e:
      raise InputError(f'{COORDINATOR} is set, so {PROCESSES} and {PROCESS} must be numbers: {e}') from None
  elif os.environ.get('KEYE_DISTRIBUTED'):
    jax.distributed.initialize()
  if mesh is None or mesh == MeshConfig():
    if jax.process_count() > 1:
      raise InputError(f'mesh: 1 x 1 x 1 is one device for {jax.process_count()} processes; set --config.mesh.data')
  else:
    try:
      sharding.use_mesh(mesh)
    except ValueError as e:
      raise InputError(str(e)) from None
