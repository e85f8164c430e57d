"""A clip and its questions as one picture, for people."""
import json
import os
import pathlib

import av
from PIL import Image, ImageDraw

ZOOM, COLUMNS, LINE, GAP = 112, 8, 14, 4       # pixels, but for COLUMNS


def contact_sheet(row: dict, folder: str | os.PathLike, path: str | os.PathLike) -> None:
  """Writes a PNG with the frames of a row's clip at every half second, their times, and the questions with answers.

  `row` is one row of a FrameForge JSONL file, `folder` the folder of that file.
  """
  frames = []
  with av.open(str(pathlib.Path(folder) / row['videos'][0])) as container:
    for frame in container.decode(video=0):
      if round(frame.time / 0.5) * 0.5 == frame.time:
        frames.append((frame.time, frame.to_image().resize((ZOOM, ZOOM), Image.Resampling.NEAREST)))
  asked = [f'{kind}: {branch[0]["content"]}  {branch[1]["content"]}'
           for kind, branch in zip(row['type'], row['branches'])]
  asked.append(f'{row["id"]} on {row["background"]}, {row["seconds"]} s, events {json.dumps(row["events"])}')
  lines = -(-len(frames) // COLUMNS)
  height = lines * (ZOOM + LINE + GAP) + len(asked) * LINE + GAP
  sheet = Image.new('RGB', (COLUMNS * (ZOOM + GAP) + GAP, height), 'white')
  draw = ImageDraw.Draw(sheet)
  for i, (time, picture) in enumerate(frames):
    x, y = GAP + i % COLUMNS * (ZOOM + GAP), i // COLUMNS * (ZOOM + LINE + GAP)
    draw.text((x, y), f'{time:.1f}', 'black')
    sheet.paste(picture, (x, y + LINE))
  for i, text in enumerate(asked):
    draw.text((GAP, lines * (ZOOM + LINE + GAP) + i * LINE), text, 'black')
  sheet.save(path)
