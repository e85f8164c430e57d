"""FrameForge clips as text: what a language model learns the questions from before it sees a picture."""
import json
import pathlib

from data_pipelines.frameforge.script import HALF

FILES = {'train': 'text', 'heldout': 'heldout_text'}       # what is read -> what is written


def write(folder: pathlib.Path) -> None:
  """text.jsonl and heldout_text.jsonl of a folder that `build` has filled: the clips' questions, with a transcript in
  the place of the clip."""
  for split, name in FILES.items():
    rows = [json.loads(line) for line in (folder / f'{split}.jsonl').read_text(encoding='utf-8').splitlines()]
    part = folder / f'{name}.part'
    part.write_text(''.join(json.dumps(transcribed(row)) + '\n' for row in rows), encoding='utf-8')
    part.replace(folder / f'{name}.jsonl')


def transcribed(row: dict) -> dict:
  """A row of clips as a row of text: at every half second its time and the digits on screen."""
  shown, lines = list(zip(row['events']['digit'], row['events']['interval'])), []
  for t in range(round(row['seconds'] / HALF)):
    here = [str(digit) for digit, (start, end) in shown if start <= t * HALF < end]
    lines.append(f'{t * HALF:.1f} {" ".join(here)}'.strip())
  return {key: value for key, value in row.items() if key != 'videos'} | {
      'messages': [{'role': 'user', 'content': '\n'.join(lines) + '\n'}]}
