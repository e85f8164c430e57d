"""Annotations of public datasets, in the files that they are published as, to the project's rows.

One row a video: its questions are branches, "type", "interval" and "others" have an item for each (seconds; see
keye_jax/evals/questions.py). Times are those of the annotators, also where they pass the end of the clip. The videos
are the user's own: what an entry calls its video is a file of that name, with any of SUFFIXES, anywhere below a folder.

| format | file | questions |
|---|---|---|
| charades-sta | .txt `ID START END##SENTENCE`, or the .json of ActivityNet Captions | when each sentence happens |
| activitynet-captions | .json {id: {"duration", "timestamps", "sentences"}} | all events with their times, one answer |
| activitynet-grounding | the same | when each sentence happens |
| qvhighlights | .jsonl with "qid", "query", "vid", "duration", "relevant_windows" | when each query happens |
| next-qa | .csv with video, question, answer, qid, type, a0 ... a4 | multiple choice, answered by a letter |
"""
import csv
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_pipelines.errors import InputError
from data_pipelines.forms import span, when

SUFFIXES = ('.mp4', '.mkv', '.webm', '.avi', '.mov')
LETTERS = 'ABCDE'
DESCRIBE = 'Describe the events of the video in order, one a line, as "start - end: what happens", in seconds.'


class Asked(NamedTuple):
  """One question about a video."""
  video: str
  type: str
  question: str
  answer: str
  interval: tuple[float, float] | None = None
  extra: dict = {}          # of the question, by key
  clip: dict = {}           # of the video, by key


def read(name: str, path: str | os.PathLike) -> Iterator[Asked | str]:
  """The questions of an annotation file in its order; a string is an entry that cannot be used, with place and reason.

  name: a key of FORMATS. Raises InputError when the file is missing or is not of that format.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'{path}: no such annotation file')
  try:
    yield from FORMATS[name](path)
  except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as e:
    if isinstance(e, InputError):
      raise
    raise InputError(f'{path}: not a {name} file as published ({type(e).__name__}: {str(e).splitlines()[0]})') from None


def rows(asked: list[Asked], videos: dict[str, str]) -> Iterator[dict]:
  """One row for each video that is in `videos` (name: path), in the order in which the file first asks about it."""
  groups: dict[str, list[Asked]] = {}
  for one in asked:
    groups.setdefault(one.video, []).append(one)
  for video, group in groups.items():
    if video not in videos:
      continue
    intervals = [one.interval for one in group]
    row = {'id': video, 'clip': video, 'videos': [videos[video]], **group[0].clip,
           'messages': [{'role': 'user', 'content': '<video>'}],
           'branches': [[{'role': 'user', 'content': one.question}, {'role': 'assistant', 'content': one.answer}]
                        for one in group],
           'type': [one.type for one in group]}
    if any(intervals):
      row |= {'interval': [i and list(i) for i in intervals],
              'others': [[list(o) for o in dict.fromkeys(intervals) if o and o != i] if i else None
                         for i in intervals]}
    yield row | {key: [one.extra.get(key) for one in group] for key in group[0].extra}


def find_videos(folder: str | os.PathLike) -> dict[str, str]:
  """{name without suffix: path} of all videos below a folder. Raises InputError when there are none, or two of a name.
  """
  found: dict[str, str] = {}
  for parent, _, names in sorted(os.walk(folder)):
    for name in sorted(names):
      stem, suffix = os.path.splitext(name)
      if suffix.lower() in SUFFIXES:
        if stem in found:
          raise InputError(f'{folder}: {found[stem]} and {os.path.join(parent, name)} have one name; keep one')
        found[stem] = os.path.join(parent, name)
  if not found:
    raise InputError(f'{folder}: no videos ({", ".join(SUFFIXES)}) in this folder or below it')
  return found


def _charades(path) -> Iterator[Asked | str]:
  if path.suffix == '.json':
    yield from _grounding(path)
    return
  for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
    if not line.strip():
      continue
    head, mark, sentence = line.partition('##')
    if not mark or len(head.split()) != 3:
      raise InputError(f'{path}:{number}: not "ID START END##SENTENCE"')
    video, *times = head.split()
    yield _event(f'{path}:{number}', video, times, sentence)


def _grounding(path) -> Iterator[Asked | str]:
  for video, entry in json.loads(path.read_text('utf-8')).items():
    for n, (times, sentence) in enumerate(zip(entry['timestamps'], entry['sentences'], strict=True)):
      yield _event(f'{path}: {video}: event {n}', video, times, sentence, {'seconds': float(entry['duration'])})


def _captions(path) -> Iterator[Asked | str]:
  for video, entry in json.loads(path.read_text('utf-8')).items():
    events = [_event(f'{path}: {video}: event {n}', video, times, sentence)
              for n, (times, sentence) in enumerate(zip(entry['timestamps'], entry['sentences'], strict=True))]
    yield from (event for event in events if isinstance(event, str))
    good = sorted((e for e in events if not isinstance(e, str)), key=lambda e: e.interval)
    if good:
      answer = '\n'.join(f'{span(e.interval)}: {e.extra["sentence"]}' for e in good)
      yield Asked(video, 'caption', DESCRIBE, answer,
                  extra={'events': [[*e.interval, e.extra['sentence']] for e in good]},
                  clip={'seconds': float(entry['duration'])})


def _qvhighlights(path) -> Iterator[Asked | str]:
  for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
    if not line.strip():
      continue
    entry, where = json.loads(line), f'{path}:{number}'
    if 'relevant_windows' not in entry:
      yield f'{where}: no "relevant_windows"; the test set is published without them'
      continue
    windows = [(float(a), float(b)) for a, b in entry['relevant_windows']]
    found = [_event(where, entry['vid'], w, entry['query'], {'seconds': float(entry['duration'])}) for w in windows]
    if bad := [f for f in found if isinstance(f, str)]:
      yield bad[0]
    elif found:
      # Several windows have no single interval to compare with; they are in "windows".
      extra = {'qid': entry['qid'], 'windows': [list(w) for w in windows],
               'saliency': [[c, *s] for c, s in zip(entry.get('relevant_clip_ids', ()),
                                                    entry.get('saliency_scores', ()))]}
      yield found[0]._replace(answer=', '.join(map(span, windows)), extra=extra,
                              **({} if len(windows) == 1 else {'type': 'windows', 'interval': None}))


def _nextqa(path) -> Iterator[Asked | str]:
  with open(path, encoding='utf-8', newline='') as file:
    for number, entry in enumerate(csv.DictReader(file), 2):
      options, answer = [entry[f'a{i}'] for i in range(5)], int(entry['answer'])
      if not 0 <= answer < 5 or None in options:
        yield f'{path}:{number}: the answer must be 0 to 4, and there must be five options'
        continue
      text = '\n'.join([entry['question'].strip() + '?', *(f'{l}. {o}' for l, o in zip(LETTERS, options)),
                        'Answer with the letter.'])
      yield Asked(entry['video'], entry['type'], text, LETTERS[answer], extra={'qid': entry['qid']})


FORMATS: dict[str, Callable[[pathlib.Path], Iterator[Asked | str]]] = {
    'charades-sta': _charades, 'activitynet-captions': _captions, 'activitynet-grounding': _grounding,
    'qvhighlights': _qvhighlights, 'next-qa': _nextqa}


def _event(where, video, times, sentence, clip=None) -> Asked | str:
  """The question when an event happens, or why its times are of no use."""
  start, end = map(float, times)
  if not 0 <= start < end < 1e9:
    return f'{where}: {start:g} to {end:g} s is no interval: {sentence.strip()!r}'
  sentence = sentence.strip()
  return Asked(video, 'ground', when(sentence), span((start, end)), (start, end), {'sentence': sentence}, clip or {})
