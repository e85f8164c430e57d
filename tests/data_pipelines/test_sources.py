"""Rows of a JSONL file: order of media, every kind of bad row with file and line, fingerprint."""
import json
import pickle
import shutil

import pytest

from data_pipelines import sources
from data_pipelines.errors import InputError
from data_pipelines.sources import BadRow

GOOD = {'id': 'g', 'images': ['a.png'], 'videos': ['b.mp4', 'c.mp4'], 'answer': 3, 'messages': [
    {'role': 'user', 'content': '<video>x<image>'}], 'branches': [
        [{'role': 'user', 'content': '<video>one'}, {'role': 'assistant', 'content': '1'}],
        [{'role': 'user', 'content': 'two'}, {'role': 'assistant', 'content': '2'}]]}


def folder(tmp_path, *lines):
  for name in ('a.png', 'b.mp4', 'c.mp4'):
    (tmp_path / name).write_bytes(name.encode())
  path = tmp_path / 'd.jsonl'
  path.write_text(''.join(line if isinstance(line, str) else json.dumps(line) + '\n' for line in lines))
  return path


def test_media_go_to_markers_in_order_across_branches(tmp_path):
  row = sources.Rows(folder(tmp_path, GOOD))[0]
  media = lambda turn: [(k, v.rsplit('/', 1)[1]) for k, v in turn.parts if k != 'text']
  assert media(row.trunk[0]) == [('video', 'b.mp4'), ('image', 'a.png')]
  assert media(row.branches[0][0]) == [('video', 'c.mp4')] and media(row.branches[1][0]) == []
  assert row.extra == {'id': 'g', 'answer': 3} and row.source.endswith('d.jsonl:1')


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
  rows = sources.Rows(folder(tmp_path, '\n', GOOD, '  \n', dict(GOOD, id='é'), json.dumps(dict(GOOD, id='last'))))
  assert len(rows) == 3 and [rows.where(i).rsplit(':', 1)[1] for i in range(3)] == ['2', '4', '5']
  assert [rows[i].extra['id'] for i in (2, 0, 1)] == ['last', 'g', 'é']
  assert pickle.loads(pickle.dumps(rows))[1].extra['id'] == 'é'


def without(**changes):
  return {k: v for k, v in (GOOD | changes).items() if v is not None}


@pytest.mark.parametrize('row, reason, message', [
    ('{"messages": [\n', 'bad JSON', 'not valid JSON'),
    ('[1]\n', 'bad JSON', 'must be a JSON object, not list'),
    (without(images=3), 'bad row', '"images": images are named by their paths'),
    (without(videos=['b.mp4', 'no.mp4']), 'missing media', "video 'no.mp4' does not exist"),
    (without(messages=None), 'bad row', 'no "messages", and no other form'),
    (without(branches={}), 'bad row', '"branches" must be a list'),
    (without(branches=[GOOD['branches'][0], []]), 'bad messages', 'a branch is empty'),
    (without(videos=['b.mp4']), 'bad messages', 'branch 0: message 0 has a <video> marker but no video is left'),
    (without(videos=['b.mp4', 'c.mp4', 'c.mp4']), 'bad messages', r'1 video\(s\) without a <video> marker'),
    (without(messages=[{'role': 'bot', 'content': 'x'}]), 'bad messages', "unknown role 'bot'"),
    ({'messages': [{'role': 'user', 'content': 'x'}]}, 'bad messages', 'no assistant message')])
def test_bad_rows_name_file_and_line(tmp_path, row, reason, message):
  path = folder(tmp_path, GOOD, row, GOOD)
  rows = sources.Rows(path)
  with pytest.raises(BadRow, match=f'^{path}:2: .*{message}') as e:
    rows[1]
  assert e.value.reason == reason and '\n' not in str(e.value) and pickle.loads(pickle.dumps(e.value)).reason == reason
  assert rows[0] and rows[2]
  with pytest.raises(InputError, match=':2: '):
    sources.check(path)


def test_check_counts_good_rows(tmp_path):
  assert sources.check(folder(tmp_path, GOOD, GOOD)) == 2


def test_texts_are_what_is_said(tmp_path):
  assert list(sources.texts(folder(tmp_path, GOOD))) == ['x', 'one', '1', 'two', '2']


def test_missing_and_empty_files(tmp_path):
  with pytest.raises(InputError, match='no such file'):
    sources.Rows(tmp_path / 'none.jsonl')
  with pytest.raises(InputError, match='data.path is empty'):
    sources.Rows('')
  with pytest.raises(InputError, match='has no rows'):
    sources.Rows(folder(tmp_path, '\n'))


def test_fingerprint_follows_content_not_place_or_date(tmp_path):
  (tmp_path / 'one').mkdir()
  path = folder(tmp_path / 'one', GOOD, 'not json\n')
  first = sources.fingerprint(path)
  shutil.copytree(tmp_path / 'one', tmp_path / 'two')
  assert sources.fingerprint(tmp_path / 'two' / 'd.jsonl') == first
  (tmp_path / 'two' / 'b.mp4').write_bytes(b'longer than before')
  assert sources.fingerprint(tmp_path / 'two' / 'd.jsonl') != first
  (tmp_path / 'one' / 'd.jsonl').write_text(json.dumps(GOOD | {'answer': 4}) + '\nnot json\n')
  assert sources.fingerprint(path) != first
