import json

import pytest

from data_pipelines import pipeline, text, tokenizer
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig

WORDS = 'def read(path):  # one line of the file\n  return path.read_text()\n'


@pytest.fixture(scope='module')
def words():
  return tokenizer.train_bpe([WORDS, 'assistant'], 320)


@pytest.fixture
def folder(tmp_path):
  for i in range(30):
    (tmp_path / 'src' / str(i)).mkdir(parents=True)
    (tmp_path / 'src' / str(i) / 'a.py').write_text(f'# file {i}\n' + WORDS * (i + 1))
  (tmp_path / 'src' / 'tests').mkdir()
  (tmp_path / 'src' / 'tests' / 'b.py').write_text(WORDS * 50)
  (tmp_path / 'src' / 'c.bin').write_text(WORDS * 50)
  return tmp_path / 'src'


def test_pieces_are_the_text_in_order(words):
  whole = WORDS * 20
  found = list(text.pieces(whole, words, 32))
  assert len(found) == len(words.encode(whole)) // 32 and whole.startswith(''.join(found))
  assert all(len(words.encode(piece)) <= 32 for piece in found)
  assert not list(text.pieces('short', words, 32))


def test_a_character_that_would_be_cut_is_left_out(words):
  whole = 'ä€' * 100                          # bytes of these characters are tokens of their own
  found = list(text.pieces(whole, words, 7))
  assert all(len(words.encode(piece, markup=True)) <= 7 for piece in found)


def test_a_file_lies_on_one_side_and_rows_are_always_the_same(folder, tmp_path, words):
  made = text.write(folder, tmp_path / 'out', words, 64)
  rows = {split: [json.loads(line) for line in (tmp_path / 'out' / f'{split}_64.jsonl').open()] for split in made}
  assert made == {split: len(found) for split, found in rows.items()} and all(made.values())
  sides = {split: {row['id'].split(':')[0] for row in found} for split, found in rows.items()}
  assert not sides['train'] & sides['heldout'] and all(map(text.is_held_out, sides['heldout']))
  assert not any('tests' in name or 'c.bin' in name for names in sides.values() for name in names)
  before = (tmp_path / 'out' / 'train_64.jsonl').read_bytes()
  text.write(folder, tmp_path / 'out', words, 64)
  assert (tmp_path / 'out' / 'train_64.jsonl').read_bytes() == before


def test_rows_fill_what_the_pipeline_reads(folder, tmp_path, words):
  text.write(folder, tmp_path / 'out', words, 64)
  data = DataConfig(path=str(tmp_path / 'out' / 'train_64.jsonl'), tokens=64, pack=False)
  batches = pipeline.train_batches(data, 4, seed=0, strict=True)
  batch = next(batches)
  batches.close()
  assert batch.token_BT.shape == (4, 64) and (batch.weight_BT.sum(1) >= 64 - text.FRAME).all()


def test_too_little_text_is_said(folder, tmp_path, words):
  with pytest.raises(InputError, match='no file of the train part has 100000 tokens'):
    text.write(folder, tmp_path / 'out', words, 100000)
  (tmp_path / 'none').mkdir()
  with pytest.raises(InputError, match='holds no text file'):
    text.files(tmp_path / 'none')
