"""`keye train`: pre-training and fine-tuning of a model from a config.

Everything goes to the run folder: config.json, checkpoints, metrics.jsonl and TensorBoard files. The same command
again goes on from the newest whole checkpoint and reaches the same losses as a run that was never stopped. SIGTERM and
Ctrl-C save first; the exit code is then 143 or 130, so that a scheduler knows to start it again.
"""
import argparse
import json
import signal
from collections.abc import Sequence

from launch.run_config import HELP, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, help=HELP)
  parser.add_argument('--out', required=True, help='run folder; made if missing, continued if it holds checkpoints')
  parser.add_argument('--wandb', default='', metavar='PROJECT', help='also log to Weights & Biases')
  parser.add_argument('--profile', action='store_true', help='write a trace of three steps to OUT/profile')
  parser.add_argument('--json', action='store_true', help='one JSON object on stdout instead of the table')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  config = load(args.config, config_args)

  # After the config: a misspelt key or --help must not wait for jax.
  from keye_jax import loop, metrics
  from launch import runtime, together
  runtime.start('train', config.mesh)

  def work() -> int:
    result = loop.train(config, args.out, args.wandb, args.profile)
    if metrics.is_writer():
      print(json.dumps(result.summary) if args.json else metrics.table(result.summary), flush=True)
    metrics.say(ending(result, config.train.steps))
    return 128 + result.stopped_by if result.stopped_by else 0

  return together.run('train', work)


def ending(result, steps: int) -> str:
  """The last line: how the run ended."""
  if result.stopped_by:
    return (f'stopped by {signal.Signals(result.stopped_by).name} after step {result.step} of {steps}, saved; the same '
            'command goes on')
  return f'done: step {result.step} of {steps}, saved'
