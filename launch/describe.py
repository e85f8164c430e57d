"""`keye describe`: what a config builds, in numbers, without allocating a weight."""
import argparse
import json
from collections.abc import Sequence

from keye_jax import api
from keye_jax.hf import names
from keye_jax.nn import counts
from launch.run_config import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, help='FILE or FILE:VARIANT, e.g. configs/keye_vl_2_30b_a3b.py')
  parser.add_argument('--length', type=int, help='tokens of the sequence that FLOPs are averaged over; default: the '
                      'longest of the model')
  parser.add_argument('--names', action='store_true', help='list the tensors of an exported checkpoint instead')
  parser.add_argument('--format', choices=names.FORMATS, help='of --names; default: the one that holds the model')
  parser.add_argument('--json', action='store_true', help='one JSON object instead of text')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  config = load(args.config, config_args).model
  if args.names:
    tensors = names.table(config, args.format or api.default_format(config))
    print(json.dumps({t.name: t.shape for t in tensors}) if args.json else
          '\n'.join(f'{t.name}\t{",".join(map(str, t.shape))}' for t in tensors))
    return 0
  facts = counts.describe(config, args.length)
  print(json.dumps(facts) if args.json else text(facts))
  return 0


def text(facts: dict) -> str:
  """The facts as lines for people."""
  def rows(title, parts, unit):
    return [title, *(f'  {name:<20} {unit(value):>20}' for name, value in parts.items())]

  count, giga, gib = (lambda n: f'{n:,}'), (lambda n: f'{n / 1e9:,.3f} GFLOP'), (lambda n: f'{n / 2**30:,.2f} GiB')
  length = facts['length']
  return '\n'.join([
      *rows(f'parameters  {facts["parameters"]:,}', facts['parameters_by_part'], count),
      *rows('bytes of the parameters', facts['bytes_by_part'], gib),
      *rows(f'active a text token  {facts["active_parameters"]:,}', facts['active_by_part'], count),
      *rows(f'forward, mean of a token of {length:,}', facts['flops_per_token'], giga),
      *rows('cache, bytes a token', facts['cache_bytes_per_token'], count),
      *rows(f'cache of {length:,} tokens', {k: n * length for k, n in facts['cache_bytes_per_token'].items()}, gib)])
