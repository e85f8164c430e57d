"""A build on Apache Beam, with the verbs of flow.py: the embedded DirectRunner, Dataflow, Flink, Spark.

Every worker must reach the rows, their media and the folder under the same paths (a mounted bucket, NFS): steps hand
samples over through it, Beam moves what is known of rows.
"""
import collections
import re
import shlex
from collections.abc import Callable
from typing import Any

from data_pipelines.errors import InputError


class Beam:

  def __init__(self, beam, pipeline):
    self._beam, self._pipeline, self._names = beam, pipeline, collections.Counter()

  def create(self, items) -> Any:
    return self._pipeline | self._name('create') >> self._beam.Create(list(items))

  def map(self, items, step: Callable, *sides) -> Any:
    return items | self._name(step) >> self._beam.FlatMap(_call, step, *map(self._beam.pvalue.AsSingleton, sides))

  def spread(self, items, step: Callable, *sides) -> Any:
    # Without it a runner fuses the steps, and the parts stay on the worker that made their list.
    return self.map(items | self._name('spread') >> self._beam.Reshuffle(), step, *sides)

  def group(self, items) -> Any:
    return items | self._name('group') >> self._beam.GroupByKey()

  def gather(self, items, step: Callable) -> Any:
    return (items | self._name('gather') >> self._beam.CombineGlobally(self._beam.combiners.ToListCombineFn())
            | self._name(step) >> self._beam.Map(_call, step))

  def _name(self, step) -> str:
    name = step if isinstance(step, str) else getattr(step, 'func', step).__name__
    self._names[name] += 1
    return f'{name} {self._names[name]}'


def _call(item, step, *sides):
  # Beam counts the arguments of a function, and miscounts those of a functools.partial.
  return step(item, *sides)


def run(flow: Callable[[Beam], Any], runner: str, args: str) -> None:
  """Runs a flow on the Beam runner of that name. args: its options, as one line. Raises InputError when Beam is not
  installed or does not take them."""
  try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as e:
    raise InputError(f"--runner {runner} needs Apache Beam, the extra `data`: pip install 'keye_jax[data]' ({e}); "
                     'without --runner the build runs on the processes of this machine') from None
  try:
    pipeline = apache_beam.Pipeline(options=PipelineOptions([f'--runner={runner}', *shlex.split(args)]))
  except (ValueError, ImportError, SystemExit) as e:
    raise InputError(f'--runner {runner} --beam-args {args!r}: {str(e).splitlines()[0]}') from None
  try:
    with pipeline:
      flow(Beam(apache_beam, pipeline))
  except Exception as e:       # of a step, in whatever the runner wraps it in
    if found := re.search(r'InputError: (.+?)(?: \[while running |$)', f'{type(e).__name__}: {e}', re.M):
      raise InputError(found[1]) from None
    raise
