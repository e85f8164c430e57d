import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu_call, tpu_call
from pallas_kernels.grouped_matmul import gpu, parts, tpu
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
  """Kernels of grouped products are interpreted, with small tiles; both are read while tracing."""
  for module, name, value in ((tpu_call, 'INTERPRET', True), (tpu, 'ROWS', (16, 8)), (tpu, 'COUNTED', 16),
                              (gpu_call, 'INTERPRET', True), (gpu, 'ROWS', 8), (gpu, 'FEATURES', 16),
                              (gpu, 'STEP', {2: 8, 4: 8}), (parts, 'COMBINED', 16)):
    monkeypatch.setattr(module, name, value)
