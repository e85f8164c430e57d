"""What a TFDS example of each kind holds, and rows (data_pipelines/sources.py) to such examples and back.

An example is one clip or picture with what is asked about it. Times are seconds, to the 7 digits of a float32, which
is what TFDS stores. "media" is the path of the clip, relative to TFDS's data_dir when it lies below it, so that both
can be moved together; a picture's "image" is the bytes of its file.
"""
import os
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines import sources
from data_pipelines.errors import InputError

NONE = -1.0           # both ends of an interval that a question does not have


def features(kind: str) -> tfds.features.FeaturesDict:
  """kind: a builder's name, see builders/__init__.py."""
  text = tfds.features.Text()
  asked = {'question': text, 'answer': text, 'type': text}
  if kind == 'temporal_grounding':
    asked['interval'] = tfds.features.Tensor(shape=(2,), dtype=np.float32)
  found = {'id': text, 'questions': tfds.features.Sequence(asked)}
  if kind == 'image_qa':
    return tfds.features.FeaturesDict(found | {'image': tfds.features.Tensor(shape=(), dtype=np.object_)})
  found |= {'media': text, 'seconds': tfds.features.Scalar(dtype=np.float32)}
  if kind == 'dense_captioning':
    found['events'] = tfds.features.Sequence({'start': tfds.features.Scalar(dtype=np.float32), 'sentence': text,
                                              'end': tfds.features.Scalar(dtype=np.float32)})
  return tfds.features.FeaturesDict(found)


def example(kind: str, row: sources.Row, folder: pathlib.Path) -> dict[str, Any]:
  """A row as an example of that kind; `folder` is TFDS's data_dir. Raises InputError when the row is not of
  the kind: one medium, questions with one answer each, intervals or events where the kind has them."""
  media = [part for turn in row.trunk for part in turn.parts if part[0] != 'text']
  said = row.branches or [row.trunk]
  if [k for k, _ in media] != ['image' if kind == 'image_qa' else 'video'] or any(len(b) != 2 for b in said):
    raise InputError(f'{row.source}: {kind} has one {"picture" if kind == "image_qa" else "clip"} a row, and questions '
                     'of one turn with one answer each')
  text = lambda turn: ''.join(value for k, value in turn.parts if k == 'text')
  each = lambda key, default: _each(row.extra.get(key), len(said), default, bool(row.branches))
  questions = [{'question': text(ask), 'answer': text(answer), 'type': str(kind_)}
               for (ask, answer), kind_ in zip(said, each('type', ''))]
  out = {'id': str(row.extra.get('id', row.source.rpartition('/')[2])), 'questions': questions}
  if kind == 'image_qa':
    image = media[0][1]
    return out | {'image': image if isinstance(image, bytes) else pathlib.Path(image).read_bytes()}
  path = pathlib.Path(os.path.abspath(media[0][1]))
  out |= {'media': str(path.relative_to(folder) if path.is_relative_to(folder) else path),
          'seconds': float(row.extra.get('seconds', NONE))}
  if kind == 'temporal_grounding':
    for question, interval in zip(questions, each('interval', None)):
      question['interval'] = np.array(interval or [NONE, NONE], np.float32)
  if kind == 'dense_captioning':
    events = each('events', None)[0]
    if not events:
      raise InputError(f'{row.source}: dense_captioning needs "events": [[start, end, sentence], ...]')
    out['events'] = [{'start': float(a), 'end': float(b), 'sentence': s} for a, b, s in events]
  return out


def row(found: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """An example as a row in the project's own form; `folder` is TFDS's data_dir."""
  number = lambda value: float(str(np.float32(value)))         # 24.3, where float() gives 24.299999237060547
  text = lambda value: value.decode() if isinstance(value, bytes) else str(value)
  asked = found['questions']
  kind = 'image' if 'image' in found else 'video'
  medium = bytes(found['image']) if kind == 'image' else str(folder / text(found['media']))
  out = {'id': text(found['id']), f'{kind}s': [medium], 'messages': [{'role': 'user', 'content': f'<{kind}>'}],
         'branches': [[{'role': 'user', 'content': text(q)}, {'role': 'assistant', 'content': text(a)}]
                      for q, a in zip(asked['question'], asked['answer'])], 'type': [*map(text, asked['type'])]}
  if found.get('seconds', NONE) >= 0:
    out['seconds'] = number(found['seconds'])
  if 'interval' in asked:
    spans = [(number(a), number(b)) if a >= 0 else None for a, b in asked['interval']]
    if any(spans):          # as annotations.rows does
      out['interval'] = [span and list(span) for span in spans]
      out['others'] = [[list(o) for o in dict.fromkeys(spans) if o and o != span] if span else None for span in spans]
  if 'events' in found:
    e = found['events']
    out['events'] = [[[number(a), number(b), text(s)] for a, b, s in zip(e['start'], e['end'], e['sentence'])]]
  return out


def _each(value, n: int, default, forks: bool) -> list:
  if value is None:
    return [default] * n
  return value if forks and isinstance(value, list) and len(value) == n else [value] * n
