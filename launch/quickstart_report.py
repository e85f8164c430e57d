"""The report of `keye quickstart`: gathers curves, clips and selections from the folder that the job has filled."""
import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from configs import quickstart as recipe
from data_pipelines import chat, packing, pipeline, sources
from data_pipelines.schema import Example
from keye_jax import api, metrics
from keye_jax.config import DataConfig, ModelConfig
from keye_jax.evals import intervals, questions
from keye_jax.evals.scores import Question
from keye_jax.nn import inspect
from launch import report
from launch.report_plots import Line

CLIPS = 4      # shown: the first held-out clips that are asked when something happens


def write(out: pathlib.Path, spent: Sequence[tuple[str, float]], model: api.Model, params, evaluated,
          facts: Mapping[str, str]) -> None:
  """`out`/report.html. `evaluated` is the Evaluated of launch/quickstart.py, `model` the one it calls sparse."""
  met, text, found = all(check.ok for check in evaluated.checks), model.config.text, evaluated.found['sparse']
  summary = (f'A Keye of {text.layers} layers and {text.experts} experts, trained from random weights in this run, '
             f'answers {len(found.questions)} questions about clips that share no digit and no background with '
             f'training. Each query attends to {text.indexer.topk} tokens. '
             + ('All requirements are met.' if met else 'Not all requirements are met.'))
  answers = {(q.clip, q.text): answer for q, answer in zip(*found[:2])}
  report.write(out / 'report.html', report.Report(
    'keye quickstart', summary, facts, evaluated.checks, evaluated.arms, curves(out), spent,
    clips(out, model, params, answers)))


def curves(out: pathlib.Path):
  """Losses of the stages after each other, accuracy of the answers' tokens, and the indexer's KL."""
  records = {name: metrics.read(out / name) for name in recipe.STAGES}
  line = lambda names, key: [
    (at + r['step'], r[key]) for name, at in zip(names, offsets(records, names)) for r in records[name] if key in r]
  main = [name for name in recipe.STAGES if name != 'blind']
  begun = dict(zip(main, offsets(records, main)))
  marks = [(at, name) for name, at in begun.items()]
  as_line = lambda label, points: Line(label, [x for x, _ in points], [y for _, y in points])
  chart = lambda title, key: (title, 'step', [as_line('trained', line(main, key)), as_line(
    'blind', [(x + begun['video'], y) for x, y in line(['blind'], key)])], marks)
  kl = line(main, 'indexer_kl')
  return [chart('Loss of the answers’ tokens (nats)', 'loss'), chart('Share of the answers’ tokens right', 'accuracy'),
          ('Indexer: KL to the attention it imitates (nats)', 'step', [as_line('indexer', kl)],
           [mark for mark in marks if kl and mark[0] >= kl[0][0] - records[mark[1]][0]['step']])]


def offsets(records, names) -> list[int]:
  """Steps before each stage."""
  return [0, *itertools.accumulate(records[name][-1]['step'] if records[name] else 0 for name in names)][:len(names)]


def clips(out: pathlib.Path, model: api.Model, params, answers: Mapping[tuple[str, str], str]) -> list[report.ClipView]:
  path = out / 'data' / 'heldout.jsonl'
  data, rows, found = dataclasses.replace(model.data, path=str(path)), sources.Rows(path), []
  for i in range(len(rows)):
    row = rows.raw(i)
    at = next((b for b, kind in enumerate(row['type']) if kind == 'ground'), None)
    if at is not None:
      question = questions.question(rows[i], at)
      found.append(view(model, params, data, rows[i], at, question, answers[question.clip, question.text]))
    if len(found) == CLIPS:
      break
  return found


def view(model: api.Model, params, data: DataConfig, row: sources.Row, branch: int, question: Question,
         answer: str) -> report.ClipView:
  """One clip, one question, the answer that was scored, and what each layer let the answer see."""
  v = model.config.vision
  asked = pipeline.load_media(chat.fork(row.trunk, row.branches[branch][:1]), data, v.patch, v.merge)
  example = chat.tokenize([*asked, chat.Turn('assistant', (('text', answer),))], model.tokenizer, patch=v.patch,
                          merge=v.merge)
  clip = next(value for kind, value in asked[0].parts if kind == 'video')
  return report.ClipView(
    f'{pathlib.Path(clip.source).name} ({row.extra["background"]})', question.text, answer, question.expected,
    clip.frames_FHW3, list(clip.seconds_F), question.seconds, intervals.parse(answer).interval, question.interval,
    question.others, selected(model.config, params, data, example))


def selected(config: ModelConfig, params, data: DataConfig, example: Example) -> np.ndarray:
  """[L, F]: share of a frame's tokens that the queries writing the answer selected, averaged over those queries."""
  v = config.vision
  batch = packing.pack([example], pipeline.row_shape(data, v.patch, v.merge))
  mask_LBTS, _ = inspect.selections(config, params, jax.device_put(batch))
  (queries,) = np.nonzero(batch.weight_BT[0])
  mask_LS = np.asarray(mask_LBTS)[:, 0, queries].mean(1)
  (places,) = np.nonzero(batch.vision_BT[0] >= 0)
  return mask_LS[:, places].reshape(len(mask_LS), example.frame_P.max(), -1).mean(-1)
