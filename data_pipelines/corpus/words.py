"""Texts that are the same, and runs of words that two texts share.

For the runs, case, punctuation and forms of a character (NFKC) do not count. Chinese, Japanese and Korean, written
without spaces, have a word a character.
"""
import re
import unicodedata
from collections.abc import Iterator, Sequence

import xxhash

from data_pipelines import chat

GRAM = 13                # words; the length that GPT-3 was decontaminated with (arXiv 2005.14165, appendix C)
TEMPLATE = 10            # turns of the evaluation sets; what is in more of them is how they ask, not what they ask
_EACH = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af'
_WORD = re.compile(f'[{_EACH}]|[^\\W_{_EACH}]+')


def words(text: str) -> list[str]:
  return _WORD.findall(unicodedata.normalize('NFKC', text).lower())


def said(turn: chat.Turn) -> str:
  """The text of a turn."""
  return ' '.join(value for kind, value in turn.parts if kind == 'text')


def key(trunk: Sequence[chat.Turn], branches: Sequence[Sequence[chat.Turn]]) -> str:
  """Equal for conversations in which the same roles say the same, up to white space and forms of a character."""
  lines = [[(t.role, ' '.join(unicodedata.normalize('NFKC', said(t)).split())) for t in turns]
           for turns in (trunk, *branches)]
  return xxhash.xxh3_128_hexdigest(repr(lines).encode())


def grams(turn: chat.Turn, n: int) -> Iterator[tuple[int, str]]:
  """(hash, words) of every run of n words. A system prompt has none: it says how to answer, not what is asked."""
  found = words(said(turn)) if turn.role != 'system' else []
  for i in range(len(found) - n + 1):
    run = ' '.join(found[i:i + n])
    yield xxhash.xxh3_64_intdigest(run.encode('utf-8', 'surrogatepass')), run
