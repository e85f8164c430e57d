"""Rows in the forms that people have, turned into the project's own (data_pipelines/sources.py).

| keys | from | becomes |
|---|---|---|
| messages | the project, ms-swift, LLaMA-Factory, TRL | itself; content is text or a list of typed parts |
| conversations | ShareGPT, LLaVA | from/value, human and gpt are user and assistant |
| prompt, completion | TRL | one conversation |
| prompt, reward_model.ground_truth | verl | the ground truth is what the assistant says |
| problem, options, solution | open-r1, Video-R1 | one question; the options one a line below it |
| sentence, timestamp | Time-R1 | one question that asks when it happens |

Media are "images" and "videos", or "image" and "video": paths or file: addresses; pictures also as data: addresses,
bytes or {"bytes", "path"}. `<image>`, `<video>` and typed parts without a medium take the next one; when a row has
media of a kind and no place for them, they come first in the first user message, pictures before videos. `<frame>`
takes the next of "frames", or of the pictures. When no assistant speaks, "solution", "reward_model.ground_truth" or
"timestamp" is the answer. A "timestamp" of two numbers is the row's "interval" in seconds. Other keys ride along.
"""
import base64
import binascii
import json
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

from data_pipelines.errors import InputError

FORMS = ('messages', 'conversations', 'prompt', 'problem', 'sentence')
MEDIA = ('image', 'video')
SPEAKERS = {'human': 'user', 'gpt': 'assistant'}
# Leaving these out would change what the row teaches.
UNREAD = {'audio': 'sound', 'audios': 'sound', 'tools': 'tools', 'objects': 'placeholders for objects'}


def own(raw: dict[str, Any], where: str) -> dict[str, Any]:
  """A row in the project's form: "messages", "images", "videos", "branches" when it forks, and its other keys.

  Nothing is checked that data_pipelines/sources.py and chat.py check. Raises InputError that names `where` and the key
  for a form that is not known and for what would otherwise be lost.
  """
  for key, what in UNREAD.items():
    if raw.get(key):
      raise InputError(f'{where}: "{key}" holds {what}, which are not read; remove the key, or the row')
  named = [form for form in FORMS if raw.get(form) is not None]
  if {'messages', 'conversations'} <= {*named}:
    raise InputError(f'{where}: both "messages" and "conversations"; keep one')
  if not named:
    raise InputError(f'{where}: no "messages", and no other form is recognised from the keys '
                     f'{", ".join(map(repr, raw)) or "(none)"}; rename the conversation\'s key to one of '
                     f'{", ".join(FORMS)}')
  messages, used = _FORM[named[0]](raw, where)
  messages = _with_system(raw, messages, used, where)
  branches = [] if raw.get('branches') is None else raw['branches']
  used.add('branches')
  if not isinstance(branches, list):
    raise InputError(f'{where}: "branches" must be a list of lists of messages')
  branches = [_messages(b, f'{where}: branch {i}') for i, b in enumerate(branches)]
  media = {kind: _media(raw, kind, used, where) for kind in MEDIA}
  if named[0] == 'problem' and raw.get('path') and 'path' not in used:
    raise InputError(f'{where}: "path" names a medium, but "data_type" is not image or video; rename "path" to one')
  spoken = [m for turns in (messages, *branches) for m in turns]
  _place_frames(raw, spoken, media, used, where)
  if not any(m.get('role') == 'assistant' for m in spoken):
    messages = _with_answer(raw, messages, where)
  _lead(spoken, media)
  row = {key: value for key, value in raw.items() if key not in used}
  row |= {'messages': messages, 'images': media['image'], 'videos': media['video']}
  if branches:
    row['branches'] = branches
  if (pair := _pair(raw.get('timestamp'))) and row.get('interval') is None and not branches:
    row['interval'] = list(pair)
  return row


def when(sentence: str) -> str:
  """The question that asks for the interval of an event."""
  return f'When does this happen: {sentence.strip()} Answer with start and end in seconds.'


def span(interval: Sequence[float]) -> str:
  """An interval in seconds as the answer is written."""
  return f'{interval[0]:.1f} - {interval[1]:.1f}'


def _from_messages(raw, where):
  return _messages(raw['messages'], where), {'messages'}


def _from_conversations(raw, where):
  items = raw['conversations']
  if not isinstance(items, list):
    raise InputError(f'{where}: "conversations" must be a list of {{"from", "value"}}')
  out = []
  for i, item in enumerate(items):
    at = f'{where}: conversation {i}'
    if not isinstance(item, dict):
      raise InputError(f'{at} must be an object with "from" and "value"')
    item = {{'from': 'role', 'value': 'content'}.get(key, key): v for key, v in item.items() if v is not None}
    role = item.get('role')
    out.append(item | ({'role': SPEAKERS.get(role, role)} if isinstance(role, str) else {}))
  return _messages(out, where, 'conversation'), {'conversations'}


def _from_prompt(raw, where):
  messages, used = _said(raw['prompt'], 'user', where, 'prompt'), {'prompt'}
  if raw.get('completion') is not None:
    messages += _said(raw['completion'], 'assistant', where, 'completion')
    used.add('completion')
  return messages, used


def _from_problem(raw, where):
  options = raw.get('options') or []
  if not all(isinstance(text, str) for text in [raw['problem'], *(options if isinstance(options, list) else [0])]):
    raise InputError(f'{where}: "problem" must be text and "options" a list of texts')
  return [{'role': 'user', 'content': '\n'.join([raw['problem'], *options])}], {'problem'}


def _from_sentence(raw, where):
  if not isinstance(raw['sentence'], str):
    raise InputError(f'{where}: "sentence" must be text')
  return [{'role': 'user', 'content': when(raw['sentence'])}], set()


_FORM = {'messages': _from_messages, 'conversations': _from_conversations, 'prompt': _from_prompt,
         'problem': _from_problem, 'sentence': _from_sentence}


def _said(value, role, where, key) -> list[dict]:
  return [{'role': role, 'content': value}] if isinstance(value, str) else _messages(value, f'{where}: "{key}"')


def _messages(messages, where, called='message') -> list[dict]:
  """Messages with empty keys left out and typed parts in one form."""
  if not isinstance(messages, list):
    raise InputError(f'{where}: messages must be a list of {{"role", "content"}}')
  out = []
  for i, message in enumerate(messages):
    at = f'{where}: {called} {i}'
    if not isinstance(message, dict):
      raise InputError(f'{at} must be an object with "role" and "content"')
    kept = {k: v for k, v in message.items() if v is not None}
    if more := [k for k in kept if k not in ('role', 'content')]:
      raise InputError(f'{at}: {json.dumps(more[0])} is not read; put what it says into the content, or remove the key')
    if isinstance(kept.get('content'), list):
      kept['content'] = [_part(p, f'{at}: part {n}') for n, p in enumerate(kept['content'])]
    out.append(kept)
  return out


def _part(part, at) -> dict:
  if not isinstance(part, dict) or not isinstance(part.get('type'), str):
    raise InputError(f'{at} must be an object with "type" text, image or video')
  kind = part['type'].removesuffix('_url')
  if kind not in ('text', *MEDIA):
    raise InputError(f'{at}: type {part["type"]!r} is not read; known types: text, image, video')
  # Tables give every part the keys of all parts: those of others are empty.
  kept = {k: v for k, v in part.items() if v is not None and (v != '' or k == kind) and k != 'type'}
  names = ('text',) if kind == 'text' else (kind, f'{kind}_url', 'url', 'path')
  if more := [k for k in kept if k not in names]:
    raise InputError(f'{at}: {json.dumps(more[0])} of a {kind} part is not read; how media are sampled is set under '
                     'data of the config; remove the key')
  if kind == 'text':
    return {'type': 'text', **kept}
  if len(kept) > 1:
    raise InputError(f'{at}: {" and ".join(kept)} both name a medium; keep one')
  medium = [_medium(v, kind, at) for v in kept.values()]
  return {'type': kind} | ({kind: medium[0]} if medium else {})


def _media(raw, kind, used, where) -> list:
  """The media of a kind that the row lists."""
  keys = [key for key in (f'{kind}s', kind) if raw.get(key) not in (None, [], '')]
  used |= {f'{kind}s', kind}
  if raw.get('data_type') == kind and isinstance(raw.get('path'), str) and not keys:
    used.add('path')
    return [_medium(raw['path'], kind, f'{where}: "path"')]
  if len(keys) > 1:
    raise InputError(f'{where}: both "{kind}s" and "{kind}"; keep one')
  if not keys:
    return []
  values = raw[keys[0]]
  return [_medium(v, kind, f'{where}: "{keys[0]}"') for v in (values if isinstance(values, list) else [values])]


def _medium(value, kind, at) -> str | bytes:
  if isinstance(value, dict):
    value = {k: v for k, v in value.items() if v is not None and k != 'type'}
    if value.get('bytes'):
      value.pop('path', None)        # where it once lay
    if len(value) == 1 and {*value} <= {'bytes', 'path', 'url', kind}:
      return _medium(*value.values(), kind, at)
  if isinstance(value, bytes) and value:
    if kind == 'video':
      raise InputError(f'{at}: a video inside the row; write it to a file of its own and name that')
    return value
  if not isinstance(value, str) or not value:
    raise InputError(f'{at}: {kind}s are named by their paths' +
                     ('; frames as a list of pictures go under "images"' if kind == 'video' else ''))
  scheme, _, rest = value.partition(':')
  if scheme == 'file':
    return urllib.parse.unquote(urllib.parse.urlsplit(value).path) if rest.startswith('/') else rest
  if scheme in ('http', 'https', 's3', 'gs', 'hf'):
    raise InputError(f'{at}: {value[:80]} is not a file; download it first and give its path')
  if scheme == 'data' and kind == 'image' and ';base64,' in rest[:80]:
    try:
      return base64.b64decode(rest.partition(';base64,')[2], validate=True)
    except binascii.Error as e:
      raise InputError(f'{at}: the data: address is not base64 ({e})') from None
  return value


def _with_system(raw, messages, used, where):
  for key in ('system', 'system_prompt'):
    if text := raw.get(key):
      if not isinstance(text, str) or any(m.get('role') == 'system' for m in messages):
        raise InputError(f'{where}: "{key}" must be text, and the conversation without a system message of its own')
      used.add(key)
      messages = [{'role': 'system', 'content': text}, *messages]
  return messages


def _with_answer(raw, messages, where) -> list[dict]:
  """Messages with what the row says is right as the assistant's answer, if it says so."""
  reward = raw.get('reward_model')
  truth = reward.get('ground_truth') if isinstance(reward, dict) else None
  for key, value in (('solution', raw.get('solution')), ('reward_model.ground_truth', truth)):
    if value is not None:
      if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(f'{where}: "{key}" is {type(value).__name__}, but what an assistant says is text; write the '
                         'answer as text')
      return [*messages, {'role': 'assistant', 'content': value if isinstance(value, str) else json.dumps(value)}]
  if raw.get('timestamp') is not None:
    if not (pair := _pair(raw['timestamp'])):
      raise InputError(f'{where}: "timestamp" must be [start, end] in seconds with start before end')
    return [*messages, {'role': 'assistant', 'content': span(pair)}]
  return messages


def _pair(value) -> tuple[float, float] | None:
  """[start, end] as two numbers of seconds, or None when it is something else, such as a date."""
  if not isinstance(value, list) or len(value) != 2 or not all(type(v) in (int, float) for v in value):
    return None
  return (float(value[0]), float(value[1])) if 0 <= value[0] < value[1] < 1e9 else None


def _place_frames(raw, messages, media, used, where):
  """`<frame>` becomes `<image>`, and its picture stands in the list of images where its marker does."""
  frames = raw.get('frames')
  texts = [m for m in messages if m.get('role') == 'user' and isinstance(m.get('content'), str)]
  if not frames:
    if media['image'] and raw.get('conversations'):
      for m in texts:
        m['content'] = m['content'].replace('<frame>', '<image>')
    return
  if not isinstance(frames, list) or not all(isinstance(f, (str, dict, bytes)) for f in frames):
    return          # a number of frames, or the like, rides along
  used.add('frames')
  left = {'<frame>': [_medium(f, 'image', f'{where}: "frames"') for f in frames], '<image>': media['image']}
  markers = [marker for m in texts for marker in re.findall('<image>|<frame>', m['content'])]
  if '<frame>' not in markers:
    media['image'] = left['<frame>'] + left['<image>']
    return
  for marker, pictures in left.items():
    if markers.count(marker) != len(pictures):
      raise InputError(f'{where}: {markers.count(marker)} {marker} markers for {len(pictures)} pictures')
  media['image'] = [left[marker].pop(0) for marker in markers]
  for m in texts:
    m['content'] = m['content'].replace('<frame>', '<image>')


def _lead(messages, media):
  """Puts media that have no place in any message before the first user message."""
  first = next((m for m in messages if m.get('role') == 'user'), None)
  if first is None:
    return
  kinds = [kind for kind in MEDIA for _ in media[kind] if not _has_place(messages, kind)]
  if isinstance(first.get('content'), str):
    first['content'] = ''.join(f'<{kind}>' for kind in kinds) + first['content']
  elif isinstance(first.get('content'), list):
    first['content'] = [{'type': kind} for kind in kinds] + first['content']


def _has_place(messages, kind) -> bool:
  users = [m['content'] for m in messages if m.get('role') == 'user' and 'content' in m]
  return any(f'<{kind}>' in c if isinstance(c, str) else any(p['type'] == kind for p in c)
             for c in users if isinstance(c, (str, list)))
