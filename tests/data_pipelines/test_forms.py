"""Rows as other projects write them: the same conversation in every form gives the same turns, and nothing is lost."""
import base64
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import forms, pipeline, sources, tokenizer
from data_pipelines.errors import InputError
from data_pipelines.sources import BadRow
from keye_jax.config import DataConfig

# No file system in the property tests: media are names.
EVERYWHERE = pathlib.Path('/')
ASK, SAY = {'role': 'user', 'content': '<video>What?'}, {'role': 'assistant', 'content': 'This.'}


@pytest.fixture
def anywhere(monkeypatch):
  monkeypatch.setattr(sources, '_found', lambda medium, *_: medium)


def parts_of(row):
  parsed = sources.parse(row, 'f:1', EVERYWHERE)
  return [(turn.role, *turn.parts) for turns in (parsed.trunk, *parsed.branches) for turn in turns]


USER, ANSWER = ('user', ('video', 'a.mp4'), ('text', 'What?')), ('assistant', ('text', 'This.'))


@pytest.mark.parametrize('row', [
    {'messages': [ASK, SAY], 'videos': ['a.mp4']},
    {'messages': [ASK, SAY], 'video': 'a.mp4'},
    {'messages': [ASK, SAY], 'videos': 'file:a.mp4', 'images': None},
    {'messages': [{'role': 'user', 'content': 'What?'}, SAY], 'videos': ['a.mp4']},                 # ms-swift, TRL
    {'messages': [{'role': 'user', 'content': [{'type': 'video'}, {'type': 'text', 'text': 'What?'}]}, SAY],
     'videos': [{'type': 'video', 'video': 'a.mp4'}]},
    {'messages': [{'role': 'user', 'content': [{'type': 'video_url', 'video_url': {'url': 'a.mp4'}, 'text': None},
                                               {'type': 'text', 'text': 'What?', 'video_url': None}]}, SAY]},
    {'messages': [ASK], 'videos': ['a.mp4'], 'solution': 'This.'},
    {'conversations': [{'from': 'human', 'value': '<video>What?'}, {'from': 'gpt', 'value': 'This.'}],
     'video': 'a.mp4', 'image': ''},
    {'conversations': [{'role': 'user', 'content': '<video>What?'}, {'role': 'assistant', 'content': 'This.'}],
     'videos': ['a.mp4']},
    {'prompt': [ASK], 'data_source': 'd', 'reward_model': {'style': 'rule', 'ground_truth': 'This.'},
     'extra_info': {'index': 3}, 'videos': [{'video': 'a.mp4'}]},
    {'prompt': [ASK], 'completion': [SAY], 'videos': ['a.mp4']},
    {'prompt': '<video>What?', 'completion': 'This.', 'videos': ['a.mp4']},
    {'problem': '<video>What?', 'solution': 'This.', 'videos': ['a.mp4']},
    {'problem': 'What?', 'solution': 'This.', 'path': 'a.mp4', 'data_type': 'video'}])
def test_one_question_in_many_forms(anywhere, row):
  assert parts_of(row) == [USER, ANSWER]


def test_system_texts_options_and_numbers(anywhere):
  row = {'system': 'Be brief.', 'problem': 'Which?', 'options': ['A. one', 'B. two'], 'solution': 2, 'image': 'a.png'}
  assert parts_of(row) == [
      ('system', ('text', 'Be brief.')), ('user', ('image', 'a.png'), ('text', 'Which?\nA. one\nB. two')),
      ('assistant', ('text', '2'))]


def test_a_timestamp_is_the_answer_and_the_interval(anywhere):
  row = {'sentence': 'a person opens the door.', 'timestamp': [1.25, 4], 'video': 'a.mp4', 'duration': 9}
  assert parts_of(row)[1] == ('assistant', ('text', '1.2 - 4.0'))
  extra = sources.parse(row, 'f:1', EVERYWHERE).extra
  assert extra['interval'] == [1.25, 4.0] and extra['duration'] == 9 and extra['timestamp'] == [1.25, 4]
  dated = {'messages': [ASK, SAY], 'videos': ['a.mp4'], 'timestamp': '2026-01-01'}
  assert sources.parse(dated, 'f:1', EVERYWHERE).extra == {'timestamp': '2026-01-01'}


def test_frames_take_pictures_in_the_order_of_their_markers(anywhere):
  talk = [{'from': 'human', 'value': '<frame>a<image>b<frame>'}, {'from': 'gpt', 'value': '<frame>'}]
  row = {'conversations': talk, 'frames': ['1.png', '2.png'], 'images': ['x.png']}
  assert [v for k, v in parts_of(row)[0][1:] if k == 'image'] == ['1.png', 'x.png', '2.png']
  assert parts_of(row)[1] == ('assistant', ('text', '<frame>'))
  row = {'conversations': talk, 'image': ['1.png', 'x.png', '2.png']}
  assert [v for k, v in parts_of(row)[0][1:] if k == 'image'] == ['1.png', 'x.png', '2.png']
  with pytest.raises(BadRow, match='2 <frame> markers for 1 pictures'):
    parts_of({'conversations': talk, 'frames': ['1.png'], 'images': ['x.png', 'y.png']})


@pytest.mark.parametrize('row, message', [
    ({'text': 'x'}, "no other form is recognised from the keys 'text'"),
    ({}, r'\(none\)'),
    ({'messages': [ASK], 'conversations': []}, 'both "messages" and "conversations"'),
    ({'messages': [ASK, SAY], 'videos': ['a'], 'audios': ['a.wav']}, '"audios" holds sound'),
    ({'messages': [ASK, SAY], 'videos': ['a'], 'video': 'a'}, 'both "videos" and "video"; keep one'),
    ({'messages': [ASK, SAY], 'videos': ['https://x.org/a.mp4']}, 'https://x.org/a.mp4 is not a file; download'),
    ({'messages': [ASK, SAY], 'videos': [['1.png', '2.png']]}, '"videos": .* go under "images"'),
    ({'messages': [ASK, SAY], 'videos': [{'bytes': b'x'}]}, '"videos": a video inside the row'),
    ({'messages': [ASK, SAY], 'images': ['data:image/png;base64,?']}, '"images": the data: address is not base64'),
    ({'messages': [ASK | {'tool_calls': [1]}, SAY]}, 'message 0: "tool_calls" is not read'),
    ({'messages': [ASK, {'role': 'assistant', 'content': [{'type': 'audio'}]}]}, "message 1: part 0: type 'audio'"),
    ({'messages': [{'role': 'user', 'content': [{'type': 'video', 'video': 'a', 'fps': 4.0}]}, SAY]},
     'message 0: part 0: "fps" of a video part is not read'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image', 'image': 'a', 'url': 'b'}]}]}, 'image and url both'),
    ({'conversations': ['x']}, 'conversation 0 must be an object with "from" and "value"'),
    ({'conversations': [{'from': 'human', 'value': 'x'}, {'from': 'observation', 'value': 'y'}]}, "role 'observation'"),
    ({'prompt': [ASK], 'videos': ['a'], 'reward_model': {'ground_truth': ['a', 'b']}}, 'ground_truth" is list'),
    ({'problem': 'x', 'solution': 'y', 'path': 'a.mp4'}, '"data_type" is not image or video'),
    ({'messages': [ASK], 'videos': ['a'], 'timestamp': [4, 2]}, '"timestamp" must be .start, end.'),
    ({'messages': [ASK], 'videos': ['a']}, 'no assistant message, nor "completion"'),
    ({'messages': [ASK, SAY], 'videos': ['a'], 'system': 'x', 'branches': 3}, '"branches" must be a list'),
    ({'messages': [ASK, {'role': 'assistant', 'content': 'a\ud800'}], 'videos': ['a']}, 'half a character')])
def test_what_would_be_lost_is_refused(anywhere, row, message):
  with pytest.raises(BadRow, match=f'^f:1: .*{message}') as e:
    parts_of(row)
  assert '\n' not in str(e.value)


TEXTS = st.text('ab \n"\\{é中😀', max_size=8)
KINDS = st.sampled_from(['image', 'video'])


@st.composite
def conversations(draw):
  """[(role, parts)]: turns of users and assistants in alternation; texts and media of a user in alternation."""
  turns, count = [], 0
  for _ in range(draw(st.integers(1, 3))):
    parts = [('text', draw(TEXTS))]
    for kind in draw(st.lists(KINDS, max_size=3)):
      parts += [(kind, f'{count}.{kind}'), ('text', draw(TEXTS))]
      count += 1
    turns += [('user', parts), ('assistant', [('text', draw(TEXTS))])]
  return turns


def marked(parts):
  return ''.join(v if kind == 'text' else f'<{kind}>' for kind, v in parts)


def typed(parts, bare):
  return [{'type': kind} | ({} if bare and kind != 'text' else {kind: v}) for kind, v in parts]


def written(turns, form) -> dict:
  media = {f'{kind}s': [v for _, parts in turns for k, v in parts if k == kind] for kind in ('image', 'video')}
  messages = [{'role': role, 'content': marked(parts)} for role, parts in turns]
  if form == 'messages':
    return {'messages': messages} | media
  if form in ('bare', 'typed'):
    content = [{'role': role, 'content': typed(parts, form == 'bare')} for role, parts in turns]
    return {'messages': content} | (media if form == 'bare' else {})
  if form == 'conversations':
    speaker = {'user': 'human', 'assistant': 'gpt'}
    return {'conversations': [{'from': speaker[m['role']], 'value': m['content']} for m in messages],
            'image': media['images'], 'video': media['videos']}
  answer = messages[-1]['content']
  if form == 'verl':
    return {'prompt': messages[:-1], 'data_source': 'd', 'extra_info': None,
            'reward_model': {'style': 'rule', 'ground_truth': answer}} | media
  if form == 'completion':
    return {'prompt': messages[:-1], 'completion': messages[-1:]} | media
  return {'messages': messages[:-1], 'solution': answer} | media


ALL = ('messages', 'bare', 'typed', 'conversations', 'verl', 'completion', 'solution')


@hypothesis.settings(deadline=None, derandomize=True, max_examples=40,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(conversations())
def test_the_same_conversation_in_every_form(anywhere, turns):
  expected = [(role, *[p for p in parts if p[1] != '']) for role, parts in turns]
  for form in ALL:
    if form in ('verl', 'solution') and len(turns) > 2:
      continue        # the answer would not be the first thing that an assistant says
    assert parts_of(json.loads(json.dumps(written(turns, form)))) == expected, form


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(['role', 'content', 'type', 'text', 'image', 'from', 'value', 'bytes', 'path',
                                         'ground_truth']) | st.text(max_size=3), inner, max_size=4), max_leaves=8)
KEYS = st.sampled_from([*forms.FORMS, 'branches', 'images', 'image', 'videos', 'video', 'frames', 'completion',
                        'system', 'solution', 'timestamp', 'reward_model', 'data_type', 'path', 'options', 'interval'])
NOISE = JSON | st.sampled_from([[ASK, SAY], [[ASK, SAY]], [{'from': 'human', 'value': '<frame>'}], 'a<video>'])


@hypothesis.settings(deadline=None, derandomize=True, max_examples=200,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.example(raw={'messages': [{'\n': False}]})
@hypothesis.example(raw={'messages': [{'role': 'user', 'content': [{'type': 'text', 'a\nb': 1}]}]})
@hypothesis.given(raw=st.dictionaries(KEYS | st.text(max_size=3), NOISE, max_size=5))
def test_any_object_is_a_row_or_a_bad_row(anywhere, raw):
  before = repr(raw)
  try:
    row = sources.parse(raw, 'f:1', EVERYWHERE)
  except BadRow as e:
    assert str(e).startswith('f:1: ') and '\n' not in str(e)
    return
  assert repr(raw) == before        # a row is read, never changed
  assert any(turn.role == 'assistant' for turns in (row.trunk, *row.branches) for turn in turns)


ROWS = [{'id': i, 'prompt': [{'role': 'user', 'content': f'<image>é {i}?'}], 'data_source': 'd',
         'reward_model': {'style': 'rule', 'ground_truth': str(i)}, 'extra_info': {'index': i}} for i in range(5)]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """The same five rows in every kind of file; in tables the picture lies in the row."""
  folder = tmp_path_factory.mktemp('files')
  Image.new('RGB', (56, 28), 'red').save(folder / 'a.png')
  picture = (folder / 'a.png').read_bytes()
  named = [row | {'images': ['a.png']} for row in ROWS]
  (folder / 'a.jsonl').write_text('\n'.join(map(json.dumps, named)))
  (folder / 'a.json').write_text(json.dumps(named, indent=2, ensure_ascii=False), encoding='utf-8')
  inside = [row | {'images': [{'bytes': picture, 'path': None}]} for row in ROWS]
  data = [row | {'images': ['data:image/png;base64,' + base64.b64encode(picture).decode()]} for row in ROWS]
  (folder / 'data.jsonl').write_text('\n'.join(map(json.dumps, data)))
  table = pa.Table.from_pylist(inside)
  pq.write_table(table, folder / 'a.parquet', row_group_size=2)
  for name, new in (('file.arrow', pa.ipc.new_file), ('stream.arrow', pa.ipc.new_stream)):
    with new(str(folder / name), table.schema) as writer:
      writer.write_table(table, max_chunksize=2)
  tokenizer.train_bpe(['é 0 1 2 3 4 ?'] * 9, 300).save(folder)
  return folder


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'data.jsonl', 'a.parquet', 'file.arrow', 'stream.arrow'])
def test_training_reads_every_kind_of_file(files, name):
  data = DataConfig(path=str(files / name), tokens=64, vision_rows=1, vision_patches=8, image_tokens_min=1)
  load = pipeline.Load(data, 14, 2, strict=True)
  assert [load.rows.where(i) for i in (0, 4)] == [f'{files / name}:1', f'{files / name}:5']
  for i in (4, 0, 2):
    example = load(i)
    words = load.tokenizer.decode(example.token_T[example.vision_T < 0])
    assert f'é {i}?' in words and words.rstrip().endswith(f'{i}<|im_end|>') and example.patch_PC.shape == (8, 588)
    assert load.rows[i].extra['extra_info'] == {'index': i}
  assert len(sources.fingerprint(files / name)) == 32
  question = next(pipeline.eval_examples(data))
  assert question.answer == '0' and question.extra['reward_model']['ground_truth'] == '0'


@pytest.mark.parametrize('name, data, message', [
    ('a.json', b'{"v1": {}}', 'a .json file must be a list of rows'),
    ('a.json', b'[{"a": 1}, {"b": ]', 'item 2 is not valid JSON'),
    ('a.json', b'[{"a": 1} {"b": 2}]', 'after item 1 there must be'),
    ('a.json', b'[{"a": 1}', 'after item 1 there must be .*cut off'),
    ('a.json', b' [ ] ', 'has no rows'),
    ('a.parquet', b'PAR1' + b'x' * 40 + b'PAR1', 'not a readable parquet file'),
    ('a.arrow', b'ARROW1' + b'\0' * 40, 'not a readable Arrow file')])
def test_files_that_are_not_what_they_seem(tmp_path, name, data, message):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(InputError, match=f'{name}: .*{message}') as e:
    sources.Rows(tmp_path / name)
  assert '\n' not in str(e.value)
  with pytest.raises(InputError, match='a folder; name one file'):
    sources.Rows(tmp_path)


def test_a_damaged_row_group_is_a_bad_row(files, tmp_path):
  data = bytearray((files / 'a.parquet').read_bytes())
  at = pq.ParquetFile(files / 'a.parquet').metadata.row_group(1).column(0).data_page_offset
  data[at:at + 8] = b'\xff' * 8
  (tmp_path / 'a.parquet').write_bytes(data)
  (tmp_path / 'a.png').write_bytes(b'')
  rows = sources.Rows(tmp_path / 'a.parquet')
  assert rows[0].extra['id'] == 0
  with pytest.raises(BadRow, match='a.parquet:3: .*damaged part of a table'):
    rows[2]
