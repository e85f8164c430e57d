"""Conversations to tokens: ChatML, media expanded to placeholder tokens, loss on what the assistant says.

    <|im_start|>role\\ncontent<|im_end|>\\n        an image: <|vision_start|> N x <|image_pad|> <|vision_end|>
    a clip: <|vision_start|> then for every frame <|frame|> "12.5" N x <|video_pad|>, then <|vision_end|>

"12.5" is the frame's time in seconds. Facts: Keye-VL-2.0's SFT mask and vLLM's Keye-1.5 processor. A conversation may
fork: several branches continue one trunk, each sees the trunk and itself. When the trunk ends with a user turn and the
branches begin with one, that turn is one turn, left open by the trunk.
"""
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import mrope
from data_pipelines.errors import InputError
from data_pipelines.images import patchify
from data_pipelines.schema import MAX_BRANCHES, Example
from data_pipelines.tokenizer import Tokenizer

ROLES = ('system', 'user', 'assistant')
_MARKER = re.compile('(<image>|<video>)')


class Turn(NamedTuple):
  """One message. A part is ('text', str), ('image', image) or ('video', clip); before loading the media are paths."""
  role: str
  parts: tuple[tuple[str, Any], ...]


class _Piece(NamedTuple):
  ids: list[int]
  grid: tuple[int, int] | None     # (rows, columns) of merged tokens, or None for text
  loss: bool


def turns(messages: Sequence[dict], images: Sequence = (), videos: Sequence = (), where: str = 'messages',
          media: tuple[Iterator, Iterator] | None = None) -> list[Turn]:
  """Messages to turns.

  Content is a string, in which each `<image>` / `<video>` of a user message takes the next of `images` / `videos`, or
  a list of {'type': 'text', 'text': ...}, {'type': 'image', 'image': ...}, {'type': 'video', 'video': ...} whose text
  is always literal; a part without its medium takes the next one, as a marker does. `media` hands in iterators that
  several calls share (trunk, then branches); leftovers are then the caller's to check. Raises InputError for an unknown
  role, a malformed message, a marker without its medium or a medium without its marker.
  """
  image_iter, video_iter = media or (iter(images), iter(videos))
  out = []
  if not isinstance(messages, (list, tuple)):
    raise InputError(f'{where}: messages must be a list of {{"role", "content"}}')
  for i, message in enumerate(messages):
    at = f'{where}: message {i}'
    if not isinstance(message, dict) or 'role' not in message or 'content' not in message:
      raise InputError(f'{at} must be an object with "role" and "content"')
    role, content = message['role'], message['content']
    if role not in ROLES:
      raise InputError(f'{at}: unknown role {role!r}; known roles: {", ".join(ROLES)}')
    if isinstance(content, str):
      parts = _marked(content, image_iter, video_iter, at) if role == 'user' else [('text', content)]
    elif isinstance(content, (list, tuple)):
      parts = [_listed(part, image_iter, video_iter, at) for part in content]
    else:
      raise InputError(f'{at}: content must be a string or a list of parts')
    if role != 'user' and any(kind != 'text' for kind, _ in parts):
      raise InputError(f'{at}: images and videos belong in user messages, not in a {role} message')
    parts = _merge_text(parts)
    if role == 'assistant' and out and out[-1].role == role:
      out[-1] = Turn(role, _merge_text([*out[-1].parts, *parts]))     # consecutive answers are one turn
    else:
      out.append(Turn(role, parts))
  if media is None:
    check_used(image_iter, video_iter, where)
  return out


def check_used(image_iter: Iterator, video_iter: Iterator, where: str) -> None:
  """Raises InputError when media are left that no marker asked for."""
  for name, rest in (('image', image_iter), ('video', video_iter)):
    if left := len(list(rest)):
      raise InputError(f'{where}: {left} {name}(s) without a <{name}> marker in a user message')


def fork(trunk: Sequence[Turn], branch: Sequence[Turn]) -> list[Turn]:
  """The single conversation that a branch reads: a user turn split between trunk and branch is joined."""
  if trunk and branch and trunk[-1].role == branch[0].role == 'user':
    return [*trunk[:-1], Turn('user', trunk[-1].parts + branch[0].parts), *branch[1:]]
  return [*trunk, *branch]


def tokenize(trunk: Sequence[Turn], tokenizer: Tokenizer, branches: Sequence[Sequence[Turn]] = (), patch: int = 14,
             merge: int = 2, source: str = '', in_place: bool = False) -> Example:
  """Turns with loaded media (images uint8 [h, w, 3], clips with frames_FHW3 and seconds_F) to a training sample.

  in_place: the patches of clips take the memory of their frames, so that a long clip is there once.

  Weight 1 on every token of an assistant turn after its header, through `<|im_end|>\\n`; the targets are already
  shifted, inside each branch. Raises InputError for more than 255 branches or a fork that is not clear.
  """
  if len(branches) > MAX_BRANCHES:
    raise InputError(f'{source}: {len(branches)} branches, at most {MAX_BRANCHES} are supported')
  heads = {branch[0].role == 'user' for branch in branches if branch}
  is_open = bool(trunk) and trunk[-1].role == 'user' and True in heads
  if is_open and (False in heads or not all(branches)):
    raise InputError(f'{source}: some branches continue the user turn and some do not; begin all with "user" or none')
  vision: list[tuple] = []
  cut = _Cut(patch, merge, in_place)
  lists = [_pieces(trunk, tokenizer, cut, vision, end_open=is_open)]
  lists += [_pieces(b, tokenizer, cut, vision, start_open=is_open) for b in branches]
  return _assemble(lists, vision, source)


def prompt(trunk: Sequence[Turn], tokenizer: Tokenizer, think: bool = False, patch: int = 14, merge: int = 2,
           source: str = '') -> Example:
  """Turns to a prompt for generation: it ends with `<|im_start|>assistant\\n`, plus `<think>\\n` on request.

  All weights are 0."""
  vision: list[tuple] = []
  pieces = _pieces(trunk, tokenizer, _Cut(patch, merge, False), vision)
  header = [tokenizer.id('<|im_start|>'), *tokenizer.encode('assistant\n')]
  if think:
    header += [tokenizer.id('<think>'), *tokenizer.encode('\n')]
  return _assemble([[*pieces, _Piece(header, None, False)]], vision, source)


def _marked(content, image_iter, video_iter, at):
  parts = []
  for piece in _MARKER.split(content):
    if piece in ('<image>', '<video>'):
      parts.append(_next(piece[1:-1], image_iter, video_iter, at))
    else:
      parts.append(('text', piece))
  return parts


def _next(kind, image_iter, video_iter, at):
  medium = next(image_iter if kind == 'image' else video_iter, None)
  if medium is None:
    raise InputError(f'{at} has a <{kind}> marker but no {kind} is left for it; list it under "{kind}s"')
  return kind, medium


def _listed(part, image_iter, video_iter, at):
  kind = part.get('type') if isinstance(part, dict) else None
  if kind in ('image', 'video') and kind not in part:
    return _next(kind, image_iter, video_iter, at)
  if kind not in ('text', 'image', 'video') or kind not in part or (kind == 'text' and not isinstance(part[kind], str)):
    raise InputError(f'{at}: a part must be {{"type": "text", "text": ...}}, {{"type": "image", "image": ...}} or '
                     '{"type": "video", "video": ...}')
  return kind, part[kind]


def _merge_text(parts):
  out = []
  for kind, value in parts:
    if kind == 'text' and out and out[-1][0] == 'text':
      out[-1] = ('text', out[-1][1] + value)
    elif kind != 'text' or value:
      out.append((kind, value))
  return tuple(out)


class _Cut(NamedTuple):
  """How media become patches."""
  patch: int
  merge: int
  in_place: bool          # of clips; a picture's pixels may be read-only


def _pieces(turns_, tokenizer, cut: _Cut, vision, start_open=False, end_open=False) -> list[_Piece]:
  """Tokens of some turns; patches of their media are appended to `vision`."""
  start, newline = tokenizer.id('<|im_start|>'), tokenizer.encode('\n')
  end = [tokenizer.id('<|im_end|>'), *newline]
  out = []
  for i, turn in enumerate(turns_):
    answer, parts = turn.role == 'assistant', turn.parts
    if not (start_open and i == 0):
      # As in a rendered template, the header's newline and the text after it are encoded together; not so for an
      # assistant, whose text is generated after the header.
      first = '' if answer or not parts or parts[0][0] != 'text' else parts[0][1]
      out.append(_Piece([start, *tokenizer.encode(f'{turn.role}\n{first}')], None, False))
      parts = parts[1:] if first else parts
    for kind, value in parts:
      if kind == 'text':
        out.append(_Piece(tokenizer.encode(value, markup=answer), None, answer))
      elif kind == 'image':
        out += _image(value, tokenizer, cut, vision)
      else:
        out += _video(value, tokenizer, cut, vision)
    if not (end_open and i == len(turns_) - 1):
      out.append(_Piece(end, None, answer))
  return out


def _image(image, tokenizer, cut, vision):
  grid = _grid(image, cut)
  vision.append(patchify(image[None], cut.patch, cut.merge))
  pads = _Piece([tokenizer.id('<|image_pad|>')] * (grid[0] * grid[1]), grid, False)
  return [_Piece([tokenizer.id('<|vision_start|>')], None, False), pads,
          _Piece([tokenizer.id('<|vision_end|>')], None, False)]


def _video(clip, tokenizer, cut, vision):
  frame, grid = tokenizer.id('<|frame|>'), _grid(clip.frames_FHW3[0], cut)
  vision.append(patchify(clip.frames_FHW3, *cut))
  pads = _Piece([tokenizer.id('<|video_pad|>')] * (grid[0] * grid[1]), grid, False)
  out = [_Piece([tokenizer.id('<|vision_start|>')], None, False)]
  for seconds in clip.seconds_F:
    out += [_Piece([frame, *tokenizer.encode(f'{seconds:.1f}')], None, False), pads]
  return [*out, _Piece([tokenizer.id('<|vision_end|>')], None, False)]


def _grid(image, cut):
  side, (height, width) = cut.patch * cut.merge, image.shape[:2]
  if height % side or width % side or not height or not width:
    raise InputError(f'an image of {height}x{width} pixels is not a multiple of {side}; resize it with smart_resize')
  return height // side, width // side


def _assemble(lists: list[list[_Piece]], vision: list[tuple], source: str) -> Example:
  """Lays trunk and branches one after the other."""
  token, position, base = [], [], 0
  for b, pieces in enumerate(lists):
    position_T3, after = mrope.positions((p.grid or len(p.ids) for p in pieces), base)
    if b == 0:
      base = after                  # every branch continues the trunk
    position.append(position_T3)
    for piece in pieces:
      token += piece.ids
  token_T = np.asarray(token, np.int32)
  branch_T = np.repeat(np.arange(len(lists), dtype=np.int32), [len(p) for p in position])
  pieces = [piece for pieces in lists for piece in pieces]
  lengths = np.array([len(p.ids) for p in pieces], int)
  loss_T = np.array([p.loss for p in pieces], bool).repeat(lengths)
  is_vision_T = np.array([p.grid is not None for p in pieces], bool).repeat(lengths)
  # The next token of the same branch. The trunk's last token has several; its targets are user text, weight 0.
  weight_T = np.zeros(len(token_T), np.float32)
  weight_T[:-1] = loss_T[1:] & (branch_T[1:] == branch_T[:-1])
  target_T = np.zeros_like(token_T)
  target_T[:-1] = np.where(weight_T[:-1] > 0, token_T[1:], 0)
  vision_T = np.where(is_vision_T, np.cumsum(is_vision_T, dtype=np.int32) - 1, -1).astype(np.int32)
  patch_PC, coord_P4, frame_P = _join_vision(vision)
  return Example(token_T, target_T, weight_T, np.concatenate(position), branch_T, vision_T, patch_PC, coord_P4, frame_P,
                 source)


def _join_vision(vision):
  if not vision:
    return np.zeros((0, 0), np.uint8), np.zeros((0, 4), np.int32), np.zeros(0, np.int32)
  if len(vision) == 1:
    return vision[0]          # without a copy of what may be hundreds of megabytes
  frames, shift = [], 0
  for _, _, frame_P in vision:
    frames.append(frame_P + np.int32(shift))
    shift += int(frame_P.max())
  return np.concatenate([v[0] for v in vision]), np.concatenate([v[1] for v in vision]), np.concatenate(frames)
