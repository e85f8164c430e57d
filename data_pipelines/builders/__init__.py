"""TFDS builders for rows about one clip or picture each, written as ArrayRecord; no TensorFlow to write nor to read.

    builder = builders.VideoQa(train='train.jsonl', data_dir='tfds', file_format='array_record')
    builder.download_and_prepare()
    builder.as_data_source('train')[0]

`train` and `heldout` are files of rows (data_pipelines/sources.py; `keye data import` makes them from the annotations
of Charades-STA, ActivityNet Captions, QVHighlights and NExT-QA). `rows(folder)` gives the rows back.
"""
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines import sources
from data_pipelines.builders import features
from data_pipelines.errors import InputError


class _Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset of rows; its name says what they hold."""
  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, train: str, heldout: str = '', **kwargs):
    self._files = {'train': train} | ({'heldout': heldout} if heldout else {})
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, description=type(self).__doc__, features=features.features(self.name))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(file) for split, file in self._files.items()}

  def _generate_examples(self, path: str):
    folder, rows = pathlib.Path(self._data_dir_root).resolve(), sources.Rows(path)
    for i in range(len(rows)):
      yield i, features.example(self.name, rows[i], folder)


class VideoQa(_Rows):
  """Questions about a clip, with their answers and types."""


class TemporalGrounding(_Rows):
  """Questions about a clip, with the interval in seconds in which something happens."""


class DenseCaptioning(_Rows):
  """All events of a clip with their times in seconds."""


class ImageQa(_Rows):
  """Questions about a picture, which is stored with them."""


def rows(folder: str, split: str = 'train') -> Iterator[dict[str, Any]]:
  """Rows of a prepared dataset, in the project's own form. folder: .../NAME/VERSION. Raises InputError when there is no
  such dataset or split."""
  path = pathlib.Path(folder).resolve()
  builder = tfds.builder_from_directory(path) if (path / 'dataset_info.json').is_file() else None
  if builder is None or split not in builder.info.splits:
    raise InputError(f'{folder}: no TFDS dataset with a split {split!r}; name the folder .../NAME/VERSION')
  source = builder.as_data_source(split)
  yield from (features.row(source[i], path.parent.parent) for i in range(len(source)))
