"""A batch script for Slurm: one task a host, started again by --requeue until the run has ended.

`sbatch`, the script on its standard input. With containers (--image) through pyxis.
https://slurm.schedmd.com/sbatch.html
"""
import shlex

from launch.cluster.job import GRACE_SECONDS, PORT, WRONG_INPUT, Job

SUBMIT = ('sbatch',)


def render(job: Job) -> str:
  gpus = f'{job.accelerator}:{job.devices}' if job.accelerator else str(job.devices)
  options = {
      'job-name': job.name, 'nodes': job.hosts, 'ntasks-per-node': 1, 'exclusive': None,
      'gpus-per-node': gpus if job.devices else '',
      'partition': job.queue, 'output': '%x-%j.log', 'open-mode': 'append', 'requeue': None,
      'signal': f'TERM@{GRACE_SECONDS}'}
  lines = [f'#SBATCH --{name}' + ('' if value is None else f'={value}')
           for name, value in options.items() if value != '']
  container = f' --container-image={shlex.quote(job.image)}' if job.image else ''
  command = shlex.quote(f'export KEYE_PROCESS=$SLURM_PROCID; exec {shlex.join(job.command)}')
  return '\n'.join([
      '#!/bin/bash', *lines, '',
      'set -u',
      f'export KEYE_COORDINATOR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{PORT}"',
      'export KEYE_PROCESSES="$SLURM_NNODES"',
      '# A host that fails takes its step down; the others then end by themselves.',
      f'srun --kill-on-bad-exit=0{container} bash -c {command}',
      'code=$?',
      f'# {WRONG_INPUT}: wrong input, which stays wrong. Anything else goes on from the last checkpoint.',
      f'if [ "$code" -ne 0 ] && [ "$code" -ne {WRONG_INPUT} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; '
      'then',
      '  scontrol requeue "$SLURM_JOB_ID"',
      'fi',
      'exit "$code"', ''])
