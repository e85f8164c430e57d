"""What the tests of several parts share."""
import pytest

from data_pipelines import tokenizer


@pytest.fixture(scope='session')
def keye():
  """The full vocabulary: 2 s to build."""
  return tokenizer.load('')
