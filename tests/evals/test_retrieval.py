"""A picture finds its caption, by hand."""
import numpy as np
import pytest

from keye_jax.evals.retrieval import image_to_text


def test_equal_captions_are_one_candidate():
  captions = ['two', 'one', 'two', 'three']
  text_NW = np.eye(3)[[0, 1, 0, 2]]
  image_NW = np.array([[.9, .1, 0], [.2, .7, .1], [.4, .3, .3], [.5, .1, .4]])      # the last finds another's
  found = image_to_text(image_NW, text_NW, captions)
  assert {name: score.value for name, score in found.items()} == {'retrieval': 0.75, 'chance': 1 / 3, 'majority': 0.5}
  assert found['retrieval'].n == 4 and found['retrieval'].low < 0.75 < found['retrieval'].high


def test_lists_that_do_not_belong_together_are_refused():
  with pytest.raises(ValueError, match='2 pictures, 2 texts and 1 captions'):
    image_to_text(np.eye(2), np.eye(2), ['a'])
  with pytest.raises(ValueError, match='0 pictures'):
    image_to_text(np.zeros((0, 2)), np.zeros((0, 2)), [])
