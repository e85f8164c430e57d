"""Batches: resume, order, workers, skips, cache, grey, evaluation prompts."""
import dataclasses
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from grain.experimental import LimitIterDataset, assert_equal_output_after_checkpoint
from PIL import Image

from data_pipelines import chat, mixture, pipeline, tokenizer
from data_pipelines.errors import InputError
from data_pipelines.frameforge import render
from keye_jax.config import DataConfig
from tests.data_pipelines import clips

WORDS = 'red green blue one two three four five'.split()


@pytest.fixture(scope='module', autouse=True)
def parsed_flags():
  flags.FLAGS.mark_as_parsed()       # grain's worker processes read absl flags


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  """24 rows with an image each and 1-3 questions about it; rows 4 and 9 are bad."""
  folder = tmp_path_factory.mktemp('set')
  tokenizer.train_bpe([' '.join(WORDS)] * 9, 400).save(folder)
  rng, lines = np.random.default_rng(0), []
  for i in range(24):
    Image.fromarray(rng.integers(0, 256, (28, 56, 3), np.uint8)).save(folder / f'{i}.png')
    turns = [[{'role': 'user', 'content': ' '.join(rng.choice(WORDS, rng.integers(1, 5)))},
              {'role': 'assistant', 'content': f'{WORDS[b]} {i}'}] for b in range(rng.integers(1, 4))]
    row = {'id': i, 'images': [f'{i}.png'], 'messages': [{'role': 'user', 'content': '<image>'}], 'branches': turns,
           'type': [f't{b}' for b in range(len(turns))]}
    lines.append('{"broken' if i == 4 else json.dumps(row | {'images': ['none.png']} if i == 9 else row))
  (folder / 'train.jsonl').write_text('\n'.join(lines) + '\n')
  return folder / 'train.jsonl'


def config(path, **changes):
  return DataConfig(path=str(path), **({'tokens': 96, 'vision_rows': 1, 'vision_patches': 48, 'image_tokens_min': 1,
                                        'image_tokens_max': 4} | changes))


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    for left, right in zip(x, y):
      np.testing.assert_array_equal(left, right)


def samples_of(batch, small):
  """Text of every sample of a batch."""
  out = []
  for token_T, segment_T in zip(batch.token_BT, batch.segment_BT):
    for s in range(1, segment_T.max() // 256 + 1):
      out.append(small.decode(token_T[segment_T // 256 == s]))
  return out


def test_shapes_and_one_epoch_holds_every_good_row_once(path):
  small, it = tokenizer.load(path.parent), pipeline.train_batches(config(path), 2, seed=1)
  seen = []
  while len(seen) < 22:
    batch = next(it)
    assert batch.token_BT.shape == (2, 96) and batch.patch_BRNC.shape == (2, 1, 48, 588)
    assert batch.frame_BRN.dtype == np.int32 and batch.weight_BT.dtype == np.float32
    here = [int(text.rsplit(' ', 1)[1].split('<')[0]) for text in samples_of(batch, small)]
    assert it.sources == [f'{path}:{i + 1}' for i in here]
    seen += here
  it.close()
  # A window is filled as a whole, so an epoch's samples are all among the first windows' samples.
  assert set(seen) <= set(range(24)) - {4, 9} and len(seen) >= 22


def test_order_depends_on_the_seed_alone(path):
  batches = {}
  for name, (seed, changes) in {'a': (3, {}), 'b': (3, {'cache_mb': 8}), 'c': (4, {})}.items():
    it = pipeline.train_batches(config(path, **changes), 2, seed)
    batches[name] = take(it, 12)
    it.close()
  assert_same(batches['a'], batches['b'])
  assert any((x.token_BT != y.token_BT).any() for x, y in zip(batches['a'], batches['c']))


@pytest.mark.parametrize('together', [True, False])
def test_every_state_restores(path, together, monkeypatch):
  monkeypatch.setattr(pipeline, 'WINDOW_ROWS', 3)         # several windows, and states inside one
  load = pipeline.Load(config(path, pack=together), 14, 2, strict=False)
  stream = mixture.stream(load.rows, 5, 0, 1).map(load)
  packed = pipeline.Packed(stream, load, 2, pipeline.threaded, 24)
  assert_equal_output_after_checkpoint(LimitIterDataset(packed, 9))


def test_resume_equals_uninterrupted_with_counts(path):
  whole = pipeline.train_batches(config(path), 3, seed=7)
  expected = take(whole, 14)
  part = pipeline.train_batches(config(path), 3, seed=7)
  assert_same(take(part, 5), expected[:5])
  state = json.loads(json.dumps(part.get_state()))        # through a checkpoint's file
  part.close()
  again = pipeline.train_batches(config(path), 3, seed=7)
  again.set_state(state)
  assert again.get_state() == state
  assert_same(take(again, 9), expected[5:])
  assert again.stats() == whole.stats() and sum(again.stats()['skipped'].values()) > 1
  whole.close()
  again.close()


def test_bad_rows_are_counted_with_file_row_and_reason(path):
  it = pipeline.train_batches(config(path), 2, seed=0)
  while len(it.stats()['skipped']) < 2:
    next(it)
  it.close()
  assert set(it.stats()['skipped']) == {'bad JSON', 'missing media'}
  assert {m.split(': ')[0] for m in it.stats()['last']} == {f'{path}:5', f'{path}:10'}


def test_too_long_is_a_counted_skip_never_a_cut(path):
  it = pipeline.train_batches(config(path, tokens=24), 2, seed=0)
  small, texts = tokenizer.load(path.parent), []
  for batch in take(it, 8):
    texts += samples_of(batch, small)
  it.close()
  assert it.stats()['skipped']['too long'] > 0
  assert any('tokens do not fit a row of 24' in m for m in it.stats()['last'])
  assert all(t.startswith('<|im_start|>') and t.endswith('<|im_end|>\n') for t in texts)


def test_strict_raises_where_training_skips(path):
  with pytest.raises(InputError, match='train.jsonl:(5|10): '):
    it = pipeline.train_batches(config(path), 2, seed=0, strict=True)
    take(it, 20)


def test_no_usable_row_is_an_error_not_an_endless_loop(path):
  with pytest.raises(InputError, match='no row of the dataset can be used; the last: .*do not fit a row of 4'):
    next(pipeline.train_batches(config(path, tokens=4), 2, seed=0))


def test_processes_share_an_epoch(path):
  small, seen = tokenizer.load(path.parent), []
  for p in range(2):
    it = pipeline.train_batches(config(path, pack=False), 4, seed=2, process_index=p, process_count=2)
    for batch in take(it, 5):
      assert batch.token_BT.shape[0] == 2
      seen += samples_of(batch, small)
    it.close()
  assert len(set(seen)) == len(seen) == 20
  with pytest.raises(InputError, match='train.batch=3 rows are not divisible by 2'):
    pipeline.train_batches(config(path), 3, 0, 0, 2)


def test_packed_and_unpacked_carry_the_same_samples(path):
  small = tokenizer.load(path.parent)
  texts = []
  for pack in (True, False):
    it = pipeline.train_batches(config(path, pack=pack), 1, seed=3)
    texts.append(list(itertools.islice((t for b in it for t in samples_of(b, small)), 200)))
    it.close()
  assert set(texts[0]) == set(texts[1]) and len(set(texts[0])) == 22


def test_epochs_after_the_first_come_from_memory(path, monkeypatch):
  calls = []
  tokenize = chat.tokenize
  monkeypatch.setattr(chat, 'tokenize', lambda *a, **k: calls.append(1) or tokenize(*a, **k))
  it = pipeline.train_batches(config(path, cache_mb=8), 2, seed=1)
  take(it, 40)
  it.close()
  assert len(calls) <= 22 + 4         # a row may be read by two threads at once


def test_cache_stays_within_its_bytes(path):
  load = pipeline.Load(config(path), 14, 2, strict=False)
  example = load(0)
  size = sum(a.nbytes for a in example if isinstance(a, np.ndarray))
  cache = pipeline.Cache(int(size * 2.5))
  for i in range(3):
    cache.put(i, example)
  assert cache.get(0) is None and cache.get(1) is example and cache.get(2) is example


def test_grey_changes_pixels_and_nothing_else(path):
  plain, grey = (take(pipeline.train_batches(config(path, grey=g), 2, seed=1), 2) for g in (False, True))
  for a, b in zip(plain, grey):
    assert set(np.unique(b.patch_BRNC[b.frame_BRN > 0])) == {pipeline.GREY}
    assert_same([a._replace(patch_BRNC=0)], [b._replace(patch_BRNC=0)])


def test_clips_carry_their_times_and_a_broken_one_is_a_counted_skip(path, tmp_path):
  frames_FHW3 = np.random.default_rng(0).integers(0, 256, (7, 56, 56, 3), np.uint8)
  for name in ('good.mp4', 'broken.mp4'):
    render.write_mp4(tmp_path / name, frames_FHW3, fps=4)           # 0, 0.25, ... 1.5, held to 2 seconds
  (tmp_path / 'broken.mp4').write_bytes((tmp_path / 'good.mp4').read_bytes()[:300])
  lines = [{'videos': [name], 'messages': [{'role': 'user', 'content': '<video>red?'},
                                           {'role': 'assistant', 'content': 'blue'}]}
           for name in ('good.mp4', 'broken.mp4')]
  (tmp_path / 'd.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  tokenizer.load(path.parent).save(tmp_path)
  data = config(tmp_path / 'd.jsonl', vision_patches=64, frame_tokens_min=4, frame_tokens_max=4, pack=False)
  it, small = pipeline.train_batches(data, 2, seed=0), tokenizer.load(tmp_path)
  batch = take(it, 20)[-1]
  it.close()
  text = small.decode(batch.token_BT[0][batch.segment_BT[0] > 0])
  frames = ''.join(f'<|frame|>{t}' + '<|video_pad|>' * 4 for t in ('0.0', '0.5', '1.0', '1.5'))
  assert text == (f'<|im_start|>user\n<|vision_start|>{frames}<|vision_end|>red?<|im_end|>\n'
                  '<|im_start|>assistant\nblue<|im_end|>\n')
  assert batch.frame_BRN[0, 0].tolist() == [i for i in (1, 2, 3, 4) for _ in range(16)]
  assert set(it.stats()['skipped']) == {'media'}
  assert all(m.startswith(f'{tmp_path}/d.jsonl:2: {tmp_path}/broken.mp4: ') for m in it.stats()['last'])


@pytest.mark.slow
def test_workers_change_neither_order_nor_resume(path):
  """Spawns two worker processes twice."""
  expected = take(pipeline.train_batches(config(path), 2, seed=9), 10)
  it = pipeline.train_batches(config(path, workers=2), 2, seed=9)
  assert_same(take(it, 4), expected[:4])
  state = it.get_state()
  it.close()
  it = pipeline.train_batches(config(path, workers=2), 2, seed=9)
  it.set_state(state)
  assert_same(take(it, 6), expected[4:])
  it.close()


@pytest.mark.slow
@pytest.mark.parametrize('cache_mb', [0, 8])
def test_clips_of_workers_are_the_same_in_every_epoch(path, tmp_path, cache_mb):
  """They are handed over where they lie, but not what the cache keeps."""
  lines = []
  for i in range(3):
    clips.write(tmp_path / f'{i}.mp4', 12 + 4 * i, size=(56, 56))
    lines.append(json.dumps({'videos': [f'{i}.mp4'], 'messages': [{'role': 'user', 'content': '<video>red?'},
                                                                  {'role': 'assistant', 'content': WORDS[i]}]}))
  (tmp_path / 'd.jsonl').write_text('\n'.join(lines) + '\n')
  data = config(tmp_path / 'd.jsonl', tokenizer=str(path.parent), vision_patches=96, frame_tokens_min=4,
                frame_tokens_max=4, cache_mb=cache_mb)
  expected = take(pipeline.train_batches(data, 1, seed=2), 40)
  assert sum(int((batch.vision_BT >= 0).sum()) for batch in expected) > 100
  it = pipeline.train_batches(dataclasses.replace(data, workers=1), 1, seed=2)
  assert_same(take(it, 40), expected)
  it.close()


def test_fingerprints_follow_the_contents_only(path, tmp_path):
  base = pipeline.fingerprints(config(path))
  assert pipeline.fingerprints(config(path, cache_mb=5, workers=2)) == base
  (tmp_path / 'd.jsonl').write_text(path.read_text() + '\n')
  other = pipeline.fingerprints(config(tmp_path / 'd.jsonl', tokenizer=str(path.parent)))
  assert {what for what in base if base[what] != other[what]} == {'rows or media of the dataset'}


def test_questions_of_an_evaluation(path, tmp_path):
  lines = [line for i, line in enumerate(path.read_text().splitlines()) if i not in (4, 9)]
  good = path.parent / 'good.jsonl'
  good.write_text('\n'.join(lines) + '\n')
  data, rows = config(good), [json.loads(line) for line in lines]
  questions = list(pipeline.eval_examples(data))
  assert len(questions) == sum(len(r['branches']) for r in rows)
  small = tokenizer.load(path.parent)
  for q in questions:
    turn = rows[q.row]['branches'][q.branch]
    text = small.decode(q.prompt.token_T)
    assert text.endswith(f'<|vision_end|>{turn[0]["content"]}<|im_end|>\n<|im_start|>assistant\n')
    assert q.answer == turn[1]['content'] and q.extra['id'] == rows[q.row]['id'] and not q.prompt.weight_T.any()
    if len(rows[q.row]['branches']) > 1:
      assert q.extra['type'] == f't{q.branch}'
  # The prompt of a question is what its branch sees in training.
  load = pipeline.Load(data, 14, 2, strict=True)
  q = questions[0]
  e = load(0)
  sees = (e.branch_T == 0) | (e.branch_T == 1)
  np.testing.assert_array_equal(e.token_T[sees][:len(q.prompt.token_T)], q.prompt.token_T)
  np.testing.assert_array_equal(e.position_T3[sees][:len(q.prompt.token_T)], q.prompt.position_T3)
  with pytest.raises(InputError, match=f'{path}:5: not valid JSON'):
    list(pipeline.eval_examples(config(path)))


def test_tokenizer_beside_the_file_is_found(path, tmp_path):
  assert pipeline.open_tokenizer(config(path)).size == tokenizer.load(path.parent).size
  with pytest.raises(InputError, match='no tokenizer.json'):
    pipeline.open_tokenizer(dataclasses.replace(config(path), tokenizer=str(tmp_path)))


READ = """
import dataclasses, json, multiprocessing, sys
from configs import keye_vl_2_30b_a3b
from data_pipelines import pipeline
from keye_jax.config import RunConfig, freeze

def peak(process):
  return next(int(line.split()[1]) for line in open(f'/proc/{process}/status') if line.startswith('VmHWM'))

data = freeze(RunConfig, keye_vl_2_30b_a3b.get_config()).data
data = dataclasses.replace(data, path=sys.argv[1], vision_rows=9)
if sys.argv[2] == 'here':
  example = pipeline.Load(data, 14, 2, strict=True)(0)
  frames, size, tokens = int(example.frame_P[-1]), example.patch_PC.nbytes, (example.vision_T >= 0).sum()
  processes = ['self']
else:
  batches = pipeline.train_batches(dataclasses.replace(data, workers=1), 1, 0)
  batch = next(batches)
  held = batch.frame_BRN > 0
  frames = len(set(zip(*held.nonzero()[:2], batch.frame_BRN[held])))       # numbers are those of a vision row
  size, tokens = held.sum() * batch.patch_BRNC.shape[-1], (batch.vision_BT >= 0).sum()
  processes = [child.pid for child in multiprocessing.active_children()]
print(json.dumps([int(n) for n in (frames, size, tokens, *map(peak, processes))]))
if sys.argv[2] != 'here':
  batches.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='memory is read from /proc')
@pytest.mark.parametrize('where', ['here', 'in a worker'])
def test_two_hours_are_read_within_a_gigabyte(where, tmp_path):
  """Of the published model's budgets: 2,880 frames of 60 tokens, once in memory however they are needed."""
  clips.write(tmp_path / 'long.mp4', 3600, size=(180, 320), pts=np.arange(3600) * 2000, options={'preset': 'ultrafast'})
  row = {'videos': ['long.mp4'], 'messages': [{'role': 'user', 'content': '<video>What?'},
                                              {'role': 'assistant', 'content': 'Numbers.'}]}
  (tmp_path / 'rows.jsonl').write_text(json.dumps(row) + '\n')
  done = subprocess.run([sys.executable, '-c', READ, str(tmp_path / 'rows.jsonl'), where],
                        capture_output=True, text=True)
  assert not done.returncode, done.stderr[-2000:]
  frames, size, tokens, kib = json.loads(done.stdout)
  assert (frames, tokens, size) == (2880, 2880 * 60, 2880 * 168 * 280 * 3)
  assert kib * 1024 < 1e9
