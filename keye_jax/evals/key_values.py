"""Key-value retrieval: pairs hidden all over a row of text, and questions about every one of them at its end.

A pair is a line such as `# The code of anchor is 48213.` in place of the tokens that stood there. The questions repeat
its beginning; the answer follows as text, so one forward pass scores all answers, each token with the right ones before
it (teacher forcing). A later question sees the answers to earlier ones, not its own.

B batch of one row, T time.
"""
from typing import NamedTuple

import numpy as np

from data_pipelines.schema import Batch
from data_pipelines.tokenizer import Tokenizer

WORDS = ('anchor', 'basket', 'candle', 'desert', 'engine', 'forest', 'garden', 'hammer', 'island', 'jacket', 'kettle',
         'ladder', 'magnet', 'needle', 'orange', 'pencil', 'rabbit', 'saddle', 'temple', 'violin', 'window', 'yellow')
QUESTION, END = '\n# The code of {} is ', '.\n'
PAIRS = 16


class Planted(NamedTuple):
  """A row with its questions, in the order in which they are asked."""
  batch: Batch                # weight is 1 where a token of an answer is the target, else 0
  answer_T: np.ndarray        # number of the question that the target belongs to, -1 elsewhere
  depth: list[float]          # where the pair of each question begins, as a share of the row


def plant(batch: Batch, tokenizer: Tokenizer, seed: int, pairs: int = PAIRS) -> Planted:
  """The row of `batch` with `pairs` pairs, the same for the same seed. Raises ValueError for a batch of several rows, a
  row without room for pairs and questions, or more pairs than there are words."""
  if len(batch.token_BT) != 1 or pairs > len(WORDS):
    raise ValueError(f'{len(batch.token_BT)} rows with {pairs} pairs; one row and at most {len(WORDS)} pairs can be')
  rng = np.random.default_rng(seed)
  words = [WORDS[i] for i in rng.permutation(len(WORDS))[:pairs]]
  asked = [tokenizer.encode(QUESTION.format(word)) for word in words]
  answers = [tokenizer.encode(str(value)) for value in rng.integers(10000, 100000, pairs)]
  end = tokenizer.encode(END)
  lines = [question + answer + end for question, answer in zip(asked, answers)]

  real, total = int((batch.segment_BT[0] > 0).sum()), sum(map(len, lines))
  first, room = 1, (real - total - 1) // pairs           # the row's first token, an attention sink, stays
  if room < max(map(len, lines)):
    raise ValueError(f'a row of {real} tokens has no room for {pairs} pairs and their questions')
  token_T, answer_T = batch.token_BT[0].copy(), np.full(batch.token_BT.shape[1], -1)
  starts = [first + i * room + int(rng.integers(room - len(line) + 1)) for i, line in enumerate(lines)]
  for start, line in zip(starts, lines):
    token_T[start:start + len(line)] = line
  at, order = real - total, rng.permutation(pairs)
  for n, i in enumerate(order):
    token_T[at:at + len(lines[i])] = lines[i]
    before = at + len(asked[i]) - 1                      # the place that predicts the first token of the answer
    answer_T[before:before + len(answers[i])] = n
    at += len(lines[i])
  made = batch._replace(token_BT=token_T[None], target_BT=np.append(token_T[1:], 0)[None].astype(np.int32),
                        weight_BT=(answer_T >= 0)[None].astype(np.float32))
  return Planted(made, answer_T, [round(starts[i] / real, 4) for i in order])


def marks(planted: Planted, logp_T: np.ndarray, correct_T: np.ndarray) -> dict[str, list]:
  """Of every question: nats of its answer, whether every token of it was the most likely one, and depth. logp and
  correct are those of the targets."""
  mine = [planted.answer_T == n for n in range(len(planted.depth))]
  return {'logp': [round(float(logp_T[on].sum()), 4) for on in mine],
          'exact': [int((correct_T[on] > 0).all()) for on in mine], 'depth': planted.depth}
