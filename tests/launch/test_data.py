import json

import pytest

from launch import cli


@pytest.fixture(scope='module')
def forged(tmp_path_factory):
  folder = tmp_path_factory.mktemp('forged')
  assert cli.main(['data', 'frameforge', '--out', str(folder), '--train', '3', '--heldout', '2', '--images', '2']) == 0
  return folder


def test_frameforge_is_made_once(forged, capsys):
  before = {p: p.stat().st_mtime_ns for p in forged.rglob('*.mp4')}
  arguments = ['data', 'frameforge', '--out', str(forged), '--train', '3', '--heldout', '2', '--images', '2']
  assert cli.main([*arguments, '--json']) == 0
  assert json.loads(capsys.readouterr().out)['train']['rows'] == 3
  assert {p: p.stat().st_mtime_ns for p in forged.rglob('*.mp4')} == before and len(before) == 5
  assert cli.main([*arguments, '--seed', '1']) == 2
  assert 'other arguments' in capsys.readouterr().err


def test_tokenizer_check_and_sheet(forged, capsys, tmp_path):
  path = str(forged / 'train.jsonl')
  assert cli.main(['data', 'tokenizer', '--data', path, '--size', '400', '--json']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['size'] <= 400 and (forged / 'tokenizer.json').is_file()
  assert cli.main(['data', 'check', '--data', path, '--json']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['rows'] == said['usable'] == 3 and not said['unusable']
  assert said['patches']['least'] >= 11 * 16 and said['tokens']['least'] > 11 * 6
  assert cli.main(['data', 'sheet', '--data', path, '--row', '2', '--out', str(tmp_path / 'a.png')]) == 0
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  assert cli.main(['data', 'sheet', '--data', path, '--row', '3', '--out', str(tmp_path / 'b.png')]) == 2


def test_check_names_what_cannot_be_used(forged, capsys):
  good = (forged / 'train.jsonl').read_text().splitlines()[0]
  broken = json.loads(good) | {'videos': ['train/none.mp4']}
  path = forged / 'mixed.jsonl'
  path.write_text('\n'.join([good, '{"messages"', json.dumps(broken)]))
  assert cli.main(['data', 'check', '--data', str(path)]) == 2
  said = capsys.readouterr().out
  assert 'usable: 1' in said and 'mixed.jsonl:2' in said and "mixed.jsonl:3: video 'train/none.mp4'" in said
  # Against the shapes of a run: a clip does not fit a row of 64 tokens.
  arguments = ['data', 'check', '--data', str(forged / 'train.jsonl'), '--config', 'configs/quickstart.py:video',
               '--json']
  assert cli.main(arguments) == 0
  capsys.readouterr()
  assert cli.main([*arguments, '--config.data.tokens=64']) == 2
  assert json.loads(capsys.readouterr().out)['reasons'] == {'too long': 3}
