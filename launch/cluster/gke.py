"""A JobSet for Kubernetes, queued by Kueue when the cluster has it: what xpk makes, without xpk.

`kubectl apply -f -`. On a cluster made by `xpk cluster create` the queue is `multislice-queue`, the default here.
https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
"""
import shlex

import yaml

from launch.cluster.job import GRACE_SECONDS, PORT, WRONG_INPUT, Job

QUEUE = 'multislice-queue'
JOB = 'slice-job'
SUBMIT = ('kubectl', 'apply', '-f', '-')


def render(job: Job) -> str:
  tpu = bool(job.topology)
  resource = 'google.com/tpu' if tpu else 'nvidia.com/gpu'
  selector = ({'cloud.google.com/gke-tpu-accelerator': job.accelerator, 'cloud.google.com/gke-tpu-topology':
               job.topology} if tpu else {'cloud.google.com/gke-accelerator': job.accelerator})
  index = {'fieldRef': {'fieldPath': "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
  pod = {
      'restartPolicy': 'Never',
      'terminationGracePeriodSeconds': GRACE_SECONDS,
      'nodeSelector': selector,
      'tolerations': [{'key': resource, 'operator': 'Exists', 'effect': 'NoSchedule'}],
      'containers': [{
          'name': 'keye',
          'image': job.image,
          # exec: the signal reaches the run, not a shell
          'command': ['bash', '-c', f'exec {shlex.join(job.command)}'],
          'env': [{'name': 'KEYE_COORDINATOR', 'value': f'{job.name}-{JOB}-0-0.{job.name}:{PORT}'},
                  {'name': 'KEYE_PROCESSES', 'value': str(job.hosts)},
                  {'name': 'KEYE_PROCESS', 'valueFrom': index}],
          'ports': [{'containerPort': PORT}],
          'resources': {'limits': {resource: job.devices}},
          'securityContext': {'privileged': True},
          'volumeMounts': [{'name': 'shm', 'mountPath': '/dev/shm'}],        # data workers hand batches over in it
      }],
      'volumes': [{'name': 'shm', 'emptyDir': {'medium': 'Memory'}}],
  }
  child = {
      'parallelism': job.hosts, 'completions': job.hosts, 'completionMode': 'Indexed', 'backoffLimit': 0,
      'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
          'containerName': 'keye', 'operator': 'In', 'values': [WRONG_INPUT]}}]},
      'template': {'spec': pod},
  }
  jobset = {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2',
      'kind': 'JobSet',
      'metadata': {
          'name': job.name,
          'labels': {'kueue.x-k8s.io/queue-name': job.queue or QUEUE},
          'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}},
      'spec': {
          'network': {'enableDNSHostnames': True, 'subdomain': job.name, 'publishNotReadyAddresses': True},
          'failurePolicy': {
              'maxRestarts': job.restarts,
              # Wrong input stays wrong: the pods' policy above ends the child job, and that ends the set.
              'rules': [{'name': 'wronginput', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]},
          'replicatedJobs': [{'name': JOB, 'replicas': 1, 'template': {'spec': child}}]},
  }
  return yaml.safe_dump(jobset, sort_keys=False, width=120)
