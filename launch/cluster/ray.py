"""A job for Ray: a driver that puts one process on each host of a Ray cluster (ray_hosts.py).

The JSON is the body of `POST /api/jobs` and the arguments of `JobSubmissionClient.submit_job`.
https://docs.ray.io/en/latest/cluster/running-applications/job-submission/api.html
"""
import json
import shlex

from launch.cluster.job import Job

# RAY_ADDRESS names the cluster, as it does for Ray's own commands.
SUBMIT = ('python', '-m', 'launch.cluster.ray_hosts', '--submit')


def render(job: Job) -> str:
  driver = ['python', '-m', 'launch.cluster.ray_hosts', '--hosts', str(job.hosts), '--devices', str(job.devices),
            '--restarts', str(job.restarts)]
  if job.accelerator:
    driver += ['--accelerator', job.accelerator]
  request = {
      'entrypoint': shlex.join([*driver, '--', *job.command]),
      'entrypoint_num_cpus': 1,
      'runtime_env': {'image_uri': job.image} if job.image else {},
      'metadata': {'name': job.name}}
  return json.dumps(request, indent=2) + '\n'
