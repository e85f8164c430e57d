"""FrameForge clips with one question that asks for all events: a dense caption with an exact answer."""
import json
import pathlib

from data_pipelines.frameforge.script import LIST, said

FILE = 'heldout_events.jsonl'


def write(folder: pathlib.Path) -> None:
  """heldout_events.jsonl of a folder that `build` has filled."""
  rows = [json.loads(line) for line in (folder / 'heldout.jsonl').read_text(encoding='utf-8').splitlines()]
  part = folder / f'{FILE}.part'
  part.write_text(''.join(json.dumps(asked(row)) + '\n' for row in rows), encoding='utf-8')
  part.replace(folder / FILE)


def asked(row: dict) -> dict:
  """A row of clips with this question in the place of its own."""
  events = sorted(zip(row['events']['digit'], row['events']['interval']), key=lambda e: (e[0], e[1][0]))
  answer = ', '.join(said(digit, interval) for digit, interval in events)
  turns = [{'role': 'user', 'content': LIST}, {'role': 'assistant', 'content': answer}]
  return {key: row[key] for key in ('id', 'videos', 'messages', 'seconds', 'events')} | {
      'type': ['list'], 'branches': [turns]}
