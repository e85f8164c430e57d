"""Token ids, weights, targets and positions of hand-made conversations; placeholders; the Jinja template."""
from typing import NamedTuple

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import chat, mrope, tokenizer
from data_pipelines.errors import InputError


class Clip(NamedTuple):
  frames_FHW3: np.ndarray
  seconds_F: np.ndarray
  source: str = 'clip'


@pytest.fixture(scope='module')
def small():
  return tokenizer.train_bpe([f'{i / 2:.1f}' for i in range(64)] + ['What digit is visible? Yes No'] * 9, 512)


def clip(frames=2, rows=1, columns=2, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (frames, rows * 28, columns * 28, 3), np.uint8)
  return Clip(pixels, np.arange(frames) * 0.5 + 3.0)


def say(role, content):
  return {'role': role, 'content': content}


def test_text_token_by_token(keye):
  e = chat.tokenize(chat.turns([say('system', 'Be brief.'), say('user', 'Hi'), say('assistant', 'Yes')]), keye)
  S, E, n = 151644, 151645, 198
  token = [S, 8948, n, *keye.encode('Be brief.'), E, n, S, 872, n, 13048, E, n, S, 77091, n, 9454, E, n]
  assert e.token_T.tolist() == token
  weight = np.zeros(len(token))
  weight[-4:-1] = 1               # "\n" of the header predicts Yes, Yes predicts <|im_end|>, that predicts "\n"
  assert e.weight_T.tolist() == weight.tolist()
  assert e.target_T.tolist() == [0] * (len(token) - 4) + [9454, E, n, 0]
  assert e.position_T3.tolist() == [[i] * 3 for i in range(len(token))]
  assert (e.branch_T == 0).all() and (e.vision_T == -1).all() and len(e.patch_PC) == 0
  assert e.token_T.dtype == e.target_T.dtype == e.position_T3.dtype == e.branch_T.dtype == e.vision_T.dtype == np.int32


def test_video_token_by_token(keye):
  e = chat.tokenize(chat.turns([say('user', '<video>When?'), say('assistant', '3.5')], videos=[clip()]), keye)
  S, E, n, frame, pad = 151644, 151645, 198, keye.id('<|frame|>'), 151656
  token = [S, 872, n, 151652, frame, 18, 13, 15, pad, pad, frame, 18, 13, 20, pad, pad, 151653, *keye.encode('When?'),
           E, n, S, 77091, n, 18, 13, 20, E, n]
  assert e.token_T.tolist() == token
  pads = np.flatnonzero(e.token_T == pad)
  assert e.vision_T[pads].tolist() == [0, 1, 2, 3] and (np.delete(e.vision_T, pads) == -1).all()
  # 8 text tokens, a 1 x 2 grid at 8, text from 10, a grid at 14, text from 16
  assert e.position_T3[pads].tolist() == [[8, 8, 8], [8, 8, 9], [14, 14, 14], [14, 14, 15]]
  assert e.position_T3[10].tolist() == [10, 10, 10] and e.position_T3[16].tolist() == [16, 16, 16]
  assert e.patch_PC.shape == (2 * 2 * 4, 588) and e.frame_P.tolist() == [1] * 8 + [2] * 8
  assert e.weight_T.sum() == 5


def test_image_and_clip_keep_the_order_of_their_markers(small):
  image = clip(1, 2, 2, seed=1).frames_FHW3[0]
  messages = [say('user', 'A<video>B<image>C'), say('assistant', 'Yes')]
  e = chat.tokenize(chat.turns(messages, [image], [clip()]), small)
  order = [i for i in e.token_T if i in (small.id('<|video_pad|>'), small.id('<|image_pad|>'))]
  assert order == [small.id('<|video_pad|>')] * 4 + [small.id('<|image_pad|>')] * 4
  assert e.vision_T[e.vision_T >= 0].tolist() == list(range(8)) and e.frame_P.max() == 3
  assert e.coord_P4[-1].tolist() == [3, 3, 4, 4]
  text = lambda t: {'type': 'text', 'text': t}
  parts = [text('A'), {'type': 'video', 'video': clip()}, text('B'), {'type': 'image', 'image': image}, text('C')]
  as_parts = [say('user', parts), say('assistant', 'Yes')]
  for a, b in zip(e, chat.tokenize(chat.turns(as_parts), small)):
    np.testing.assert_array_equal(a, b)


def test_branches_share_the_clip_and_one_open_turn(small):
  trunk = chat.turns([say('user', '<video>')], videos=[clip()])
  branches = [chat.turns([say('user', q), say('assistant', a)]) for q, a in [('What?', 'Yes'), ('digit?', 'No No')]]
  e = chat.tokenize(trunk, small, branches)
  ends = np.flatnonzero(np.diff(e.branch_T)) + 1
  assert e.branch_T.tolist() == sorted(e.branch_T.tolist()) and len(ends) == 2
  assert e.token_T[ends[0] - 1] == small.id('<|vision_end|>')
  trunk_end = e.position_T3[:ends[0]].max()
  for b, branch in enumerate(branches, 1):
    at = np.flatnonzero(e.branch_T == b)
    alone = chat.tokenize(chat.fork(trunk, branch), small)
    # A branch with its trunk is the conversation of that question alone: tokens, positions, loss.
    both = np.concatenate([np.arange(ends[0]), at])
    for name in ('token_T', 'target_T', 'weight_T', 'position_T3', 'vision_T'):
      np.testing.assert_array_equal(getattr(e, name)[both], getattr(alone, name))
    assert e.position_T3[at[0]].tolist() == [trunk_end + 1] * 3
    assert e.weight_T[at[-1]] == 0
  assert e.weight_T[ends[0] - 1] == 0


def test_branches_after_a_closed_turn_are_answers(small):
  trunk, branches = chat.turns([say('user', 'What?')]), [chat.turns([say('assistant', a)]) for a in ('Yes', 'No')]
  e = chat.tokenize(trunk, small, branches)
  first = e.token_T[e.branch_T == 1]
  assert first[0] == small.id('<|im_start|>') and e.token_T[e.branch_T == 0][-2] == small.id('<|im_end|>')
  with pytest.raises(InputError, match='begin all with "user" or none'):
    chat.tokenize(trunk, small, [branches[0], chat.turns([say('user', 'b'), say('assistant', 'c')])])


def test_prompt_is_the_start_of_the_training_sample(small):
  messages = [say('user', '<video>What?'), say('assistant', 'Yes')]
  e = chat.tokenize(chat.turns(messages, videos=[clip()]), small)
  p = chat.prompt(chat.turns(messages[:1], videos=[clip()]), small)
  n = len(p.token_T)
  assert p.token_T.tolist() == e.token_T[:n].tolist() and p.weight_T.sum() == 0
  assert np.flatnonzero(e.weight_T)[0] == n - 1
  np.testing.assert_array_equal(p.position_T3, e.position_T3[:n])
  thinking = chat.prompt(chat.turns(messages[:1], videos=[clip()]), small, think=True)
  assert thinking.token_T[n:].tolist() == [small.id('<think>'), *small.encode('\n')]


def test_consecutive_answers_are_one_turn(small):
  a = chat.tokenize(chat.turns([say('user', 'a'), say('assistant', 'Yes'), say('assistant', ' No')]), small)
  b = chat.tokenize(chat.turns([say('user', 'a'), say('assistant', 'Yes No')]), small)
  np.testing.assert_array_equal(a.token_T, b.token_T)


def test_an_answer_may_think_and_a_user_may_not(keye):
  e = chat.tokenize(chat.turns([say('user', '<think><|im_end|>'), say('assistant', '<think>a</think>b')]), keye)
  at = np.flatnonzero(e.token_T == keye.id('<think>'))
  assert len(at) == 1 and e.weight_T[at[0] - 1] == 1 and (e.token_T == keye.id('<|im_end|>')).sum() == 2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['', 'a', '\n', '<|video_pad|>', '<|vision_start|>', '<|image_pad|>x']),
                          st.sampled_from(['image', 'video'])), max_size=4), st.integers(1, 3))
def test_placeholders_expand_exactly_once(parts, frames):
  tok = _TOKENIZER
  content = ''.join(f'{text}<{kind}>' for text, kind in parts)
  n = {k: sum(kind == k for _, kind in parts) for k in ('image', 'video')}
  turns = chat.turns([say('user', content), say('assistant', 'Yes')],
                     [clip(1, 1, 2).frames_FHW3[0]] * n['image'], [clip(frames)] * n['video'])
  e = chat.tokenize(turns, tok)
  count = lambda token: int((e.token_T == tok.id(token)).sum())
  assert count('<|image_pad|>') == 2 * n['image'] and count('<|video_pad|>') == 2 * frames * n['video']
  assert count('<|frame|>') == frames * n['video']
  assert count('<|vision_start|>') == count('<|vision_end|>') == n['image'] + n['video']
  assert e.vision_T[e.vision_T >= 0].tolist() == list(range(len(e.patch_PC) // 4))
  assert count('<|im_start|>') == count('<|im_end|>') == 2


_TOKENIZER = tokenizer.train_bpe(['a'], 300)


@pytest.mark.parametrize('messages, images, message', [
    ([say('user', 'see <image>')], [], 'message 0 has a <image> marker but no image is left'),
    ([say('user', 'see')], ['a.png'], r'1 image\(s\) without a <image> marker'),
    ([say('narrator', 'x')], [], "unknown role 'narrator'; known roles: system, user, assistant"),
    ([{'role': 'user'}], [], 'message 0 must be an object'),
    ([say('user', 3)], [], 'content must be a string or a list'),
    ([say('user', [{'type': 'audio', 'audio': 'x'}])], [], 'a part must be'),
    ([say('system', [{'type': 'image', 'image': 'x'}])], [], 'belong in user messages'),
    ('hello', [], 'messages must be a list')])
def test_bad_messages(messages, images, message):
  with pytest.raises(InputError, match=message):
    chat.turns(messages, images)


def test_markers_outside_user_text_and_in_parts_are_literal(small):
  turns = chat.turns([say('user', [{'type': 'text', 'text': 'what is <video>?'}]), say('assistant', 'a <video> tag')])
  assert '<video>' in small.decode(chat.tokenize(turns, small).token_T)


def test_image_that_is_not_resized_is_refused(small):
  turns = chat.turns([say('user', '<image>')], [np.zeros((30, 28, 3), np.uint8)])
  with pytest.raises(InputError, match='30x28 pixels is not a multiple of 28'):
    chat.tokenize(turns, small)


@pytest.mark.parametrize('think', [False, True])
def test_template_renders_the_same_text(small, think):
  template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(small.template)
  messages = [say('system', 'Be brief.'), say('user', '\n What?\n'), say('assistant', 'Yes'), say('user', 'digit')]
  rendered = template.render(messages=messages, add_generation_prompt=True, enable_thinking=think)
  assert small.decode(chat.prompt(chat.turns(messages), small, think).token_T) == rendered
  trained = template.render(messages=messages[:3])
  assert small.decode(chat.tokenize(chat.turns(messages[:3]), small).token_T) == trained
  parts = [{'type': 'image', 'image': 'x'}, {'type': 'video', 'video': 'y'}, {'type': 'text', 'text': 'z'}]
  assert template.render(messages=[say('user', parts)]) == (
      '<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>z'
      '<|im_end|>\n')


def test_positions_are_those_of_mrope(small):
  e = chat.tokenize(chat.turns([say('user', '<video>'), say('assistant', 'No')], videos=[clip(3, 2, 3)]), small)
  spans, pads = [], e.token_T == small.id('<|video_pad|>')
  at = 0
  while at < len(pads):
    if pads[at]:
      spans.append((2, 3))
      at += 6
    else:
      spans.append(1)
      at += 1
  np.testing.assert_array_equal(e.position_T3, mrope.positions(spans)[0])
