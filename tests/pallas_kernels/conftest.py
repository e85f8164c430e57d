import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from tests.pallas_kernels import kinds
from tests.pallas_kernels.cases import Case


@pytest.fixture(scope='session')
def fixtures():
  """Loads a file of tests/fixtures; its arrays `case_<field>` become one Case."""
  def load(name):
    with np.load(pathlib.Path(__file__).parent.parent / 'fixtures' / name) as file:
      arrays = {k: jnp.asarray(file[k]) for k in file.files}
    return arrays | {'case': Case(*(arrays[f'case_{field}'] for field in Case._fields))}
  return load


@pytest.fixture
def small_grouped_tiles(monkeypatch):
  kinds.grouped_in_small_tiles(monkeypatch)
