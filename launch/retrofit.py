"""`keye retrofit`: gives a trained dense model DeepSeek Sparse Attention, and measures what that costs.

    keye retrofit --config configs/dsa_retrofit.py:smollm2 --out runs/retrofit
    keye retrofit --config configs/dsa_retrofit.py:runs/imported --text my_texts --out runs/retrofit

Text files become rows that fill the context, each file on one side of the split. The indexer is trained beside the
frozen model, then model and indexer together with sparse attention, and a control with dense attention on the same
tokens. Then the perplexity on held-out rows is measured after each stage, at places in their second half (a query with
no more than k keys before it loses nothing and would only dilute the mean), for k = 64 to 512, beside dense attention,
the oracle (the k keys with the most head-averaged attention), a window with 4 sinks, and an untrained indexer; so is
how often the answers to questions about pairs hidden all over such rows are found (keye_jax/evals/key_values.py).

The same command goes on where it was stopped. OUT/warmup, OUT/sparse and OUT/dense are run folders; OUT/scores_N.json
and OUT/answers_N.json hold what was measured on rows of N tokens. `--arm dense --arm 'dense, fine-tuned'` measures what
fine-tuning alone changes, without the stages that it does not need.
"""
import argparse
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from configs.dsa_retrofit import PACKAGED, STAGES
from data_pipelines import packing, pipeline, text
from data_pipelines.errors import InputError
from data_pipelines.schema import Batch
from keye_jax import api, begin, loop
from keye_jax.config import ModelConfig, RunConfig
from keye_jax.evals import key_values
from keye_jax.hf import gguf
from keye_jax.metrics import say
from keye_jax.nn import head, probe
from launch import results, retrofit_page, runtime
from launch.run_config import HELP, load

SOURCE = 'source'             # the model as it came, with an untrained indexer
BEFORE = {'sparse': 'warmup'} # stages that go on from another's weights; the warm-up changes nothing that `dense` reads
TOPKS = (64, 128, 256, 512)


class Arm(NamedTuple):
  name: str
  stage: str                  # whose weights
  choose: Callable            # which keys
  topks: tuple[int, ...] = TOPKS
  share: int = 1              # one in so many rows is enough: these are far off


ARMS = (Arm('dense', SOURCE, probe.everything, (0,)), Arm('oracle', SOURCE, probe.oracle),
        Arm('window + 4 sinks', SOURCE, probe.window, share=4),
        Arm('untrained indexer', SOURCE, probe.indexer, share=4),
        Arm('after warm-up', 'warmup', probe.indexer), Arm('after sparse stage', 'sparse', probe.indexer),
        Arm('dense, fine-tuned', 'dense', probe.everything, (0,)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', required=True, help=HELP + '; overrides apply to every stage')
  parser.add_argument('--out', required=True, help='folder for rows, runs and scores; continued if it holds some')
  parser.add_argument('--text', default='', help='folder of .py, .md, .rst and .txt files; default: the Python '
                      'standard library')
  parser.add_argument('--until', choices=(SOURCE, *STAGES), default=STAGES[-1], help='the last stage of this call')
  parser.add_argument('--arm', action='append', choices=[arm.name for arm in ARMS], help='measure only these (several '
                      'times), and train what they need; costs need `dense` among them')
  parser.add_argument('--windows', type=int, default=32, help='held-out rows that are scored; of longer rows (see '
                      '--length) fewer, as many tokens')
  parser.add_argument('--length', type=int, nargs='*', default=[], metavar='TOKENS', help='lengths of these rows; '
                      'default: that of training')
  parser.add_argument('--record', action='store_true', help='write docs/results/lossless.json and docs/lossless.md')
  parser.add_argument('--json', action='store_true', help='one JSON object instead of the table')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  stages = {name: load(f'{args.config}:{name}', config_args) for name in STAGES}
  if args.windows < 1:
    raise InputError(f'keye retrofit: --windows {args.windows} must be at least 1')
  if args.arm and args.record:
    raise InputError('keye retrofit: --record is of all arms; without it, --json prints those of --arm')
  until = (SOURCE, *STAGES)[:(SOURCE, *STAGES).index(args.until) + 1]
  arms = [arm for arm in ARMS if arm.stage in until and arm.name in (args.arm or [arm.name])]
  if not arms:
    raise InputError(f'keye retrofit: --until {args.until} comes before {" and ".join(args.arm)}')
  runtime.start('retrofit')
  results.commit()             # the commit that ran, whatever is checked out when an arm finishes
  out, first = pathlib.Path(args.out), stages[STAGES[0]]
  source = gguf.packaged() if first.train.init == PACKAGED else first.train.init
  lengths = sorted(set(args.length)) or [first.data.tokens]
  texts = args.text or text.library()
  rows = {n: write_rows(out / 'data', texts, source, n) for n in (first.data.tokens, *lengths)}
  stages = placed(stages, out, source, rows[first.data.tokens] / f'train_{first.data.tokens}.jsonl')
  trials = [trial(first, out, rows[n] / f'heldout_{n}.jsonl', n, max(args.windows * lengths[0] // n, 1), args.text)
            for n in lengths]

  measured_at = {arm.stage for arm in arms}
  needed = measured_at | {BEFORE[name] for name in measured_at if name in BEFORE}
  steps = {SOURCE: 0}
  for name in (name for name in STAGES if name in needed):
    result = loop.train(stages[name], out / name)
    if result.stopped_by:
      return 128 + result.stopped_by
    steps[name] = result.step
  for one in trials:
    for name in (name for name in until if name in measured_at):
      params = weights(first, name, out, source)
      for arm in (arm for arm in arms if arm.stage == name):
        measured = functools.partial(evaluate, arm=arm, step=steps[name], config=first.model, params=params)
        measured(one.scores, measure, one.windows)
        measured(one.answers, answer, one.questions)
        say(f'{arm.name}: measured on rows of {one.tokens} tokens')
        if args.record:
          retrofit_page.record(contents(trials))
      del params
  found = retrofit_page.results_of(contents(trials))
  print(json.dumps(results.made() | found) if args.json else '\n'.join(retrofit_page.tables(found)))
  return 0


class Trial(NamedTuple):
  """What is measured on rows of one length."""
  tokens: int
  windows: list[Batch]
  questions: list[key_values.Planted]       # windows with pairs and questions in them
  scores: 'Scores'
  answers: 'Scores'


def trial(config: RunConfig, out: pathlib.Path, held_out: pathlib.Path, tokens: int, count: int, texts: str) -> Trial:
  windows = list(read_windows(config, held_out, tokens, count))
  tokenizer = pipeline.open_tokenizer(dataclasses.replace(config.data, path=str(held_out)))
  try:
    asked = windows[:max(count // 4, 4)]
    questions = [key_values.plant(row, tokenizer, i, key_values.PAIRS) for i, row in enumerate(asked)]
  except ValueError as e:
    say(f'no questions about pairs: {e}')
    questions = []
  made_with = {'indexer': dataclasses.asdict(config.model.text.indexer) | {'topk': TOPKS}, 'tokens': tokens,
               'text': pathlib.PurePath(texts).name or 'the Python standard library'}
  return Trial(tokens, windows, questions, Scores(out / f'scores_{tokens}.json', made_with),
               Scores(out / f'answers_{tokens}.json', made_with | {'pairs': key_values.PAIRS}))


def contents(trials: Sequence[Trial]) -> dict[int, tuple[dict, dict]]:
  return {t.tokens: (t.scores.content, t.answers.content) for t in trials}


def write_rows(folder: pathlib.Path, texts: str, source: str, tokens: int) -> pathlib.Path:
  """`folder`, with rows of `tokens` tokens made of the files below `texts`, unless they are there."""
  if not all((folder / f'{split}_{tokens}.jsonl').is_file() for split in ('train', 'heldout')):
    made = text.write(texts, folder, api.load_pretrained(source)[0].tokenizer, tokens)
    say(f'{folder}: {made["train"]} training rows and {made["heldout"]} held-out rows of {tokens} tokens')
  return folder


def placed(stages: dict[str, RunConfig], out: pathlib.Path, source: str, rows: pathlib.Path) -> dict[str, RunConfig]:
  """The stages with their data and what they start from: the model, or the stage before."""
  init = {name: str(out / BEFORE[name]) if name in BEFORE else source for name in STAGES}
  return {name: dataclasses.replace(c, data=dataclasses.replace(c.data, path=str(rows)),
                                    train=dataclasses.replace(c.train, init=init[name]))
          for name, c in stages.items()}


def read_windows(config: RunConfig, path: pathlib.Path, tokens: int, count: int) -> Iterator[Batch]:
  """The first `count` rows of a file, a batch of one row each. Raises InputError when there are fewer."""
  data = dataclasses.replace(config.data, path=str(path), tokens=tokens)
  rows = pipeline.Load(data, config.model.vision.patch, config.model.vision.merge, strict=True)
  if len(rows.rows) < count:
    raise InputError(f'{path}: holds {len(rows.rows)} rows, --windows {count} asks for more')
  for i in range(count):
    yield packing.pack([rows.example(i)], rows.shape, together=False)


def weights(config: RunConfig, stage: str, out: pathlib.Path, source: str) -> dict[str, Any]:
  """Parameters after a stage; of the source with the indexer that the warm-up begins with."""
  if stage != SOURCE:
    return api.load_pretrained(out / stage, dtype=config.model.param_dtype)[1]
  return begin.initial_params(config.model, source, jax.random.key(config.train.seed), say)


class Scores:
  """What was measured so far, in a file that is whole at any moment.

  {'made with': ..., 'arms': {arm: {'step': of its weights, 'k': {k: [one record a window, in order]}}}}
  """

  def __init__(self, path: pathlib.Path, made_with: dict[str, Any]):
    self.path, made_with = path, json.loads(json.dumps(made_with))
    self.content = {'made with': made_with, 'arms': {}}
    if path.is_file():
      self.content = json.loads(path.read_text())
      if self.content['made with'] != made_with:
        raise InputError(f'{path}: was measured with {self.content["made with"]}, not with {made_with}; use the same, '
                         'or another --out')

  def windows(self, arm: str, step: int, k: int) -> list[dict[str, Any]]:
    """The records of an arm, to be appended to; those of other weights are dropped."""
    found = self.content['arms'].setdefault(arm, {'step': step, 'k': {}})
    if found['step'] != step:
      found.update(step=step, k={})
    return found['k'].setdefault(str(k), [])

  def save(self) -> None:
    part = self.path.with_suffix('.part')
    part.write_text(json.dumps(self.content) + '\n')
    os.replace(part, self.path)


def evaluate(scores: Scores, one: Callable, rows: Sequence, arm: Arm, step: int, config: ModelConfig, params) -> None:
  """Scores the rows that are missing by `one`, one after the other for all k, and saves after each."""
  rows = rows[:-(-len(rows) // arm.share)]
  missing = [(i, k) for i in range(len(rows)) for k in arm.topks if len(scores.windows(arm.name, step, k)) <= i]
  for i, k in tqdm(missing, arm.name, unit='window', leave=False):
    scores.windows(arm.name, step, k).append(one(config, arm.choose, params, rows[i], k))
    scores.save()


def measure(config: ModelConfig, choose: Callable, params, batch: Batch, k: int) -> dict[str, Any]:
  """Of the second half of a row: nats and number of its targets, and by layer the mean share of attention mass and of
  the oracle's keys that were chosen. k = 0 is all keys."""
  T = batch.token_BT.shape[1]
  found, half = probe.run(config, choose, params, batch, np.int32(k or T)), T // 2
  weight_T, real_T = batch.weight_BT[0, half:], batch.segment_BT[0, half:] > 0
  logp_T, _ = targets(config, params, found.hidden_BTD[:, half:], batch.target_BT[:, half:])
  by_layer = lambda x_LBT: [round(float(x), 5) for x in np.asarray(x_LBT)[:, 0, half:][:, real_T].mean(1)]
  return {'nll': float(-(logp_T * weight_T).sum()), 'tokens': int(weight_T.sum()), 'mass': by_layer(found.mass_LBT),
          'overlap': by_layer(found.overlap_LBT)}


def answer(config: ModelConfig, choose: Callable, params, planted: key_values.Planted, k: int) -> dict[str, Any]:
  """Marks of the questions of a row. k = 0 is all keys."""
  row = planted.batch
  found = probe.run(config, choose, params, row, np.int32(k or row.token_BT.shape[1]))
  return key_values.marks(planted, *targets(config, params, found.hidden_BTD, row.target_BT))


def targets(config: ModelConfig, params, hidden_BTD, target_BT) -> tuple[np.ndarray, np.ndarray]:
  """(logp_T, correct_T) of the targets of one row, float64."""
  return tuple(np.asarray(x_BT[0], np.float64) for x_BT in stats(config, params, hidden_BTD, target_BT))


@functools.partial(jax.jit, static_argnums=0)
def stats(config: ModelConfig, params, hidden_BTD, target_BT) -> tuple[jax.Array, jax.Array]:
  head_DV = params['embed'].T if config.text.tied_head else params['head']
  found = head.token_stats(config.layout, hidden_BTD, head_DV.astype(hidden_BTD.dtype), target_BT, ('logp', 'correct'))
  return found.logp_BT, found.correct_BT
