"""`keye evaluate`: a model's answers to the questions of a file, scored beside trivial baselines.

Greedy decoding, the questions of a clip sharing one reading of it. Of a run of the stage vit: how often the pictures of
the file find their captions. Rows as in data_pipelines/sources.py; besides, a row may carry "type" (what to score
together), "answer" (what counts of a message that gives reasons before it), "interval" and "others" (seconds of the
asked event and of the clip's other events; scored by temporal IoU), "seconds" (duration) and "clip".
"""
import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines import sources
from data_pipelines.errors import InputError
from data_pipelines.pipeline import open_tokenizer
from keye_jax import api, retrieval
from keye_jax.config import DataConfig, ModelConfig
from keye_jax.evals import baselines, questions, scores, uncertainty
from keye_jax.evals.scores import Question, Score
from keye_jax.rollout import sampler
from launch import runtime


class Answered(NamedTuple):
  questions: list[Question]
  answers: list[str]
  seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', required=True, help='folder of an export, or of a run')
  parser.add_argument('--data', required=True, help='file of held-out questions')
  parser.add_argument('--train', default='', help='file of training questions: adds the majority baseline')
  parser.add_argument('--attention', choices=('dense', 'sparse'), help='default: what the model was saved with')
  parser.add_argument('--batch', type=int, default=16, help='rows (clips) answered together')
  parser.add_argument('--tokens', type=int, default=16, help='most tokens of an answer')
  parser.add_argument('--json', action='store_true', help='print one JSON object instead of the table')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'keye evaluate takes no {config_args[0]}; what a model looks like is in its folder')
  runtime.start('evaluate')
  if retrieval.has_towers(args.model):
    found = retrieval.scores(args.model, args.data)
    arms = {name: {'retrieval': score} for name, score in zip((args.model, 'any caption', 'most frequent caption'),
                                                              found.values())}
    print(json.dumps(as_json(arms)) if args.json else table(arms))
    return 0
  model, params = api.load_pretrained(args.model, attention=args.attention)
  config, data = model.config, dataclasses.replace(model.data, path=args.data)
  found = answer(config, params, data, args.batch, args.tokens)
  arms = {f'{args.model}, {config.attention}': scores.score(*found[:2])}
  train = questions.texts(args.train) if args.train else None
  arms |= trivial(found.questions, train)
  facts = protocol(config, data, found)
  print(json.dumps(as_json(arms) | {'protocol': facts}) if args.json else
        '\n'.join([table(arms), '', *(f'{k}: {v}' for k, v in facts.items())]))
  return 0


def answer(config: ModelConfig, params, data: DataConfig, batch: int = 16, new_tokens: int = 16) -> Answered:
  """Greedy answers to every question of `data.path`, in file order.

  Raises InputError at the first row that cannot be used: an evaluation must not shrink unseen.
  """
  tokenizer, v = open_tokenizer(data), config.vision
  started, out = time.monotonic(), Answered([], [], 0.0)
  rows = tqdm(questions.read(data, v.patch, v.merge), 'answering', len(sources.Rows(data.path)), unit='clip',
              leave=False)
  for group in questions.groups(rows, batch, data.tokens, data.vision_patches, v.merge, v.patch_dim):
    found = sampler.generate(config, params, group.batch, group.last_BQ, new_tokens, tokenizer.stop_ids)
    for b, q in zip(*np.nonzero(group.last_BQ >= 0)):
      ids = found.token_BQN[b, q, :found.length_BQ[b, q]]
      out.answers.append(tokenizer.decode(ids[~np.isin(ids, tokenizer.stop_ids)]).strip())
    out.questions.extend(group.questions)
  return out._replace(seconds=time.monotonic() - started)


def trivial(held_out: Sequence[Question], train: Sequence[Question] | None) -> dict[str, dict[str, Score]]:
  """Scores that need no model: the majority training answer by type, and the best constant interval.

  The constant is chosen on the held-out intervals themselves, which no honest constant can beat.
  """
  out = {}
  if train is not None:
    out['majority answer by type'] = scores.score(held_out, baselines.majority(train, held_out))
  if any(q.interval and q.seconds for q in held_out):
    interval, relative, _ = baselines.best_constant(held_out)
    ground = [q for q in held_out if q.interval]
    where = 'of the clip' if relative else 's'
    out[f'best constant interval ({interval[0]:.3g} - {interval[1]:.3g} {where})'] = scores.score(
        ground, baselines.constant_answers(ground, interval, relative))
  return out


def compare(first: Answered, second: Answered) -> uncertainty.Difference:
  """Two models on the same questions, by what each answer earns."""
  if first.questions != second.questions:
    raise ValueError('the two models were not asked the same questions')
  earned = [[scores.points(q, a) for q, a in zip(found.questions, found.answers)] for found in (first, second)]
  return uncertainty.paired(*earned, [q.clip for q in first.questions])


def protocol(config: ModelConfig, data: DataConfig, found: Answered) -> dict[str, str]:
  """What a score depends on besides the weights."""
  least, most = data.frame_tokens_min, data.frame_tokens_max
  patch = config.vision.patch * config.vision.merge
  sparse = f', {config.text.indexer.topk} keys a query' if config.attention == 'sparse' else ''
  seconds = [q.seconds for q in found.questions if q.seconds]
  return {
    'questions': f'{len(found.questions)} of {len({q.clip for q in found.questions})} clips, {data.path}',
    'frames': f'{data.fps:g} a second' + (f', clips of {min(seconds):g} to {max(seconds):g} s' if seconds else ''),
    'pixels': f'{least}{"" if least == most else f" to {most}"} tokens of {patch} x {patch} pixels a frame, '
              f'at most {data.video_tokens} a clip',
    'attention': config.attention + sparse,
    'decoding': f'greedy, {found.seconds:.1f} s in all',
    'extractor': 'short answers: exact match without surrounding white space, of one that begins with reasons what '
                 'stands behind the last colon; intervals: "a - b" in seconds, else the first two numbers, else 0',
  }


def table(arms: Mapping[str, Mapping[str, Score]]) -> str:
  """Scores as text: a line a system, a column a score, 95% intervals below each value."""
  names = list(dict.fromkeys(name for found in arms.values() for name in found))
  head = ['', *(name.removeprefix('accuracy/').replace('_', ' ') for name in names)]
  lines = [head]
  for arm, found in arms.items():
    cells = [found.get(name) for name in names]
    lines.append([arm, *(f'{c.value:.3f}' if c else '-' for c in cells)])
    lines.append(['', *(f'{c.low:.2f}-{c.high:.2f}' if c else '' for c in cells)])
  n = [next((str(found[name].n) for found in arms.values() if name in found), '') for name in names]
  lines.append(['questions', *n])
  widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
  return '\n'.join('  '.join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]).rstrip()
                   for line in lines)


def as_json(arms: Mapping[str, Mapping[str, Score]]) -> dict:
  return {'arms': {arm: {name: s._asdict() for name, s in found.items()} for arm, found in arms.items()}}
