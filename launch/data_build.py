"""`keye data build`: from files of rows to shards of finished samples (data_pipelines/corpus), with progress."""
import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from data_pipelines.corpus import beam, flow, local, words
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig
from launch.run_config import HELP, load

UNBOUNDED = DataConfig(tokens=1 << 40, vision_rows=1, vision_patches=1 << 40)       # no row is too long
PATCH, MERGE = 14, 2
SIMILAR = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('file', nargs='+', help='files of rows')
  parser.add_argument('--out', required=True, help='folder to build; one that was begun goes on')
  parser.add_argument('--against', nargs='+', default=[], metavar='EVAL',
                      help='files of rows that are kept out: no row with one of their media, nor with words of theirs')
  parser.add_argument('--ngram', type=int, default=words.GRAM,
                      help=f'words in a row that must not be shared with them; default: {words.GRAM}')
  parser.add_argument('--same', choices=('row', 'medium', 'nothing'), default='row',
                      help='what two rows share for the later one to be dropped: media and text (default), or the '
                      'media; nothing: none is dropped')
  parser.add_argument('--embed', default='', metavar='MODEL',
                      help='a run or a Hugging Face folder of a Keye or a SigLIP: media that are alike to its vision '
                      'tower are taken for one as well, also against --against')
  parser.add_argument('--similar', type=float, default=SIMILAR,
                      help=f'cosine of their vectors from which on they are; default: {SIMILAR}')
  parser.add_argument('--config', default='', help=f'with the sampling and shapes of a run: {HELP}')
  parser.add_argument('--shard-rows', type=int, default=0,
                      help=f'rows that go into a shard; default: {flow.LEAST}, or as many as make {flow.SHARDS} shards')
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes; default: one a core')
  parser.add_argument('--runner', default='', help='an Apache Beam runner, such as DirectRunner, DataflowRunner or '
                      'FlinkRunner, instead of processes of this machine')
  parser.add_argument('--beam-args', default='', metavar='OPTIONS',
                      help='of that runner, in one argument: --beam-args="--project=p --region=r"')


def build(args: argparse.Namespace, config_args: Sequence[str]) -> dict[str, Any]:
  """Runs the build; returns the manifest. Raises InputError."""
  if args.ngram < 1 or args.shard_rows < 0 or args.workers < 1:
    raise InputError('--ngram and --workers must be at least 1, --shard-rows at least 0')
  if args.beam_args and not args.runner:
    raise InputError('--beam-args are of a --runner, and there is none')
  if not 0 < args.similar <= 1:
    raise InputError(f'--similar {args.similar} must be above 0 and at most 1')
  data, patch, merge = UNBOUNDED, PATCH, MERGE
  if args.config:
    config = load(args.config, config_args)
    data, patch, merge = config.data, config.model.vision.patch, config.model.vision.merge
  runner = (functools.partial(beam.run, runner=args.runner, args=args.beam_args) if args.runner else
            functools.partial(local.run, workers=args.workers))
  tower = None
  if args.embed:
    from launch import embed  # models, which the other commands for data do without
    tower = embed.tower(args.embed)
  with bars() as progress:
    return flow.build(args.file, args.out, data, patch, merge, runner, args.against, args.same, args.ngram,
                      args.shard_rows, progress, tower, args.similar, tower.digest if tower else '')


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
  """Bars with rate and time left, one for each thing that is counted; what an earlier run had done is no part of the
  rate."""
  shown: dict[str, tqdm] = {}

  def progress(what: str, done: int, of: int) -> None:
    if what not in shown and (done or what == 'rows'):
      shown[what] = tqdm(desc=what, total=of, initial=done, unit=what[:-1], leave=False)
    if what in shown:
      shown[what].update(done - shown[what].n)

  with contextlib.ExitStack() as stack:
    yield progress
    for bar in shown.values():
      stack.callback(bar.close)


def lines(made: dict[str, Any], out: str) -> list[str]:
  """The report as text."""
  size = sum(shard['bytes'] for shard in made['shards'])
  found = [f'{out}: {made["rows"]} of {made["read"]} rows, {made["tokens"]} tokens, {len(made["shards"])} shards, '
           f'{size / 2**20:.1f} MiB']
  if made['dropped']:
    found.append('dropped: ' + ', '.join(f'{reason} {n}' for reason, n in made['dropped'].items())
                 + f'; {os.path.join(out, flow.DROPPED)} says which for what')
  return found
