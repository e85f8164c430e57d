"""The evaluate command on a small text model with random weights: noise, but the same noise by every path."""
import argparse
import dataclasses
import json

import jax
import pytest

from data_pipelines import tokenizer
from data_pipelines.errors import InputError
from keye_jax import api
from keye_jax.config import DataConfig, IndexerConfig, ModelConfig, TextConfig
from keye_jax.evals import scores
from keye_jax.evals.scores import Question
from keye_jax.hf import writer
from keye_jax.nn import keye
from launch import evaluate

ROWS = [{'id': f'clip {i}', 'seconds': 8.0, 'type': ['digit', 'ground'], 'interval': [None, [2.0, 4.0]],
         'others': [None, [[5.0, 6.0]]], 'messages': [{'role': 'user', 'content': f'one two three {i} '}],
         'branches': [[{'role': 'user', 'content': text}, {'role': 'assistant', 'content': answer}]
                      for text, answer in (('Which digit?', '7'), ('When?', '2.0 - 4.0'))]} for i in range(3)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> str:
  """A model exported as a Hugging Face folder, with rows.jsonl beside it."""
  root = tmp_path_factory.mktemp('evaluate')
  words = tokenizer.train_bpe(['one two three', 'Which digit?', 'When? 2.0 - 4.0'], 320)
  config = ModelConfig(text=TextConfig(layers=2, embed=32, heads=2, kv_heads=1, head_dim=16, vocab=320, ffn=32,
                                       mrope_section=(2, 3, 3), indexer=IndexerConfig(heads=2, head_dim=16, topk=6)),
                       attention='sparse')
  params = keye.init(config, jax.random.key(7))
  writer.export(str(root / 'model'), config, params, words, 'keye', DataConfig(), dtype='float32')
  (root / 'rows.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
  return str(root)


@pytest.mark.parametrize('attention', ['dense', 'sparse'])
def test_answers_equal_those_of_each_question_asked_alone(folder, attention):
  model, params = api.load_pretrained(f'{folder}/model', attention=attention)
  data = dataclasses.replace(model.data, path=f'{folder}/rows.jsonl')
  found = evaluate.answer(model.config, params, data, batch=2, new_tokens=5)
  assert [q.clip for q in found.questions] == [f'clip {i}' for i in range(3) for _ in range(2)]
  alone = [api.generate(model, params, [{'role': 'user', 'content': row['messages'][0]['content'] + b[0]['content']}],
                        max_tokens=5).strip() for row in ROWS for b in row['branches']]
  assert found.answers == alone and len(set(alone)) > 1


def test_command_prints_scores_and_protocol(folder, capsys):
  parser = argparse.ArgumentParser()
  evaluate.add_arguments(parser)
  arguments = ['--model', f'{folder}/model', '--data', f'{folder}/rows.jsonl', '--train', f'{folder}/rows.jsonl']
  assert evaluate.run(parser.parse_args([*arguments, '--json']), []) == 0
  said = json.loads(capsys.readouterr().out)
  majority = said['arms']['majority answer by type']
  assert majority['accuracy/digit'] == {'value': 1.0, 'low': pytest.approx(0.4385, abs=1e-4), 'high': 1.0, 'n': 3}
  assert majority['miou']['value'] == 1.0
  (constant,) = (v for k, v in said['arms'].items() if 'constant' in k)
  assert constant['miou']['value'] == 1.0 and 'accuracy' not in constant
  assert said['protocol']['questions'].startswith('6 of 3 clips')
  assert said['protocol']['attention'] == 'sparse, 6 keys a query'

  assert evaluate.run(parser.parse_args([*arguments, '--attention', 'dense']), []) == 0
  text = capsys.readouterr().out
  assert 'digit' in text and 'miou' in text and 'attention: dense' in text


def test_command_refuses_overrides(folder):
  with pytest.raises(InputError, match='--config.train.steps=3'):
    evaluate.run(argparse.Namespace(model=f'{folder}/model'), ['--config.train.steps=3'])


def test_compare_pairs_answers_by_question():
  asked = [Question('a', 'digit', '', '1'), Question('b', 'digit', '', '2')]
  first, second = (evaluate.Answered(asked, answers, 0.0) for answers in (['1', '2'], ['1', '9']))
  got = evaluate.compare(first, second)
  assert (got.value, got.first_better, got.second_better) == (0.5, 1, 0)
  with pytest.raises(ValueError, match='same questions'):
    evaluate.compare(first, second._replace(questions=asked[::-1]))


def test_table_lines_up():
  arms = {'sparse': {'accuracy/digit': scores.Score(0.9, 0.8, 1.0, 50), 'miou': scores.Score(0.5, 0.4, 0.6, 20)},
          'majority': {'accuracy/digit': scores.Score(0.1, 0.0, 0.2, 50)}}
  assert evaluate.table(arms).splitlines() == [
    '               digit       miou',
    'sparse         0.900      0.500',
    '           0.80-1.00  0.40-0.60',
    'majority       0.100          -',
    '           0.00-0.20',
    'questions         50         20',
  ]
