"""`keye ladder`: every stage of training, small, each scored on held-out clips as soon as it ends.

Builds FrameForge clips, pictures and transcripts, trains the stages of configs/ladder.py, each from the one before, and
lets each answer the questions about clips that share no digit and no background with training. The vision tower's own
stage is scored by how often pictures find their captions, the text stage by answers about transcripts.

The same command goes on where it was stopped: OUT/STAGE is a run folder, OUT/scores.json holds what was measured.
"""
import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from configs import ladder as recipe
from configs import quickstart
from data_pipelines import frameforge
from data_pipelines.errors import InputError
from data_pipelines.frameforge import captions, transcript
from keye_jax import answer_losses, api, retrieval
from keye_jax.config import RunConfig
from keye_jax.evals import events, questions, scores
from keye_jax.evals.scores import Score
from launch import evaluate, ladder_page, results, runtime
from launch.stages import Clock, Stopped, build, train

TEXT = 'text'             # the stage that answers about transcripts
MORE = 'more'             # folder of the clips that only losses are taken of
CAPTION_TOKENS = 64       # of an answer that lists the events of a clip


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--out', default=recipe.RUNS, help='folder for data, runs and scores; continued if it holds some')
  parser.add_argument('--until', choices=tuple(recipe.STAGES), default='sft', help='the last stage of this call')
  parser.add_argument('--record', action='store_true', help='write docs/results/ladder.json and docs/ladder.md')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'keye ladder takes no {config_args[0]}; its recipe is configs/ladder.py')
  runtime.start('ladder')
  results.commit()             # the commit that ran, whatever is checked out when it ends
  out = pathlib.Path(args.out)
  names = list(recipe.STAGES)
  stages = {name: recipe.stage(name, str(out)) for name in names[:names.index(args.until) + 1]}
  try:
    measured = main(out, stages, recipe.CLIPS, recipe.MORE_CLIPS, quickstart.VOCAB)
  except Stopped as e:
    number, = e.args
    print(f'stopped by signal {number}; the same command goes on', file=sys.stderr)
    return 128 + number
  if args.record:
    print(f'recorded: {ladder_page.record(measured)}')
  return 0


def main(out: pathlib.Path, stages: dict[str, RunConfig], clips: dict[str, int], more: dict[str, int],
         vocab: int) -> dict[str, Any]:
  """Trains and scores the stages that are not scored yet; returns what OUT/scores.json holds. more: clips on which the
  switch to sparse attention is judged."""
  clock, data, measured = Clock(), out / 'data', Measured(out / 'scores.json', stages, clips)
  with clock.stage('Build clips, pictures and transcripts with exact answers'):
    build(data, clips, vocab)
    captions.write(data)
  if not measured.content['baselines']:
    asked = questions.texts(str(data / 'heldout.jsonl'))
    trivial = evaluate.trivial(asked, questions.texts(str(data / 'train.jsonl')))
    measured.content['baselines'] = {arm: as_lists(found) for arm, found in trivial.items()}
    measured.save()
  for name, config in stages.items():
    if name in measured.content['stages']:
      print(f'\n== {name}: trained and scored')
      continue
    begun = time.monotonic()
    with clock.stage(f'Train: {name} ({config.train.steps} steps)'):
      step = train(config, out / name)
    trained = time.monotonic()
    with clock.stage(f'Score: {name}'):
      if name in ladder_page.SWITCH:
        frameforge.build(out / MORE, **more)
      found = score(name, config, out, data)
      print(evaluate.table({name: {k: Score(*v) for k, v in found['scores'].items()}}))
    spent = {'train seconds': round(trained - begun, 1), 'score seconds': round(time.monotonic() - trained, 1)}
    measured.content['stages'][name] = found | {'steps': step} | spent
    measured.save()
  print('', *ladder_page.table(measured.content), sep='\n')
  return measured.content


def score(name: str, config: RunConfig, out: pathlib.Path, data: pathlib.Path) -> dict[str, Any]:
  """{'scores': {name: [value, low, high, n]}} of a stage; with 'clips' and 'earned' of each question, in the order of
  the file, for one that answers, and with 'losses' of each answer where the switch to sparse attention is judged."""
  if config.model.contrast:
    return {'scores': as_lists(retrieval.scores(str(out / name), str(data / 'heldout_images.jsonl')))}
  model, params = api.load_pretrained(out / name)
  config = model.config
  # From the host, weights of every origin are alike to jit, and stages of one config share their programs.
  params = jax.device_get(params)
  rows = lambda file: dataclasses.replace(model.data, path=str(data / file))
  main_rows = rows(f'{transcript.FILES["heldout"] if name == TEXT else "heldout"}.jsonl')
  asked, answers, _ = evaluate.answer(config, params, main_rows)
  scored = scores.score(asked, answers)
  found = {'clips': [q.clip for q in asked], 'earned': [round(scores.points(*pair), 4) for pair in zip(asked, answers)]}
  if name in ladder_page.SWITCH:
    judged = dataclasses.replace(rows('heldout.jsonl'), path=str(out / MORE / 'heldout.jsonl'), tokenizer=str(data))
    found['losses'] = answer_losses.losses(config, params, judged)._asdict()
  if name != TEXT:
    asked, answers, _ = evaluate.answer(config, params, rows(captions.FILE), new_tokens=CAPTION_TOKENS)
    scored |= events.score(answers, [q.expected for q in asked], [q.clip for q in asked])
  return found | {'scores': as_lists(scored)}


def as_lists(found: dict[str, Score]) -> dict[str, list[float]]:
  return {name: [round(x, 4) for x in s] for name, s in found.items()}


class Measured:
  """What was measured so far, in a file that is whole at any moment: {'made with': ..., 'baselines': {arm: scores},
  'stages': {name: what `score` returns and how long it took}}. Raises InputError when the file is of another recipe."""

  def __init__(self, path: pathlib.Path, stages: dict[str, RunConfig], clips: dict[str, int]):
    self.path = path
    recipe_ = json.loads(json.dumps({'clips': clips, 'stages': {
        name: dataclasses.asdict(dataclasses.replace(config, data=dataclasses.replace(config.data, path=''),
                                                     train=dataclasses.replace(config.train, init='')))
        for name, config in stages.items()}}))
    self.content = {'made with': recipe_, 'baselines': {}, 'stages': {}}
    if path.is_file():
      self.content = json.loads(path.read_text())
      before = self.content['made with']
      both = before['stages'].keys() & recipe_['stages'].keys()
      if differ := [name for name in sorted(both) if before['stages'][name] != recipe_['stages'][name]]:
        raise InputError(f'{path}: stage {differ[0]} was measured with another recipe; use the same, or another --out')
      if before['clips'] != recipe_['clips']:
        raise InputError(f'{path}: was measured on other clips; use the same, or another --out')
      before['stages'] |= recipe_['stages']

  def save(self) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    part = self.path.with_suffix('.part')
    part.write_text(json.dumps(self.content) + '\n')
    os.replace(part, self.path)
