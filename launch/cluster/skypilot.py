"""A task for SkyPilot's managed jobs, which bring a lost node back and start the command again.

`sky jobs launch -y FILE`. https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""
import shlex

import yaml

from launch.cluster.job import AGAIN, PORT, Job

SUBMIT = ('sky', 'jobs', 'launch', '-y')


def render(job: Job) -> str:
  resources = {
      'accelerators': f'{job.accelerator}:{job.devices}' if job.devices else job.accelerator,
      'image_id': f'docker:{job.image}' if job.image else '',
      'job_recovery': {'max_restarts_on_errors': job.restarts, 'recover_on_exit_codes': list(AGAIN)}}
  run = '\n'.join([
      f'export KEYE_COORDINATOR="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"',
      'export KEYE_PROCESSES="$SKYPILOT_NUM_NODES" KEYE_PROCESS="$SKYPILOT_NODE_RANK"',
      f'exec {shlex.join(job.command)}', ''])
  task = {'name': job.name, 'num_nodes': job.hosts, 'resources': {k: v for k, v in resources.items() if v}, 'run': run}
  return yaml.safe_dump(task, sort_keys=False, width=120)
