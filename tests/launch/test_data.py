import json

import numpy as np
import pytest
from PIL import Image

from launch import cli, data_check


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
  assert cli.main(['data', 'check', path, '--json', '--workers', '1']) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['rows'] == said['usable'] == said['videos'] == 3 and not said['unusable'] and not said['images']
  assert said['patches']['least'] >= 11 * 16 and said['tokens']['least'] > 11 * 6
  rows = [json.loads(line) for line in (forged / 'train.jsonl').read_text().splitlines()]
  assert said['seconds']['total'] == pytest.approx(sum(row['seconds'] for row in rows))
  assert sum(n for *_, n in said['seconds']['histogram']) == 3
  assert sum(said['kinds'].values()) == sum(len(row['type']) for row in rows)
  assert cli.main(['data', 'sheet', '--data', path, '--row', '2', '--out', str(tmp_path / 'a.png')]) == 0
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  assert cli.main(['data', 'sheet', '--data', path, '--row', '3', '--out', str(tmp_path / 'b.png')]) == 2


def test_check_names_what_cannot_be_used(forged, capsys):
  good = (forged / 'train.jsonl').read_text().splitlines()[0]
  broken = json.loads(good) | {'videos': ['train/none.mp4']}
  path = forged / 'mixed.jsonl'
  path.write_text('\n'.join([good, '{"messages"', json.dumps(broken)]))
  assert cli.main(['data', 'check', str(path), '--workers', '1']) == 1
  said = capsys.readouterr().out
  assert 'usable: 1' in said and 'mixed.jsonl:2' in said and "mixed.jsonl:3: video 'train/none.mp4'" in said
  # Against the shapes of a run: a clip does not fit a row of 64 tokens.
  arguments = ['data', 'check', str(forged / 'train.jsonl'), '--config', 'configs/quickstart.py:video', '--json',
               '--workers', '1']
  assert cli.main(arguments) == 0
  capsys.readouterr()
  assert cli.main([*arguments, '--config.data.tokens=64']) == 1
  assert json.loads(capsys.readouterr().out)['reasons'] == {'too long': 3}


def test_processes_find_what_one_finds(forged, capsys):
  path = forged / 'many.jsonl'
  good = (forged / 'train.jsonl').read_text().splitlines()
  path.write_text('\n'.join([*good, '{', *good]))
  said = []
  for workers in ('1', '2'):
    assert cli.main(['data', 'check', str(path), '--json', '--workers', workers]) == 1
    said.append(json.loads(capsys.readouterr().out))
  assert said[0] == said[1] and said[0]['usable'] == 6 and 'many.jsonl:4: not valid JSON' in said[0]['unusable'][0]


def test_stats_draws_its_histograms(forged, capsys, tmp_path):
  path = forged / 'half.jsonl'
  path.write_text((forged / 'train.jsonl').read_text() + '{"messages": 1}\n')
  assert cli.main(['data', 'stats', str(path), '--plot', str(tmp_path / 'a.png'), '--workers', '1']) == 0
  said = capsys.readouterr().out
  assert 'usable: 3' in said and 'bad row 1' in said and str(tmp_path / 'a.png') in said
  bars = {color: (np.asarray(Image.open(tmp_path / 'a.png').convert('RGB')) == color).all(-1) for color in
          ((0x25, 0x63, 0xeb), (0xc2, 0x41, 0x0c))}
  assert all(drawn.any(1).sum() > 100 for drawn in bars.values())          # their highest bars fill the panels
  assert cli.main(['data', 'stats', str(path), '--plot', str(tmp_path / 'no' / 'a.png'), '--workers', '1']) == 2
  assert 'cannot be written' in capsys.readouterr().err


def test_histogram_between_powers_of_two():
  found = data_check.spread([3, 4, 5, 20])
  assert found['histogram'] == [[2, 4, 1], [4, 8, 2], [8, 16, 0], [16, 32, 1]]
  assert (found['least'], found['median'], found['mean'], found['most'], found['total']) == (3, 4.5, 8, 20, 32)
  assert data_check.spread([0.5, 0])['histogram'] == [[0, 1, 2]] and data_check.spread([]) == {}
  assert data_check.spread([1])['histogram'] == [[1, 2, 1]]
