"""`keye assemble`: a Qwen3 language model and a vision tower as the Keye that pre-training begins with.

The language model and the tower are copied as they are, tensor by tensor; projector and indexers are random, and the
vocabulary grows when the tokenizer lacks special tokens of Keye and the embedding has no rows to spare. What is new is
listed. The folder is where stage 0 starts: `--config configs/pretrain.py:30b,stage=0 --config.train.init=OUT`.
"""
import argparse
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines import tokenizer
from data_pipelines.errors import InputError
from keye_jax import begin, checkpoint, run_folder
from keye_jax.config import DataConfig, IndexerConfig, ModelConfig, TextConfig, VisionConfig
from keye_jax.hf import names, reader, siglip, writer
from keye_jax.hf.card import Card
from keye_jax.nn import contrast


def add_arguments(parser: argparse.ArgumentParser) -> None:
  published = IndexerConfig()
  parser.add_argument('--lm', required=True, help='Hugging Face folder of a Qwen3-MoE or Qwen3')
  parser.add_argument('--vit', required=True, help='folder of a SigLIP, such as siglip-so400m-patch14-384, '
                      'or the run folder of the stage vit')
  parser.add_argument('--out', required=True, help='folder to write; must not exist')
  parser.add_argument('--indexer-heads', type=int, default=16)
  parser.add_argument('--indexer-dim', type=int, default=published.head_dim, help='width of one indexer head')
  parser.add_argument('--topk', type=int, default=published.topk, help='keys that a query attends to')
  parser.add_argument('--seed', type=int, default=0, help='of the random weights')
  parser.add_argument('--dtype', choices=tuple(reader.DTYPES), default='bfloat16', help='of the stored weights')
  parser.add_argument('--shard-bytes', type=int, default=writer.SHARD_BYTES, help='largest shard; one is in memory')
  parser.add_argument('--json', action='store_true', help='one JSON object instead of text')


class Halves(NamedTuple):
  """The two folders, their headers read and checked, and the model that they make."""
  model: ModelConfig
  words: tokenizer.Tokenizer
  specials: list[str]                  # tokens that the language model's tokenizer lacked
  rows: int                            # of the language model's embedding
  known: int                           # ids that its tokenizer uses
  params: dict[str, Any]               # path -> reader.Unread
  left: list[str]                      # what the vision folder holds and Keye has no place for


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'keye assemble takes no {config_args[0]}; the shapes are those of the folders')
  if os.path.exists(args.out):
    raise InputError(f'{args.out}: already exists; remove it or assemble in another folder')
  halves = open_halves(args.lm, args.vit, IndexerConfig(args.indexer_heads, args.indexer_dim, args.topk))
  new = new_params(halves, args.seed)
  params = grown(halves) | new
  lm, vit = (os.path.basename(os.path.normpath(folder)) for folder in (args.lm, args.vit))
  card = Card(made=f'Assembled from the language model {lm} and the vision tower {vit}; projector and indexers are '
                   'random: it has to be trained.')
  writer.export(args.out, halves.model, params, halves.words, 'keye', DataConfig(), args.dtype, card, args.shard_bytes)
  facts = report(args.out, halves, new)
  print(json.dumps(facts) if args.json else text(facts))
  return 0


def open_halves(lm: str, vit: str, indexer: IndexerConfig) -> Halves:
  """Reads configs and headers. Raises InputError naming the folder, key or tensor that does not fit."""
  model, fmt, _ = reader.read_config(lm)
  if fmt not in ('qwen3_moe', 'qwen3'):
    raise InputError(f'{lm}: holds a {fmt} model; a Keye is made from a qwen3_moe or qwen3')
  source = reader.open_folder(lm)
  lm_table = names.table(model, fmt, names.expert_layout(model, fmt, source.shapes))
  reader.check(lm_table, source)
  vision, tower, left = open_tower(vit)
  old = tokenizer.load(lm)
  words, specials = tokenizer.with_specials(old)
  whole = together(model.text, vision, indexer, words.size)
  params = writer.flatten(reader.build(lm_table, source, place=reader.leave)) | tower(whole)
  return Halves(whole, words, specials, model.text.vocab, old.size, params, left)


def open_tower(folder: str) -> tuple[VisionConfig, Callable[[ModelConfig], dict[str, Any]], list[str]]:
  """(config, whole model -> path of a parameter of the tower -> its values, what is left out)."""
  if checkpoint.is_run(folder):
    if not (towers := run_folder.read_config(folder).model).contrast:
      raise InputError(f'{folder}: holds a language model; --vit takes the run of the stage vit, or a SigLIP')
    stored = writer.flatten(checkpoint.load_params(folder, contrast.param_shapes(towers), warnings.warn).params)
    ours = {path: np.asarray(x) for path, x in stored.items() if path.startswith('vision/')}
    return towers.vision, lambda whole: ours, sorted(stored.keys() - ours)
  vision, source, left = siglip.open_tower(folder)

  def read(whole: ModelConfig) -> dict[str, Any]:
    table = siglip.table(whole)
    reader.check(table, source)
    return writer.flatten(reader.build(table, source, place=reader.leave))
  return vision, read, left


def together(text: TextConfig, vision: VisionConfig, indexer: IndexerConfig, tokens: int) -> ModelConfig:
  """The Keye that a language model and a tower make. A quarter of the rotary pairs carry time, the rest is shared
  between height and width: 16, 24, 24 in the published model."""
  pairs = text.head_dim // 2
  space = (pairs - pairs // 4) // 2
  text = dataclasses.replace(text, vocab=max(text.vocab, tokens), indexer=indexer,
                             mrope_section=(pairs - 2 * space, space, space))
  return ModelConfig(text, vision, attention='sparse')


def new_params(halves: Halves, seed: int) -> dict[str, jax.Array]:
  """Path -> random parameter, for every path that neither folder has."""
  ours = {path for path in names.leaves(names.table(halves.model, 'keye'))} - halves.params.keys()
  attn_norm_LD = halves.params['layers/attn_norm'][:]
  made = begin.new_params(halves.model, jax.random.key(seed), lambda path: '/'.join(path) in ours, attn_norm_LD)
  return writer.flatten(made)


def grown(halves: Halves) -> dict[str, Any]:
  """The parameters of the folders; embedding and head have a row for each new id: the mean of those that are used.

  A language model has learnt nothing about a token it has never seen; from the mean it starts as likely as any.
  """
  params, more = dict(halves.params), halves.model.text.vocab - halves.rows
  if not more:
    return params
  for path, axis in (('embed', 0), ('head', 1)):
    if path in params:
      def fetch(index, old=params[path], axis=axis):
        whole = old[:].astype(np.float32)
        mean = np.take(whole, range(halves.known), axis).mean(axis, keepdims=True)
        return np.concatenate([whole, np.repeat(mean, more, axis)], axis)[index]
      shape = list(params[path].shape)
      shape[axis] += more
      params[path] = reader.Unread(tuple(shape), fetch)
  return params


def report(out: str, halves: Halves, new: dict[str, jax.Array]) -> dict[str, Any]:
  """What was copied, what is new and what was left out."""
  size = lambda params, keep=lambda path: True: sum(math.prod(x.shape) for path, x in params.items() if keep(path))
  t, i = halves.model.text, halves.model.text.indexer
  grew = t.vocab - halves.rows
  made = {
      'projector': (size(new, lambda path: path.startswith('projector/')), 'random'),
      'indexers': (size(new, lambda path: '/indexer/' in path),
                   f'random, {t.layers} of {i.heads} x {i.head_dim}, top {i.topk}; gates divided by the size of the '
                   'norm before them'),
      'packing positions': (size(new, lambda path: path.endswith('packing_position')),
                            'zeros; the published checkpoint carries them, nothing reads them'),
      'vocabulary': (grew * t.embed * (1 if t.tied_head else 2),
                     f'{halves.rows:,} rows became {t.vocab:,}; a new one is the mean of the {halves.known:,} used'
                     if grew else f'its {t.vocab:,} rows have room for all {halves.words.size:,} tokens')}
  copied = size(halves.params)
  return {'folder': out, 'parameters': copied + sum(n for n, _ in made.values()), 'copied': copied,
          'new': {part: {'parameters': n, 'how': how} for part, (n, how) in made.items()},
          'new tokens': halves.specials, 'left out': halves.left}


def text(facts: dict[str, Any]) -> str:
  lines = [f'{facts["folder"]}: {facts["parameters"]:,} parameters, {facts["copied"]:,} of them copied', 'new:']
  lines += [f'  {part:<18} {new["parameters"]:>14,}  {new["how"]}' for part, new in facts['new'].items()]
  lines += [f'  {"tokens":<18} {len(facts["new tokens"]):>14,}  {" ".join(facts["new tokens"])}']
  left = f'left out: {len(facts["left out"])} tensors of the vision folder (text model, pooling head, loss)'
  return '\n'.join([*lines, left])
