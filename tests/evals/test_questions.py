"""Prompts that share their clip, against prompts that the pipeline makes one question at a time."""
import dataclasses
import json

import numpy as np
import pytest

from data_pipelines import pipeline, tokenizer
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig
from keye_jax.evals import questions
from keye_jax.evals.scores import Question


def ask(role_pairs):
  return [{'role': role, 'content': content} for role, content in role_pairs]


ROWS = [
  {'id': 'forks', 'seconds': 8.0, 'type': ['digit', 'ground'], 'interval': [None, [2.0, 4.0]],
   'others': [None, [[5.0, 6.0]]], 'messages': ask([('user', 'one two three')]),
   'branches': [ask([('user', 'Which  digit?'), ('assistant', '7')]),
                ask([('user', 'When?'), ('assistant', '2.0 - 4.0')])]},
  {'id': 'turns', 'messages': ask([('user', 'hello'), ('assistant', 'yes'), ('user', 'again?'),
                                   ('assistant', 'no'), ('user', 'never asked')])},
  {'messages': ask([('user', 'short'), ('assistant', 'a')])},
]


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> DataConfig:
  folder = tmp_path_factory.mktemp('questions')
  tokenizer.train_bpe(['one two three', 'Which digit?', 'When? 2.0 - 4.0'], 360).save(folder)
  (folder / 'rows.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
  return DataConfig(path=str(folder / 'rows.jsonl'), tokens=64)


def test_questions_carry_what_scoring_needs(data):
  rows = list(questions.read(data))
  assert [q for row in rows for q in row.questions] == questions.texts(data.path) == [
    Question('forks', 'digit', 'Which digit?', '7', None, (), 8.0),
    Question('forks', 'ground', 'When?', '2.0 - 4.0', (2.0, 4.0), ((5.0, 6.0),), 8.0),
    Question('turns', 'answer', 'never asked', 'no'),
    Question(f'{data.path}:3', 'answer', 'short', 'a'),
  ]


def test_a_shared_prompt_reads_like_each_prompt_alone(data):
  """Trunk and branch together are the tokens and positions that the pipeline gives the question by itself."""
  alone = iter(pipeline.eval_examples(data))
  for row in questions.read(data):
    e = row.example
    assert not e.weight_T.any()
    forks = e.branch_T.any()
    for branch, last in enumerate(row.last_Q, int(forks)):
      mine = (e.branch_T == 0) | (e.branch_T == branch)
      expected = next(alone).prompt
      np.testing.assert_array_equal(e.token_T[mine], expected.token_T)
      np.testing.assert_array_equal(e.position_T3[mine], expected.position_T3)
      assert last == np.flatnonzero(mine)[-1]
  assert next(alone, None) is None


def test_groups_come_in_few_shapes(data):
  first, second = questions.groups(questions.read(data), 2)
  assert first.last_BQ.shape == (2, 2) and second.last_BQ.shape == (2, 1)
  assert first.last_BQ[1, 1] == -1 and (second.last_BQ[1] == -1).all()
  assert first.batch.token_BT.shape == second.batch.token_BT.shape == (2, 64)
  assert not second.batch.segment_BT[1].any()
  assert [len(g.questions) for g in (first, second)] == [3, 1]
  longest = int(first.batch.order_BT[first.batch.segment_BT > 0].max()) + 1
  (as_trained, _) = questions.groups(questions.read(data), 2, tokens=longest)
  assert as_trained.batch.token_BT.shape == (2, longest)
  assert next(questions.groups(questions.read(data), 2, tokens=longest - 1)).batch.token_BT.shape == (2, 64)


@pytest.mark.parametrize('change, message', [
  ({'interval': [2.0, 4.0, 5.0]}, '"interval" must be a list with an item for each of 2 branches'),
  ({'interval': [None, [4.0, 2.0]]}, 'has no length'),
  ({'others': [None, [3.0]]}, '"others" a list of such'),
  ({'seconds': 'long'}, '"seconds" a number'),
])
def test_a_row_with_bad_extras_is_named(tmp_path, data, change, message):
  path = tmp_path / 'bad.jsonl'
  path.write_text(json.dumps(ROWS[0] | change))
  with pytest.raises(InputError, match=f'bad.jsonl:1.*{message}'):
    questions.texts(str(path))


@pytest.mark.parametrize('message, row, expected', [
    ('7 2.0, 3 4.5: before', {'answer': 'before'}, 'before'), ('before', {'answer': 'before'}, 'before'),
    ('7 2.0, 3 4.5: before', {}, '7 2.0, 3 4.5: before'),
    ('0.0 - 4.0: One.\n5.0 - 9.0: Two.', {'answer': 2}, '0.0 - 4.0: One.\n5.0 - 9.0: Two.')])
def test_reasons_are_left_out_where_the_row_says_what_the_answer_is(message, row, expected, tmp_path):
  asked = ask([('user', 'Does 7 appear before or after 3?'), ('assistant', message)])
  (tmp_path / 'rows.jsonl').write_text(json.dumps({'messages': asked} | row))
  found, = questions.texts(str(tmp_path / 'rows.jsonl'))
  assert found.expected == expected


def test_a_question_without_an_answer_is_refused(tmp_path, data):
  row = ROWS[0] | {'branches': [ROWS[0]['branches'][0], ask([('user', 'When?')])]}
  (tmp_path / 'rows.jsonl').write_text(json.dumps(row))
  bad = dataclasses.replace(data, path=str(tmp_path / 'rows.jsonl'), tokenizer=str(data.path.rsplit('/', 1)[0]))
  with pytest.raises(InputError, match='rows.jsonl:1: a question without an assistant message'):
    list(questions.read(bad))
