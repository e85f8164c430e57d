"""What `keye launch` renders, against the fields that the engines' own schemas know and require."""
import json
import os
import pathlib
import shlex
import stat
import subprocess
import sys
import types

import pytest
import yaml

from launch import cli
from launch.cluster import ray_hosts

TRAIN = ['train', '--config', 'configs/sft.py:30b', '--out', '/runs/a', '--config.data.path=/data/a b.jsonl']
TPU = ['--accelerator', 'tpu-v5p-slice', '--topology', '4x4x8', '--image', 'example.org/keye:1']
GPU = ['--hosts', '8', '--devices', '8', '--accelerator', 'h100']

# {key: (type, required)}: what a dict may hold, of the JobSet v1alpha2 CRD, the Kubernetes Job and Pod API, SkyPilot's
# get_task_schema and get_resources_schema, and Ray's JobSubmitRequest. A nested dict is a nested object.
META = {'name': (str, True), 'labels': (dict, False), 'annotations': (dict, False), 'namespace': (str, False)}
ENV = [{'name': (str, True), 'value': (str, False), 'valueFrom': (dict, False)}]
CONTAINER = {'name': (str, True), 'image': (str, True), 'command': (list, False), 'env': ENV, 'resources': (dict, True),
             'ports': [{'containerPort': (int, True)}], 'securityContext': (dict, False),
             'volumeMounts': [{'name': (str, True), 'mountPath': (str, True)}]}
POD = {'restartPolicy': (str, True), 'terminationGracePeriodSeconds': (int, False), 'nodeSelector': (dict, False),
       'tolerations': (list, False), 'containers': [CONTAINER], 'volumes': (list, False)}
JOB = {'parallelism': (int, True), 'completions': (int, True), 'completionMode': (str, True),
       'backoffLimit': (int, True),
       'podFailurePolicy': {'rules': [{'action': (str, True), 'onExitCodes': {
           'containerName': (str, False), 'operator': (str, True), 'values': (list, True)}}]},
       'template': {'spec': POD}}
JOBSET = {'apiVersion': (str, True), 'kind': (str, True), 'metadata': META, 'spec': {
    'network': {'enableDNSHostnames': (bool, False), 'subdomain': (str, False),
                'publishNotReadyAddresses': (bool, False)},
    'failurePolicy': {'maxRestarts': (int, False), 'rules': [
        {'name': (str, True), 'action': (str, True), 'onJobFailureReasons': (list, False)}]},
    'replicatedJobs': [{'name': (str, True), 'replicas': (int, False), 'template': {'spec': JOB}}]}}
SKY = {'name': (str, False), 'num_nodes': (int, False), 'run': (str, False), 'resources': {
    'accelerators': (str, False), 'image_id': (str, False), 'job_recovery': {
        'strategy': (str, False), 'max_restarts_on_errors': (int, False), 'recover_on_exit_codes': (list, False)}}}
RAY = {'entrypoint': (str, True), 'entrypoint_num_cpus': ((int, float), False), 'runtime_env': (dict, False),
       'metadata': (dict, False), 'submission_id': (str, False)}


def conform(value, schema, at=''):
  """Asserts that a value has the schema's required fields, of its types, and no field that it does not know."""
  if isinstance(schema, list):
    assert isinstance(value, list) and value, at
    for i, item in enumerate(value):
      conform(item, schema[0], f'{at}[{i}]')
  elif isinstance(schema, dict):
    assert isinstance(value, dict), at
    assert not (unknown := value.keys() - schema.keys()), f'{at}: {unknown}'
    for key, inner in schema.items():
      if key in value:
        conform(value[key], inner, f'{at}.{key}')
      else:
        assert isinstance(inner, tuple) and not inner[1] or isinstance(inner, list | dict), f'{at}.{key} is missing'
  else:
    assert isinstance(value, schema[0]), f'{at}: {value!r}'


def rendered(capsys, *args, command=TRAIN):
  code = cli.main(['launch', *args, '--dry-run', '--', *command])
  out, err = capsys.readouterr()
  assert code == 0, err
  return out


def test_the_check_itself_sees_faults():
  good = {'name': 'a', 'num_nodes': 2}
  conform(good, SKY)
  for bad in ({'name': 3}, {'nodes': 2}, {'resources': {'gpus': 1}}):
    with pytest.raises(AssertionError):
      conform(good | bad, SKY)
  with pytest.raises(AssertionError):
    conform({'metadata': {}}, RAY)


def test_gke_tpu(capsys):
  jobset = yaml.safe_load(rendered(capsys, '--target', 'gke', *TPU))
  conform(jobset, JOBSET)
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert jobset['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'multislice-queue'}
  (replicated,) = jobset['spec']['replicatedJobs']
  child = replicated['template']['spec']
  pod = child['template']['spec']
  (container,) = pod['containers']
  assert child['parallelism'] == child['completions'] == 32 and child['backoffLimit'] == 0     # 128 chips, 4 a host
  assert child['completionMode'] == 'Indexed' and pod['restartPolicy'] == 'Never'
  assert container['resources'] == {'limits': {'google.com/tpu': 4}}
  assert pod['nodeSelector'] == {'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
                                 'cloud.google.com/gke-tpu-topology': '4x4x8'}
  env = {e['name']: e.get('value') for e in container['env']}
  assert env == {'KEYE_COORDINATOR': 'keye-slice-job-0-0.keye:8476', 'KEYE_PROCESSES': '32', 'KEYE_PROCESS': None}
  assert jobset['spec']['network']['subdomain'] == 'keye' and replicated['name'] == 'slice-job'
  words = shlex.split(container['command'][-1])
  assert container['command'][:2] == ['bash', '-c'] and words == ['exec', 'keye', *TRAIN]
  # Wrong input fails the child job with this reason, and the reason fails the set.
  assert child['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [2]
  assert jobset['spec']['failurePolicy']['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']


def test_gke_gpu(capsys):
  jobset = yaml.safe_load(rendered(capsys, '--target', 'gke', *GPU, '--image', 'i', '--queue', 'q', '--restarts', '3'))
  conform(jobset, JOBSET)
  child = jobset['spec']['replicatedJobs'][0]['template']['spec']
  assert child['parallelism'] == 8 and jobset['spec']['failurePolicy']['maxRestarts'] == 3
  assert child['template']['spec']['containers'][0]['resources'] == {'limits': {'nvidia.com/gpu': 8}}


SLURM = {'job-name', 'nodes', 'ntasks-per-node', 'exclusive', 'gpus-per-node', 'partition', 'output', 'open-mode',
         'requeue', 'signal'}


def test_slurm_script_starts_one_process_a_host_and_asks_for_another_try(capsys, tmp_path):
  """Runs the script with stand-ins for srun and scontrol."""
  script = rendered(capsys, '--target', 'slurm', *GPU, '--queue', 'big',
                    command=['train', '--config', 'a b.py', '--out', "o'ut"])
  options = dict(line.removeprefix('#SBATCH --').partition('=')[::2] for line in script.splitlines()
                 if line.startswith('#SBATCH'))
  assert options.keys() == SLURM
  assert (options['nodes'], options['ntasks-per-node'], options['gpus-per-node']) == ('8', '1', 'h100:8')
  assert options['partition'] == 'big' and options['signal'] == 'TERM@300'
  log = tmp_path / 'log'
  tool(tmp_path / 'scontrol', f'[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" >> {log}')
  tool(tmp_path / 'srun', 'shift; SLURM_PROCID=1 exec "$@"')
  tool(tmp_path / 'keye', f'echo "$KEYE_COORDINATOR $KEYE_PROCESSES $KEYE_PROCESS: $@" >> {log}; exit $CODE')
  env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_JOB_NODELIST='n[1-2]', SLURM_NNODES='2',
             SLURM_JOB_ID='77')
  said = 'n1:8476 2 1: train --config a b.py --out o\'ut\n'
  for code, restarted, expected in ((0, '', ''), (2, '', ''), (75, '', 'requeue 77\n'), (75, '10', '')):
    log.write_text('')
    done = subprocess.run(['bash', '-c', script], env=env | {'CODE': str(code), 'SLURM_RESTART_COUNT': restarted})
    assert done.returncode == code and log.read_text() == said + expected


def tool(path: pathlib.Path, body: str):
  path.write_text(f'#!/bin/bash\n{body}\n')
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_skypilot_task_tells_each_node_who_it_is(capsys, tmp_path):
  task = yaml.safe_load(rendered(capsys, '--target', 'skypilot', '--hosts', '2', '--accelerator', 'H100', '--devices',
                                 '8', '--image', 'example.org/keye:1'))
  conform(task, SKY)
  assert task['num_nodes'] == 2 and task['resources']['accelerators'] == 'H100:8'
  codes = task['resources']['job_recovery']['recover_on_exit_codes']
  assert 2 not in codes and {75, 143} <= set(codes)
  tool(tmp_path / 'keye', 'echo "$KEYE_COORDINATOR $KEYE_PROCESSES $KEYE_PROCESS $1"')
  env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
         'SKYPILOT_NUM_NODES': '2', 'SKYPILOT_NODE_RANK': '1'}
  done = subprocess.run(['bash', '-c', task['run']], env=env, capture_output=True, text=True)
  assert done.stdout == '10.0.0.1:8476 2 1 train\n', done.stderr


def test_ray_request_runs_the_driver(capsys):
  request = json.loads(rendered(capsys, '--target', 'ray', '--hosts', '2', '--devices', '8', '--restarts', '4'))
  conform(request, RAY)
  words = shlex.split(request['entrypoint'])
  assert words[:3] == ['python', '-m', 'launch.cluster.ray_hosts'] and words[words.index('--') + 1:] == ['keye', *TRAIN]


def fake_ray(monkeypatch, codes):
  """The few names of Ray that the driver uses, run in place; returns the started processes' (host, environment)."""
  started, groups = [], []

  class Remote:
    def __init__(self, work, strategy=None):
      self.work, self.strategy = work, strategy

    def options(self, scheduling_strategy, **_):
      return Remote(self.work, scheduling_strategy)

    def remote(self, *args):
      if self.work is ray_hosts.address:
        return f'10.0.0.{self.strategy["placement_group_bundle_index"]}'
      started.append((self.strategy['placement_group_bundle_index'], args))
      return codes.pop(0)

  class Group:
    def ready(self):
      return self
  ray = types.ModuleType('ray')
  ray.init, ray.get, ray.remote = lambda: None, lambda ref: ref, Remote
  ray.get_runtime_context = lambda: types.SimpleNamespace(gcs_address='10.0.0.9:6379')
  ray.exceptions = types.SimpleNamespace(RayError=RuntimeError)
  groups_module, strategies = types.ModuleType('g'), types.ModuleType('s')
  groups_module.placement_group = lambda bundles, strategy: groups.append((bundles, strategy)) or Group()
  groups_module.remove_placement_group = lambda group: None
  strategies.PlacementGroupSchedulingStrategy = dict
  monkeypatch.setitem(sys.modules, 'ray', ray)
  monkeypatch.setitem(sys.modules, 'ray.util', types.ModuleType('ray.util'))
  monkeypatch.setitem(sys.modules, 'ray.util.placement_group', groups_module)
  monkeypatch.setitem(sys.modules, 'ray.util.scheduling_strategies', strategies)
  return started, groups


def test_ray_driver_starts_a_process_on_each_host_and_all_again_after_a_failure(monkeypatch):
  started, groups = fake_ray(monkeypatch, [75, 143, 0, 0])
  argv = ['--hosts', '2', '--devices', '8', '--restarts', '5', '--', 'keye', 'train', '--out', 'x']
  assert ray_hosts.main(argv) == 0
  command = ['keye', 'train', '--out', 'x']
  assert started == [(host, (command, '10.0.0.0:8476', 2, host, '10.0.0.9:6379')) for host in (0, 1)] * 2
  assert groups == [([{'CPU': 1, 'GPU': 8}] * 2, 'STRICT_SPREAD')] * 2
  started, _ = fake_ray(monkeypatch, [2, 2])
  assert ray_hosts.main(argv) == 2 and len(started) == 2            # wrong input stays wrong


def test_ray_host_runs_the_command_with_its_place(tmp_path):
  names = 'KEYE_PROCESS', 'KEYE_PROCESSES', 'RAY_ADDRESS'
  code = f'import os, sys; sys.exit(7 * ([os.environ[name] for name in {names}] == ["1", "2", "r:2"]))'
  assert ray_hosts.start([sys.executable, '-c', code], 'h:1', 2, 1, 'r:2') == 7
  assert ray_hosts.start(['bash', '-c', 'kill -9 $$'], 'h:1', 2, 1, 'r:2') == 137


@pytest.mark.parametrize('args, message', [
  (['--target', 'gke', '--topology', '4x4', '--accelerator', 'a'], 'gke needs --image'),
  (['--target', 'gke', '--topology', '3x1', *TPU[:2], *TPU[4:]], '3 chips are no whole number of hosts with 4 chips'),
  (['--target', 'gke', '--topology', '4by4', *TPU[:2], *TPU[4:]], 'write chips by axis'),
  (['--target', 'gke', '--hosts', '3', *TPU], 'a slice of 4x4x8 has 32 hosts with 4 chips'),
  (['--target', 'slurm', '--topology', '4x4'], '--topology is for gke'),
  (['--target', 'slurm'], '--hosts must be given'),
  (['--target', 'slurm', '--hosts', '2', '--name', 'Big_Run'], '--name Big_Run'),
])
def test_arguments_that_contradict_end_in_a_line(args, message, capsys):
  assert cli.main(['launch', *args, '--dry-run', '--', *TRAIN]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1


@pytest.mark.parametrize('command, message', [
  (['trian'], "runs a command such as train, not 'trian'"),
  (['train', '--out', 'x'], 'keye train: the following arguments are required: --config'),
  (['train', '--config', 'a.py', '--out', 'x', '--stepz', '3'], 'keye train: unrecognized argument: --stepz'),
])
def test_a_command_that_the_hosts_would_refuse_is_refused_here(command, message, capsys):
  assert cli.main(['launch', '--target', 'slurm', '--hosts', '2', '--dry-run', '--', *command]) == 2
  assert message in capsys.readouterr().err


def test_without_dry_run_the_engines_client_gets_it(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  args = ['launch', '--target', 'slurm', '--hosts', '2', '--', *TRAIN]
  assert cli.main(args) == 2 and 'sbatch: not found' in capsys.readouterr().err
  tool(tmp_path / 'sbatch', f'cat > {tmp_path}/got; exit 3')
  assert cli.main(args) == 3
  assert (tmp_path / 'got').read_text() == rendered(capsys, *args[1:5])
  tool(tmp_path / 'sky', f'[ "$1 $2 $3" = "jobs launch -y" ] && cp "$4" {tmp_path}/got')
  args[2] = 'skypilot'
  assert cli.main(args) == 0 and yaml.safe_load((tmp_path / 'got').read_text())['num_nodes'] == 2
