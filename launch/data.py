"""`keye data`: make or check a dataset.

    keye data frameforge --out DIR                  real clips with events whose answers are known exactly
    keye data tokenizer --data rows.jsonl           trains a small vocabulary on its text, for tiny models
    keye data check rows.jsonl                      reads every row and every medium, lists what cannot be used
    keye data stats rows.jsonl --plot a.png         lengths, durations and kinds, also as a picture
    keye data import --format charades-sta charades_sta_test.txt --videos DIR --out rows.jsonl
    keye data build rows.jsonl --out DIR            decoded, deduplicated, kept apart from evaluation sets, in shards
    keye data sheet --data rows.jsonl --out a.png   one FrameForge clip with its questions, as a picture
"""
import argparse
import base64
import json
import os
import pathlib
from collections.abc import Sequence

from tqdm import tqdm

from data_pipelines import annotations, frameforge, sources, tokenizer
from data_pipelines.errors import InputError
from launch import data_build, data_check, data_plot
from launch.run_config import HELP, load

SHOWN = 20      # unusable rows that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
  kinds = parser.add_subparsers(dest='kind', required=True, metavar='KIND')
  forge = kinds.add_parser('frameforge', help='make a FrameForge set')
  forge.add_argument('--out', required=True, help='folder; left as it is when it holds the same set')
  forge.add_argument('--train', type=int, default=2000, help='training clips')
  forge.add_argument('--heldout', type=int, default=300, help='held-out clips')
  forge.add_argument('--images', type=int, default=4000, help='single pictures')
  forge.add_argument('--seed', type=int, default=0)
  words = kinds.add_parser('tokenizer', help='train a small vocabulary; written beside the file')
  words.add_argument('--size', type=int, default=448, help='tokens, special ones included')
  check = kinds.add_parser('check', help='read every row and medium; exit code 1 when one cannot be used')
  stats = kinds.add_parser('stats', help='lengths, durations and kinds of the rows')
  stats.add_argument('--plot', default='', help='PNG file with the histograms')
  for kind in (check, stats):
    kind.add_argument('file', help='file of rows')
    kind.add_argument('--config', default='', help=f'with the sampling and shapes of a run: {HELP}')
    kind.add_argument('--workers', type=int, default=os.cpu_count(), help='processes; default: one a core')
  bring = kinds.add_parser('import', help='turn the annotations of a public dataset into rows')
  bring.add_argument('file', help='the annotation file as published')
  bring.add_argument('--format', required=True, choices=[*annotations.FORMATS, 'tfds'],
                     help='tfds: the file is a folder NAME/VERSION of data_pipelines/builders')
  bring.add_argument('--videos', default='', help='folder with the videos, or folders of them; not of tfds')
  bring.add_argument('--out', required=True, help='JSONL file to write')
  build = kinds.add_parser('build', help='make shards that training reads: no duplicate, nothing of an evaluation set')
  data_build.add_arguments(build)
  sheet = kinds.add_parser('sheet', help='draw one clip of a FrameForge file')
  sheet.add_argument('--row', type=int, default=0, help='which, from 0')
  sheet.add_argument('--out', required=True, help='PNG file')
  for kind in (words, sheet):
    kind.add_argument('--data', required=True, help='file of rows')
  for kind in (forge, words, check, stats, bring, build):
    kind.add_argument('--json', action='store_true', help='one JSON object on stdout')


def run(args: argparse.Namespace, config_args: Sequence[str]) -> int:
  if config_args and not getattr(args, 'config', ''):
    raise InputError(f'{config_args[0]}: there is no --config to override')
  match args.kind:
    case 'frameforge':
      made = forge(args.out, n_train=args.train, n_heldout=args.heldout, n_images=args.images, seed=args.seed)
      lines = [f'{args.out}/{kind}.jsonl: {made[kind]["rows"]} rows, {sum(made[kind]["questions"].values())} questions'
               for kind in frameforge.KINDS]
    case 'tokenizer':
      words = tokenizer.train_bpe(sources.texts(args.data), args.size)
      made = {'files': words.save(pathlib.Path(args.data).parent), 'size': words.size}
      lines = [f'{made["size"]} tokens: {", ".join(made["files"])}']
    case 'check' | 'stats':
      config = load(args.config, config_args) if args.config else None
      made, lines = data_check.check(args.file, config, args.workers), []
      if getattr(args, 'plot', ''):
        data_plot.draw(made, args.plot)
        lines = [args.plot]
      lines = data_check.lines(made) + (made['unusable'][:SHOWN] if args.kind == 'check' else []) + lines
      if (more := len(made['unusable']) - SHOWN) > 0 and args.kind == 'check':
        lines.append(f'and {more} more; --json lists all')
    case 'import':
      if bool(args.videos) == (args.format == 'tfds'):
        raise InputError('--videos: name the folder with the videos; only a TFDS dataset knows itself where they are')
      made = bring(args.format, args.file, args.videos, args.out) if args.videos else tfds(args.file, args.out)
      lines = [f'{args.out}: {made["rows"]} rows, {made["questions"]} questions']
      if made['missing']:
        lines.append(f'{len(made["missing"])} videos are not in {args.videos}: {", ".join(made["missing"][:SHOWN])}')
      lines += made['unusable'][:SHOWN]
      if len(made['unusable']) > SHOWN or len(made['missing']) > SHOWN:
        lines.append('--json lists all')
    case 'build':
      made = data_build.build(args, config_args)
      lines = data_build.lines(made, args.out)
    case 'sheet':
      rows = sources.Rows(args.data)
      if not 0 <= args.row < len(rows):
        raise InputError(f'{args.data}: has rows 0 to {len(rows) - 1}, not {args.row}')
      frameforge.contact_sheet(rows.raw(args.row), rows.path.parent, args.out)
      made, lines = {}, [args.out]
  print(json.dumps(made) if getattr(args, 'json', False) else '\n'.join(lines))
  return 1 if args.kind == 'check' and made['unusable'] else 0


def forge(out: str, **made: int) -> dict:
  """`frameforge.build` with a progress bar."""
  with tqdm(desc='frameforge', unit='file', leave=False) as bar:
    def progress(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)
    return frameforge.build(out, **made, progress=progress)


def bring(name: str, file: str, videos: str, out: str) -> dict:
  """Writes the rows of an annotation file: {'rows', 'questions', 'missing': videos that are not there, 'unusable'}.

  Paths are relative to the file written where the videos lie below it. Raises InputError when nothing can be written.
  """
  found = list(annotations.read(name, file))
  asked = [one for one in found if not isinstance(one, str)]
  names = {stem: _beside(video, out) for stem, video in annotations.find_videos(videos).items()}
  rows = list(annotations.rows(asked, names))
  if not rows:
    raise InputError(f'{videos}: holds none of the {len({one.video for one in asked})} videos that {file} asks about, '
                     f'such as {asked[0].video if asked else "(none)"}.mp4')
  return _written(rows, out) | {
      'missing': [v for v in dict.fromkeys(one.video for one in asked) if v not in names],
      'unusable': [one for one in found if isinstance(one, str)]}


def tfds(folder: str, out: str) -> dict:
  """Writes the rows of a TFDS dataset (its split train), as `bring` does; pictures go into the file. Raises InputError
  when there is none."""
  from data_pipelines import builders  # imports tensorflow_datasets, which takes seconds
  rows = list(builders.rows(folder))
  for row in rows:
    if 'images' in row:
      row['images'] = [f'data:;base64,{base64.b64encode(image).decode()}' for image in row['images']]
    else:
      row['videos'] = [_beside(video, out) for video in row['videos']]
  return _written(rows, out) | {'missing': [], 'unusable': []}


def _beside(video: str, out: str) -> str:
  """The path of a video, relative to the file of rows when it lies below its folder."""
  video, here = pathlib.Path(video).resolve(), pathlib.Path(out).resolve().parent
  return str(video.relative_to(here) if video.is_relative_to(here) else video)


def _written(rows: Sequence[dict], out: str) -> dict:
  path = pathlib.Path(out)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), 'utf-8')
  return {'rows': len(rows), 'questions': sum(len(row['branches']) for row in rows)}
