import sys

import numpy as np
import pytest

from data_pipelines import memory

SHAPES = (1,), (3, 5, 7), (memory.STEP,), (2, memory.STEP - 1), (memory.STEP + 1, 2)


def filled(shape):
  array = memory.pages(shape)
  assert array.dtype == np.uint8 and not array.any()
  array[...] = np.random.default_rng(0).integers(1, 256, shape, np.uint8)
  return array


@pytest.mark.parametrize('shape', SHAPES)
def test_all_of_an_array_moves(shape):
  array = filled(shape)
  values = array.copy()
  new = memory.moved(array.reshape(-1, shape[-1]), np.empty)
  np.testing.assert_array_equal(new.reshape(shape), values)
  assert not np.shares_memory(new, array)


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere pages that were given back may keep their values')
def test_memory_is_given_back():
  array = filled((2 * memory.STEP + 5,))
  met = []

  def empty(shape, dtype):
    met.append((shape, dtype))
    return np.empty(shape, dtype)

  memory.moved(array, empty)
  assert met == [((2 * memory.STEP + 5,), np.uint8)]
  assert not array.any()


@pytest.mark.parametrize('of', [
    lambda a: a[1:], lambda a: a.T, lambda a: a[::-1], lambda a: np.frombuffer(bytes(a), np.uint8), np.copy,
    lambda a: np.zeros((0, 0), np.uint8)], ids=['a part', 'turned', 'backwards', 'bytes', 'a copy', 'nothing'])
def test_what_is_not_all_of_its_pages_stays(of):
  array = of(filled((64, 64)))
  assert memory.moved(array, np.empty) is array


def test_what_is_kept_stays():
  array = filled((64, 64))
  values = array.copy()
  array.flags.writeable = False
  assert memory.moved(array, np.empty) is array
  np.testing.assert_array_equal(array, values)
