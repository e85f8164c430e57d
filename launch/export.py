"""`keye export`: a run, or any model that loads, as a complete Hugging Face folder."""
import argparse
import json
import os
from collections.abc import Sequence

from data_pipelines.errors import InputError
from keye_jax import adapters, api, run_folder
from keye_jax.hf import names, peft, writer
from keye_jax.hf.card import Card
from keye_jax.hf.config import read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, help='run folder, Hugging Face folder, or Llama GGUF file')
  parser.add_argument('--out', required=True, help='folder to write; must not exist')
  parser.add_argument('--adapter', action='store_true', help='of a run with adapters those alone, as PEFT stores them; '
                      'without this they are merged into the base')
  parser.add_argument('--format', choices=names.FORMATS, help='default: the one that holds the model')
  parser.add_argument('--dtype', choices=('bfloat16', 'float32'), default='bfloat16', help='of the stored weights')
  parser.add_argument('--shard-bytes', type=int, default=writer.SHARD_BYTES, help='largest shard')
  parser.add_argument('--title', default='', help='of the model card')
  parser.add_argument('--made', default='', help='how the model was made, for the card')
  parser.add_argument('--scores', default='', help='JSON file {name: number} for the card')
  parser.add_argument('--licence', default='', help='Hub licence id for the card; without it a placeholder is written')
  parser.add_argument('--json', action='store_true', help='one JSON object instead of text')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'keye export takes no {config_args[0]}; what a model looks like is in its folder')
  scores = read_json(args.scores) if args.scores else None
  if bad := [k for k, v in (scores or {}).items() if not isinstance(v, int | float)]:
    raise InputError(f'{args.scores}: {bad[0]!r} is not a number')
  if os.path.exists(args.out):
    raise InputError(f'{args.out}: already exists; remove it or export to another folder')
  if args.adapter:
    return adapter(args)
  # weights are read in the precision that they are written in, so nothing is rounded on the way
  model, params = api.load_pretrained(args.model, args.dtype)
  card = Card(args.title, args.made or f'Exported from {args.model}.', scores, '', args.licence)
  fmt = args.format or api.default_format(model.config)
  writer.export(args.out, model.config, params, model.tokenizer, fmt, model.data, args.dtype, card, args.shard_bytes)
  size = sum(e.stat().st_size for e in os.scandir(args.out))
  facts = {'folder': args.out, 'format': fmt, 'dtype': args.dtype, 'bytes': size, 'files': sorted(os.listdir(args.out))}
  print(json.dumps(facts) if args.json else
        f'{args.out}: {fmt}, {args.dtype}, {size / 1e6:.1f} MB in {len(facts["files"])} files')
  return 0


def adapter(args: argparse.Namespace) -> int:
  """Writes the PEFT folder. Its weights are float32, as they are trained."""
  config = run_folder.read_config(args.model)
  if not config.lora.targets:
    raise InputError(f'{args.model}: was trained without adapters; leave out --adapter')
  own = adapters.trained(args.model, config, config.model)
  fmt = args.format or api.default_format(config.model)
  peft.export(args.out, config, own.params, fmt, own.host['base']['path'])
  facts = {'folder': args.out, 'format': fmt, 'rank': config.lora.rank, 'base': own.host['base']['path'],
           'files': sorted(os.listdir(args.out))}
  print(json.dumps(facts) if args.json else f'{args.out}: adapters of rank {config.lora.rank} for {facts["base"]}')
  return 0
