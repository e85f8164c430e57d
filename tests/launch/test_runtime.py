"""Which processes a run has, from the environment; what ends them together is in tests/test_processes.py."""
import pytest

from data_pipelines.errors import InputError
from launch import runtime


@pytest.mark.parametrize('env, found', [
  ({}, None),
  ({'KEYE_COORDINATOR': 'host0:1234', 'KEYE_PROCESSES': '4', 'KEYE_PROCESS': '3'},
   {'coordinator_address': 'host0:1234', 'num_processes': 4, 'process_id': 3,
    'cluster_detection_method': 'deactivate'}),
  ({'KEYE_DISTRIBUTED': '1'}, {}),
  ({'SLURM_JOB_ID': '7', 'SLURM_STEP_NUM_TASKS': '1'}, None),
  ({'SLURM_JOB_ID': '7', 'SLURM_STEP_NUM_TASKS': '8'}, {}),
  ({'TPU_WORKER_HOSTNAMES': 'a'}, None),
  ({'TPU_WORKER_HOSTNAMES': 'a,b'}, {}),
  ({'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'cpu'}, None),
])
def test_processes_of_an_environment(env, found):
  assert runtime.processes(env) == found


@pytest.mark.parametrize('env, message', [
  ({'KEYE_PROCESSES': '4'}, "KEYE_PROCESS must be numbers: 'KEYE_PROCESS'"),
  ({'KEYE_PROCESSES': 'four', 'KEYE_PROCESS': '0'}, 'must be numbers: invalid literal'),
  ({'KEYE_PROCESSES': '4', 'KEYE_PROCESS': '4'}, 'KEYE_PROCESS=4 from 0 to KEYE_PROCESSES=4 less one'),
  ({'KEYE_COORDINATOR': 'host0', 'KEYE_PROCESSES': '4', 'KEYE_PROCESS': '0'}, 'host0 must be host:port'),
])
def test_an_environment_that_contradicts_itself(env, message):
  with pytest.raises(InputError, match=message):
    runtime.processes({'KEYE_COORDINATOR': 'host0:1234'} | env)
