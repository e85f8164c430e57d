"""Plain text as rows: files cut into pieces that fill a row, each file wholly for training or wholly held out.

A piece is a conversation in which only the assistant speaks, so every token of it is learnt, and counted when scored.
"""
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterator

import xxhash

from data_pipelines.errors import InputError
from data_pipelines.tokenizer import Tokenizer

SUFFIXES = ('.py', '.md', '.rst', '.txt')
# Folders: packages of others, tests, and Python's tables of characters, a third of its library and no text.
SKIPPED = ('site-packages', '__pycache__', 'test', 'tests', 'idle_test', 'encodings')
HELD_OUT = 5          # one file in so many
FRAME = 8             # tokens kept free for the conversation around the text


def library() -> str:
  """The folder of the Python standard library: real text, code with its documentation, on every machine."""
  return sysconfig.get_path('stdlib')


def files(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Text files below a folder, by name. Raises InputError when there are none."""
  root = pathlib.Path(folder)
  found = [p for p in sorted(root.rglob('*')) if p.suffix in SUFFIXES and p.is_file()
           and not {*p.relative_to(root).parts[:-1]} & {*SKIPPED}]
  if not found:
    raise InputError(f'{folder}: holds no text file ({", ".join(SUFFIXES)})')
  return found


def is_held_out(name: str) -> bool:
  """Of a file, by its path below the folder: the split does not depend on what else is there."""
  return xxhash.xxh3_64_intdigest(name.encode()) % HELD_OUT == 0


def pieces(text: str, tokenizer: Tokenizer, tokens: int) -> Iterator[str]:
  """Text in pieces of `tokens` tokens one after the other. What is left at the end is dropped, and so is a piece that
  has more tokens by itself than inside the text (a character was cut)."""
  ids = tokenizer.encode(text)
  for start in range(0, len(ids) - tokens + 1, tokens):
    piece = tokenizer.decode(ids[start:start + tokens])
    if len(tokenizer.encode(piece, markup=True)) <= tokens:
      yield piece


def write(folder: str | os.PathLike, out: str | os.PathLike, tokenizer: Tokenizer, tokens: int) -> dict[str, int]:
  """Writes out/train_TOKENS.jsonl and out/heldout_TOKENS.jsonl, whose rows fill `tokens`, and the tokenizer beside
  them: {'train': rows, 'heldout': rows}. Rows come in an order that mixes the files and is always the same.

  Raises InputError when one of them would be empty.
  """
  root, out, rows = pathlib.Path(folder), pathlib.Path(out), {'train': [], 'heldout': []}
  for path in files(root):
    name = path.relative_to(root).as_posix()
    text = path.read_text(encoding='utf-8', errors='replace')
    for i, piece in enumerate(pieces(text, tokenizer, tokens - FRAME)):
      row = {'id': f'{name}:{i}', 'messages': [{'role': 'assistant', 'content': piece}]}
      rows['heldout' if is_held_out(name) else 'train'].append(row)
  out.mkdir(parents=True, exist_ok=True)
  tokenizer.save(out)
  for split, found in rows.items():
    if not found:
      raise InputError(f'{folder}: no file of the {split} part has {tokens} tokens; give more text or shorter rows')
    found.sort(key=lambda row: xxhash.xxh3_64_intdigest(row['id'].encode()))
    part = out / f'{split}.part'
    part.write_text(''.join(json.dumps(row) + '\n' for row in found), encoding='utf-8')
    part.replace(out / f'{split}_{tokens}.jsonl')
  return {split: len(found) for split, found in rows.items()}
