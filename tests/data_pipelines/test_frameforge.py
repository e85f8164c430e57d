"""Scripts against brute force, splits, balance against constant answers, drawn and written clips against events."""
import collections
import json
import re

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines import frameforge, sources, video
from data_pipelines.errors import InputError
from data_pipelines.frameforge import material, render, script
from keye_jax.config import DataConfig
from keye_jax.evals import baselines
from keye_jax.evals.scores import Question

COUNTS = {'n_train': 5, 'n_heldout': 3, 'n_images': 4}
SAMPLING = DataConfig(frame_tokens_min=4, frame_tokens_max=4, max_seconds=60.0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('forge')
  frameforge.build(path, **COUNTS, processes=1)
  return path


@pytest.fixture(scope='module')
def scripts():
  return [script.write(np.random.default_rng([0, 1, i])) for i in range(1500)]


def rows(folder, name):
  return [json.loads(line) for line in (folder / f'{name}.jsonl').read_text().splitlines()]


def files(folder):
  return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def simulate(plot):
  """What is on screen in each half second: list of sets of digits, and the list of appearances (digit, first, last)."""
  screen = [{e.digit for e in plot.events if e.start <= t < e.end} for t in range(plot.length)]
  appear = sorted((e.start, e.end, e.digit) for e in plot.events)
  return screen, appear


def solve(question, plot):
  """The answer, from the events and the text of the question alone."""
  screen, appear = simulate(plot)
  text, digits = question.text, [int(d) for d in re.findall(r'(?<![.\d])\d(?![.\d])', question.text)]
  first = lambda d: min(s for s, _, x in appear if x == d)
  if text.startswith('How many digits'):
    return str(len(appear))
  if text.startswith('How many times'):
    return str(sum(x == digits[0] for _, _, x in appear))
  if text.startswith('Which digit appears'):
    return str(appear[0 if 'first' in text else -1][2])
  if text.startswith('Which digit is shown at'):
    only, = screen[round(2 * float(re.search(r'at (\d\.\d)\?', text)[1]))]
    return str(only)
  if text.startswith('Does'):
    return 'before' if first(digits[0]) < first(digits[1]) else 'after'
  if text.startswith('Are'):
    return 'yes' if any(set(digits) <= shown for shown in screen) else 'no'
  if text == 'When does each digit appear?':
    return ', '.join(f'{d} {s / 2:.1f} - {e / 2:.1f}' for d, s, e in sorted((d, s, e) for s, e, d in appear))
  assert text.startswith('When does')
  (start, end), = ((s, e) for s, e, x in appear if x == digits[0])
  return f'{digits[0]} {start / 2:.1f} - {end / 2:.1f}'


def test_answers_follow_from_the_events(scripts):
  for plot in scripts:
    assert 4 <= len(plot.questions) <= 8
    for question in plot.questions:
      assert solve(question, plot) == question.answer, (question, plot.events)


def test_training_asks_for_all_events_as_well(scripts, folder):
  for i, plot in enumerate(scripts[:200]):
    taught = script.write(np.random.default_rng([0, 1, i]), teach=True)
    more, = [q for q in taught.questions if q.type == 'list']
    assert solve(more, taught) == more.answer
    assert taught._replace(questions=tuple(q for q in taught.questions if q is not more)) == plot
  assert all(row['type'].count('list') == 1 for row in rows(folder, 'train'))
  assert not any('list' in row['type'] for row in rows(folder, 'heldout'))


def test_events(scripts):
  for plot in scripts:
    assert 8 <= plot.length <= 14
    for e in plot.events:
      assert 0 <= e.start < e.end <= plot.length and e.end - e.start >= 2
      assert 0.1 <= (e.end - e.start) / plot.length <= 0.25
    spans = sorted({(e.start, e.end) for e in plot.events})
    assert all(a[1] < b[0] for a, b in zip(spans, spans[1:])), 'events touch or overlap'
    for q in (q for q in plot.questions if q.type == 'ground'):
      assert len({e.digit for e in plot.events}) >= 2 and q.interval not in q.others
      assert sorted([q.interval, *q.others]) == sorted(e.interval for e in plot.events)


def as_questions(plots):
  return [Question(str(i), q.type, q.text, q.answer, tuple(q.interval) if q.interval else None, tuple(q.others),
                   plot.length / 2) for i, plot in enumerate(plots) for q in plot.questions]


def test_nothing_can_be_had_without_looking(scripts):
  asked = as_questions(scripts)
  answers = collections.defaultdict(collections.Counter)
  for q in asked:
    answers[q.type, re.sub(r'\d(\.\d)?', '#', q.text)][q.expected] += 1
  share = {kind: max(found.values()) / sum(found.values()) for kind, found in answers.items()}
  assert share['cooccur', 'Are # and # shown together?'] == 0.5
  assert share['order', 'Does # appear before or after #?'] < 0.55
  assert share['count', 'How many digits appear?'] < 0.4 and share['count', 'How many times does # appear?'] < 0.4
  assert all(value < 0.15 for (kind, _), value in share.items() if kind == 'digit')
  assert {kind for kind, _ in share} == {'cooccur', 'order', 'count', 'digit', 'ground'}
  assert baselines.best_constant(asked)[2] <= 0.25
  # The asked event is the earliest, or the longest, of its clip as often as chance has it.
  ground = [q for q in asked if q.type == 'ground' and len(q.others) == 1]
  early = np.mean([q.interval[0] < q.others[0][0] for q in ground])
  length = lambda i: i[1] - i[0]
  unequal = [length(q.interval) > length(q.others[0]) for q in ground if length(q.interval) != length(q.others[0])]
  assert len(unequal) > 100 and abs(early - 0.5) < 0.06 and abs(np.mean(unequal) - 0.5) < 0.08


def test_order_is_not_given_away_by_the_digits(scripts):
  smaller = [(q.answer == 'before') == (int(q.text[5]) < int(q.text.split()[-1][0]))
             for plot in scripts for q in plot.questions if q.type == 'order']
  assert abs(np.mean(smaller) - 0.5) < 0.06


def test_slots_are_uniform_over_all_arrangements():
  rng = np.random.default_rng(0)
  found = collections.Counter(tuple(script.slots(rng, 9, 2, 2, 2)) for _ in range(15 * 400))
  assert len(found) == 15 and min(found.values()) > 300 and max(found.values()) < 500


def test_splits_share_no_material():
  train, heldout = material.digits('train'), material.digits('heldout')
  seen = {image.tobytes() for image in train.image_N88}
  assert not any(image.tobytes() in seen for image in heldout.image_N88)
  assert len(train.label_N) > 1200 and len(heldout.label_N) > 400
  for digits in (train, heldout):
    assert set(digits.label_N) == set(range(10)) and digits.image_N88.max() == 255
  for table in (material.CLIPS, material.PHOTOS):
    assert not set(table['train']) & set(table['heldout'])
  pairs = {'motorcycle', 'carphone'}         # two pictures, two clips of one scene
  for pair in pairs:
    assert len({split for table in (material.CLIPS, material.PHOTOS) for split, names in table.items()
                if any(pair in name for name in names)}) == 1


def test_drawn_frames_show_the_events_and_nothing_else():
  for split in ('train', 'heldout'):
    for i in range(8):
      plot = script.write(np.random.default_rng([1, i]))
      shown, _ = render.draw(np.random.default_rng(i), split, plot.events, plot.length, 56, 4)
      bare, _ = render.draw(np.random.default_rng(i), split, (), plot.length, 56, 4)
      assert shown.shape == (2 * plot.length - 1, 56, 56, 3)
      screen, _ = simulate(plot)
      for t, pixels in enumerate(shown):
        different = (pixels != bare[t]).any(-1)
        if not screen[t // 2]:
          assert not different.any()
          continue
        ys, xs = np.nonzero(different)
        assert np.ptp(ys) >= 26 and np.ptp(xs) >= 26             # half of the frame
        assert pixels[different].max() > 150 and np.median(pixels[different]) < 120      # bright ink on a dark plate
        if len(screen[t // 2]) == 2:
          assert different[:, :28].sum() > 500 and different[:, 28:].sum() > 500         # side by side


def test_clips_are_read_at_exact_half_seconds(folder):
  for name in ('train', 'heldout'):
    for row in rows(folder, name):
      path = folder / row['videos'][0]
      with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == 'h264' and stream.duration * stream.time_base == row['seconds']
        assert av.video.frame.PictureType.B in {frame.pict_type for frame in container.decode(stream)}
      clip = video.load_video(path, SAMPLING)
      np.testing.assert_array_equal(clip.seconds_F, np.arange(2 * row['seconds']) / 2)
      assert clip.frames_FHW3.shape[1:] == (56, 56, 3)


def test_written_clips_show_the_drawn_frames(folder):
  for i, row in enumerate(rows(folder, 'heldout')):
    rng = np.random.default_rng([0, 1, i])
    plot = script.write(rng)
    drawn, background = render.draw(rng, 'heldout', plot.events, plot.length, 56, 4)
    read = video.load_video(folder / row['videos'][0], SAMPLING).frames_FHW3.astype(float)
    assert row['background'] == background and row['events']['digit'] == [e.digit for e in plot.events]
    assert np.abs(read - drawn[::2]).mean() < 8           # of 255: chroma at half resolution, and the coder's noise


def test_rows(folder):
  for name in frameforge.KINDS:
    assert sources.check(folder / f'{name}.jsonl') == COUNTS['n_heldout' if name == 'heldout_images' else f'n_{name}']
  for row in rows(folder, 'train'):
    n = len(row['branches'])
    assert n == len(row['type']) == len(row['answer']) == len(row['interval']) == len(row['others'])
    assert row['messages'] == [{'role': 'user', 'content': '<video>'}]
    for (question, answer), kind, text, interval, others in zip(row['branches'], row['type'], row['answer'],
                                                                row['interval'], row['others']):
      assert question['role'] == 'user' and answer['role'] == 'assistant'
      if kind == 'order':          # both begin when the answer says, and that decides
        asked = re.findall(r'\d+', question['content'])
        begun = {str(d): interval[0] for d, interval in zip(row['events']['digit'], row['events']['interval'])}
        assert answer['content'] == ', '.join(f'{d} {begun[d]:.1f}' for d in asked) + f': {text}'
        assert text == ('before' if begun[asked[0]] < begun[asked[1]] else 'after')
      else:
        assert answer['content'] == text
      assert (interval is not None) == bool(others) == (kind == 'ground')
  shown = {name: {row['background'] for row in rows(folder, name)} for name in ('images', 'heldout_images')}
  assert not shown['images'] & shown['heldout_images']
  for row in rows(folder, 'images') + rows(folder, 'heldout_images'):
    with Image.open(folder / row['images'][0]) as picture:
      assert picture.size == (56, 56) and picture.mode == 'RGB'
    assert re.fullmatch(r'\d( and \d)?|none', row['answer']) and row['answer'] == row['messages'][1]['content']


def test_same_seed_same_bytes_whatever_the_processes_and_counts(folder, tmp_path):
  seen = []
  report = frameforge.build(tmp_path / 'a', **COUNTS, processes=2, progress=lambda *at: seen.append(at))
  assert files(tmp_path / 'a') == files(folder)
  assert report['train']['rows'] == 5 and seen[-1] == (15, 15)
  frameforge.build(tmp_path / 'b', n_train=2, n_heldout=1, n_images=1, processes=1)
  assert rows(tmp_path / 'b', 'train') == rows(folder, 'train')[:2]
  frameforge.build(tmp_path / 'c', n_train=2, n_heldout=1, n_images=1, seed=1, processes=1)
  assert rows(tmp_path / 'c', 'train') != rows(folder, 'train')[:2]


def test_a_finished_build_is_kept_and_another_refused(folder):
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  report = frameforge.build(folder, **COUNTS)
  assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before
  assert report == json.loads((folder / 'frameforge.json').read_text())
  with pytest.raises(InputError, match='other arguments'):
    frameforge.build(folder, **COUNTS, seed=5)


def test_larger_frames(tmp_path):
  frameforge.build(tmp_path, n_train=1, n_heldout=0, n_images=1, side=112, fps=8, processes=1)
  row, = rows(tmp_path, 'train')
  clip = video.load_video(tmp_path / row['videos'][0], SAMPLING)
  np.testing.assert_array_equal(clip.seconds_F, np.arange(2 * row['seconds']) / 2)
  assert clip.frames_FHW3.shape[1:3] == (56, 56)           # 112 x 112 are 16 tokens; 4 are allowed


def test_bad_arguments_and_missing_packages(tmp_path, monkeypatch):
  for bad in ({'side': 60}, {'side': 0}, {'fps': 5}):
    with pytest.raises(InputError, match='multiple of 28'):
      frameforge.build(tmp_path, **bad)
  with pytest.raises(InputError, match=r'keye_jax\[demo\]'):
    material._data('sklearn', 'no/such.csv')
  with pytest.raises(InputError, match=r'keye_jax\[demo\]'):
    material._data('no_such_package', 'a')


def test_contact_sheet(folder, tmp_path):
  row = rows(folder, 'heldout')[0]
  frameforge.contact_sheet(row, folder, tmp_path / 'sheet.png')
  with Image.open(tmp_path / 'sheet.png') as sheet:
    pixels = np.asarray(sheet)
  frame = video.load_video(folder / row['videos'][0], SAMPLING).frames_FHW3[0]
  found = [(y, x) for y in range(0, 20) for x in range(0, 8) if (pixels[y:y + 112:2, x:x + 112:2] == frame).all()]
  assert found                                              # the first frame, twice as large
