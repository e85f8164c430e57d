"""`keye quickstart`: the main job from data to export, on a laptop's CPU.

Builds FrameForge clips, trains the tiny Keye of configs/quickstart.py in stages, evaluates it beside everything that a
score must beat, lets it say when something happens in a clip it has never seen, exports it as a Hugging Face folder,
reads that back, and writes a report.
"""
import argparse
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import quickstart as recipe
from data_pipelines import sources
from data_pipelines.errors import InputError
from keye_jax import api
from keye_jax.config import RunConfig
from keye_jax.evals import questions, scores
from keye_jax.hf import writer
from keye_jax.nn import keye
from launch import evaluate, quickstart_report, results, runtime
from launch.evaluate import Answered
from launch.report import Check
from launch.stages import Clock, Stopped, build, peak_gib, train

MAIN = 'sparse'
BLIND, UNTRAINED, UNTRAINED_INDEXER = 'blind (grey frames)', 'untrained', 'sparse, untrained indexer'


class Evaluated(NamedTuple):
  found: dict[str, Answered]                     # by arm
  arms: dict[str, dict[str, scores.Score]]       # the same and the trivial baselines
  checks: list[Check]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--out', default=recipe.RUNS, help='folder for data, runs, export and report; emptied first')
  parser.add_argument('--seed', type=int, default=0, help='of initial weights and of the order of rows, in every stage')
  parser.add_argument('--record', action='store_true', help='write docs/results/quickstart.json and update the README')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args:
    raise InputError(f'keye quickstart takes no {config_args[0]}; its recipe is configs/quickstart.py')
  runtime.start('quickstart')
  out = pathlib.Path(args.out)
  clear(out)
  stages = {name: recipe.stage(name, str(out), args.seed) for name in recipe.STAGES}
  try:
    clock, evaluated = main(out, stages, recipe.CLIPS, recipe.MIXED_IMAGES, recipe.VOCAB)
  except Stopped as e:
    print(f'stopped by signal {e}', file=sys.stderr)
    return 130
  if args.record:
    print(f'recorded: {record(clock, evaluated, args.seed)}')
    results.refresh_readme()
  missed = [check.name for check in evaluated.checks if not check.ok]
  if missed:
    print(f'keye quickstart: ran through, but did not reach: {"; ".join(missed)}', file=sys.stderr)
  return 1 if missed else 0


def main(out: pathlib.Path, stages: dict[str, RunConfig], clips: dict[str, int], mixed: int,
         vocab: int) -> tuple[Clock, Evaluated]:
  """The job itself; everything it makes lies in `out`."""
  results.commit()       # now, while the process is small: the peak of a child counts what its parent held at its start
  clock, data = Clock(), out / 'data'
  with clock.stage('Build clips with exact answers from real digits, photographs and videos'):
    build(data, clips, vocab)
    mix(data, mixed)
  for name, config in stages.items():
    with clock.stage(f'Train: {name} ({config.train.steps} steps)'):
      train(config, out / name)
  trained = api.load_pretrained(out / 'sparse', attention='sparse')
  with clock.stage('Evaluate on clips that share no digit and no background with training'):
    evaluated = evaluate_all(out, *trained)
    print(evaluate.table(evaluated.arms), '', sep='\n')
    for c in evaluated.checks:
      print(f'{"met    " if c.ok else "NOT MET"}  {c.name}: {c.value:.3f} (at least {c.least:.3f})')
  with clock.stage('Ask about a held-out clip'):
    ask(out, *trained)
  with clock.stage('Export as a Hugging Face folder, read it back, compare'):
    export(out, *trained)
  with clock.stage('Write the report'):
    quickstart_report.write(out, clock.spent, *trained, evaluated, facts(out, trained[0], evaluated))
  print(f'\n{clock.total / 60:.1f} minutes, {peak_gib():.1f} GiB at most. Report: {out / "report.html"}')
  return clock, evaluated


def clear(out: pathlib.Path) -> None:
  """Removes what an earlier quickstart left; refuses a folder that holds anything else."""
  ours = {'data', 'export', 'report.html', *recipe.STAGES}
  if strange := sorted(p.name for p in out.iterdir() if p.name not in ours) if out.is_dir() else []:
    raise InputError(f'{out}: holds {strange[0]!r}, which quickstart did not make; name an empty folder with --out')
  if out.exists():
    shutil.rmtree(out)
  out.mkdir(parents=True)


def mix(data: pathlib.Path, mixed: int) -> None:
  """clips.jsonl, the rows that the video stages learn from: all clips and `mixed` pictures."""
  rows = (data / 'train.jsonl').read_text().splitlines() + (data / 'images.jsonl').read_text().splitlines()[:mixed]
  (data / 'clips.jsonl').write_text('\n'.join(rows) + '\n')


def evaluate_all(out: pathlib.Path, model: api.Model, params: dict[str, Any]) -> Evaluated:
  """Every arm on the same held-out questions."""
  dense = dataclasses.replace(model.config, attention='dense')
  data = dataclasses.replace(model.data, path=str(out / 'data' / 'heldout.jsonl'), grey=False)
  fresh = keye.init(model.config, jax.random.key(1))
  blind_model, blind = api.load_pretrained(out / 'blind', attention='dense')
  jobs = {
    MAIN: (model.config, params, data),
    'dense': (dense, params, data),
    UNTRAINED_INDEXER: (model.config, with_indexer(params, fresh), data),
    UNTRAINED: (model.config, fresh, data),
    BLIND: (blind_model.config, blind, dataclasses.replace(data, grey=True)),
  }
  # From the host, weights of every origin are alike to jit, and arms of one config share their programs.
  found = {arm: evaluate.answer(config, jax.device_get(weights), rows) for arm, (config, weights, rows) in jobs.items()}
  arms = {arm: scores.score(*answered[:2]) for arm, answered in found.items()}
  train_questions = questions.texts(str(out / 'data' / 'train.jsonl'))
  arms |= evaluate.trivial(found[MAIN].questions, train_questions)
  return Evaluated(found, arms, requirements(arms))


def with_indexer(params: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
  """`params` with the indexer of `other`."""
  layers = params['layers']
  attn = layers['attn'] | {'indexer': other['layers']['attn']['indexer']}
  return params | {'layers': layers | {'attn': attn}}


def requirements(arms: dict[str, dict[str, scores.Score]]) -> list[Check]:
  """What the sparse model must reach on held-out clips."""
  value = lambda arm, name: arms[arm][name].value if name in arms[arm] else 0.0
  majority = next(arm for arm in arms if arm.startswith('majority'))
  without_sight = [arm for arm in arms if arm in (BLIND, UNTRAINED) or arm.startswith(('majority', 'best constant'))]
  best = max(value(arm, 'miou') for arm in without_sight)
  return [
    Check('questions', sum(arms[MAIN][name].n for name in ('accuracy', 'miou')), 500),
    Check('reading a digit', value(MAIN, 'accuracy/digit'), 0.7),
    Check('counting, 0.2 above the majority answer', value(MAIN, 'accuracy/count'),
          value(majority, 'accuracy/count') + 0.2),
    Check('before or after', value(MAIN, 'accuracy/order'), 0.75),
    Check('temporal mIoU', value(MAIN, 'miou'), 0.6),
    Check('temporal mIoU, 0.25 above the best baseline', value(MAIN, 'miou'), best + 0.25),
    Check('asked event overlapped more than any other', value(MAIN, 'asked_over_other'), 0.75),
  ]


def ask(out: pathlib.Path, model: api.Model, params: dict[str, Any]) -> None:
  """Streams two answers about the first held-out clip: what is in it, and when it happens."""
  row = sources.Rows(out / 'data' / 'heldout.jsonl').raw(first_grounded(out))
  clip = str(out / 'data' / row['videos'][0])
  kinds = row['type']
  print(f'   {clip}, {row["seconds"]:g} s')
  for kind in ('count', 'ground'):
    at = kinds.index(kind)
    text = row['branches'][at][0]['content']
    content = [{'type': 'video', 'video': clip}, {'type': 'text', 'text': text}]
    print(f'   {text} ', end='', flush=True)
    for piece in api.stream_generate(model, params, [{'role': 'user', 'content': content}], max_tokens=16):
      print(piece, end='', flush=True)
    print(f'{" s" if kind == "ground" else ""}   (true: {row["answer"][at]})')


def first_grounded(out: pathlib.Path) -> int:
  """The first held-out clip that is asked how many and when: chosen by its questions, not by the answers."""
  rows = sources.Rows(out / 'data' / 'heldout.jsonl')
  return next(i for i in range(len(rows)) if {'count', 'ground'} <= set(rows.raw(i)['type']))


def export(out: pathlib.Path, model: api.Model, params: dict[str, Any]) -> None:
  """Writes export/, reads it back and compares logits on a held-out clip."""
  writer.export(str(out / 'export'), model.config, params, model.tokenizer, model.format, model.data, dtype='float32')
  again, params_again = api.load_pretrained(out / 'export')
  clip = str(out / 'data' / sources.Rows(out / 'data' / 'heldout.jsonl').raw(0)['videos'][0])
  messages = [{'role': 'user', 'content': '<video>How many digits appear?'}]
  logits = []
  for m, p in ((model, params), (again, params_again)):
    token_BT = api.encode(m, messages, videos=[clip])[None]
    logits.append(np.asarray(api.logits(m, jax.device_get(p), token_BT, videos=[clip])))
  differ = float(np.abs(logits[0] - logits[1]).max())
  names = ', '.join(sorted(p.name for p in (out / 'export').iterdir()))
  print(f'   {names}\n   largest difference of {logits[0].size} logits: {differ:g}')
  if differ != 0:
    raise InputError(f'{out / "export"}: the exported model differs from the trained one by {differ:g}')


def facts(out: pathlib.Path, model: api.Model, evaluated: Evaluated) -> dict[str, str]:
  data = dataclasses.replace(model.data, path=str(out / 'data' / 'heldout.jsonl'))
  return evaluate.protocol(model.config, data, evaluated.found[MAIN]) | {
    'dense and sparse': difference(evaluated, 'dense'),
    'trained and untrained indexer': difference(evaluated, UNTRAINED_INDEXER),
    'memory': f'{peak_gib():.1f} GiB at most', 'hardware': results.hardware(),
    'versions': ', '.join(f'{k} {v}' for k, v in results.versions().items()), 'commit': results.commit()}


def difference(evaluated: Evaluated, arm: str) -> str:
  d = evaluate.compare(evaluated.found[MAIN], evaluated.found[arm])
  return (f'sparse minus {arm}: {d.value:+.3f} points a question, 95% {d.low:+.3f} to {d.high:+.3f}, better on '
          f'{d.first_better}, worse on {d.second_better} questions, sign test over clips p = {d.p:.2g}')


def record(clock: Clock, evaluated: Evaluated, seed: int) -> pathlib.Path:
  values = {arm: {name: round(s.value, 4) for name, s in found.items()} for arm, found in evaluated.arms.items()}
  trained = (MAIN, 'dense', UNTRAINED_INDEXER)
  failed = [f'{c.name}: {c.value:.3f} < {c.least:.3f}' for c in evaluated.checks if not c.ok]
  return results.record(
    'quickstart', 'A tiny Keye trained from scratch in minutes on a CPU answers questions about real held-out clips, '
    'with sparse attention to at most a quarter of the tokens, far above every baseline without sight.',
    n=len(evaluated.found[MAIN].questions),
    baselines={arm: v for arm, v in values.items() if arm not in trained},
    arms={arm: {str(seed): values[arm]} for arm in trained},
    intervals={arm: {name: [round(s.low, 4), round(s.high, 4)] for name, s in evaluated.arms[arm].items()}
               for arm in trained},
    why_not='; '.join(failed), seconds={name: round(s, 1) for name, s in clock.spent},
    peak_gib=round(peak_gib(), 2), requirements=[c._asdict() for c in evaluated.checks])
