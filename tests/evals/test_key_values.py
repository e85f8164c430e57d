"""Pairs in a row of text, and questions about them, by hand."""
import jax
import numpy as np
import pytest

from data_pipelines import tokenizer
from keye_jax.evals import key_values
from tests.nn.batches import pack, sample

WORDS = tokenizer.train_bpe(['The code of anchor is 48213. # The code of basket is 10234.'], 300)


def row():
  """395 tokens of text and 5 of padding."""
  return jax.tree.map(np.asarray, pack([[sample(np.random.default_rng(0), 0, (2, 2), 395)]], 400, 0, 0))


def test_every_pair_is_in_the_row_and_is_asked_about():
  batch = row()
  made = key_values.plant(batch, WORDS, 3, 4)
  token_T, target_T = made.batch.token_BT[0], made.batch.target_BT[0]
  assert token_T[0] == batch.token_BT[0, 0] and (token_T[395:] == batch.token_BT[0, 395:]).all()
  assert (target_T[:-1] == token_T[1:]).all() and sorted(made.depth) != made.depth
  text = WORDS.decode(token_T[:395])
  for n, depth in enumerate(made.depth):
    at = np.flatnonzero(made.answer_T == n)
    answer = WORDS.decode(target_T[at])
    assert len(answer) == 5 and answer.isdigit() and (np.diff(at) == 1).all()
    question = text[:text.rindex(f'is {answer}')].rpartition('\n')[2] + f'is {answer}.'
    assert text.count(question) == 2                     # the pair and the question
    start = round(depth * 395)
    assert WORDS.decode(token_T[start:start + 40]).lstrip('\n').startswith(question)
  assert (made.batch.weight_BT[0] == (made.answer_T >= 0)).all()
  assert max(made.depth) * 395 < np.flatnonzero(made.answer_T >= 0).min()


def test_the_seed_decides():
  one, again, other = (key_values.plant(row(), WORDS, seed, 4) for seed in (3, 3, 4))
  assert (one.batch.token_BT == again.batch.token_BT).all() and one.depth == again.depth
  assert (one.batch.token_BT != other.batch.token_BT).any()


def test_an_answer_is_right_when_all_of_it_is():
  made = key_values.plant(row(), WORDS, 3, 2)
  logp_T, correct_T = np.full(400, -0.5), np.ones(400)
  correct_T[np.flatnonzero(made.answer_T == 1)[-1]] = 0
  found = key_values.marks(made, logp_T, correct_T)
  sizes = [(made.answer_T == n).sum() for n in (0, 1)]
  assert found == {'logp': [-0.5 * n for n in sizes], 'exact': [1, 0], 'depth': made.depth}


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='no room for 12 pairs'):
    key_values.plant(row(), WORDS, 0, 12)
  with pytest.raises(ValueError, match='at most 22 pairs'):
    key_values.plant(row(), WORDS, 0, 23)
