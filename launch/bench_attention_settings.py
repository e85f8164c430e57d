"""What `keye bench attention` measures on a CPU and on a GPU, in which order, and what is claimed of it."""
from collections.abc import Sequence
from typing import NamedTuple

HEADLINE = 4                   # u of the claims
# u of the claim about growth: at u = 4 most queries of a short row have less than u k keys before them, so that the
# work itself is more than linear.
LINEAR = 1
UNIONS = (1, 2, 4, 8, 'random')
KINDS = (('prefill', 'forward'), ('prefill', 'backward'), ('decode', 'forward'))
DENSE = ('dense', 'cudnn', 'tokamax', 'einsum', 'pallas')      # parts that read all keys


class Part(NamedTuple):
  phase: str         # prefill or decode
  direction: str     # forward, or backward: with the forward pass it needs
  name: str


class Cell(NamedTuple):
  """Parts that are timed in turns."""
  phase: str
  direction: str
  tokens: int
  batch: int                   # sequences of a decoding step; 1 in prefill
  union: int | str             # 1 in decoding: one query shares with nobody
  whole: bool                  # parts that do not depend on u are measured here too


class Aim(NamedTuple):
  """A part that is to be `least` times as fast as the fastest dense attention beside it."""
  name: str
  part: Part
  tokens: int
  least: float
  batch: int = 1


GROWING = Part('prefill', 'forward', 'attend')       # what `exponent` is of


class Setting(NamedTuple):
  claim: str
  aims: Sequence[Aim]
  exponent: float | None       # of the growth of `attend`, and of the bytes of `sparse`, at most
  dtype: str
  lengths: Sequence[int]
  unions: Sequence[int]        # lengths at which u is varied; () is all
  everywhere: Sequence[int]    # u at the other lengths, beside HEADLINE
  batches: Sequence[int]
  most: int                    # tokens of a decoding step in all its caches
  share: int                   # one in so many queries of a row of prefill is at work
  parts: Sequence[str]         # programs of prefill that are timed (bench_attention_parts.programs)
  decoding: Sequence[str]      # those of a decoding step
  blocked: int | None          # tokens up to which the parts `dense` and `masked_dense` are measured
  side: int                    # of the matrix of the roofline
  numbers: int                 # of its array
  roof_calls: int              # of either in a timing
  shortest: float              # seconds of a timing, for which a program is called several times; 0: once
  longest: float               # seconds of a cell, for which rounds are left out, down to two
  workers: int                 # programs that are compiled at a time, ahead of all cells; 0: one, when its cell begins
  watched: bool                # a processor that others may use too and that changes its speed: other processes make
                               # timings void, and the claim must hold for the rounds that suit it least


CPU_LENGTH, CPU_RATIO, CPU_EXPONENT = 65536, 1.2, 1.1
CPU_LENGTHS = 8192, 16384, 32768, 65536, 131072
CPU = Setting(
    claim=(f'on a CPU at Keye\'s block shape and u = {HEADLINE}, sparse attention is at least {CPU_RATIO} times as '
           f'fast as blocked dense attention at {CPU_LENGTH} tokens, and from {CPU_LENGTHS[0]} to {CPU_LENGTHS[-1]} '
           f'tokens its attend at u = {LINEAR} and its temporaries grow at most as S^{CPU_EXPONENT}'),
    aims=[Aim(f'sparse prefill at {CPU_LENGTH} tokens', Part('prefill', 'forward', 'sparse'), CPU_LENGTH, CPU_RATIO)],
    exponent=CPU_EXPONENT, dtype='float32', lengths=CPU_LENGTHS, unions=(CPU_LENGTH,), everywhere=(LINEAR,),
    batches=(1,), most=1 << 40, share=8,
    parts=('score', 'attend', 'selection', 'sparse', 'training', 'dense', 'masked_dense'),
    decoding=('score', 'selection', 'sparse', 'dense', 'masked_dense'), blocked=CPU_LENGTH, side=2048,
    numbers=1 << 26, roof_calls=1, shortest=0, longest=400.0, workers=0, watched=True)

GPU_AIMS = [
    Aim('attend alone at 131072 tokens', Part('prefill', 'forward', 'attend'), 131072, 6),
    Aim('sparse prefill at 131072 tokens', Part('prefill', 'forward', 'sparse'), 131072, 1.8),
    Aim('decoding at batch 16 after 131072 tokens', Part('decode', 'forward', 'sparse'), 131072, 6, 16),
    Aim('decoding at batch 64 after 131072 tokens', Part('decode', 'forward', 'sparse'), 131072, 6, 64),
    Aim('forward and backward at 131072 tokens', Part('prefill', 'backward', 'training'), 131072, 3),
    Aim('sparse prefill at 262144 tokens', Part('prefill', 'forward', 'sparse'), 262144, 2.5),
]
GPU = Setting(
    claim=(f'on one GPU in bfloat16 at Keye\'s block shape and u = {HEADLINE}, against the fastest dense attention of '
           'the same run: ' + ', '.join(f'{a.name} at least {a.least} times as fast' for a in GPU_AIMS)),
    aims=GPU_AIMS, exponent=None, dtype='bfloat16', lengths=(131072, 262144, 32768), unions=(131072,), everywhere=(),
    batches=(16, 64), most=64 * 131072, share=1,
    parts=('score', 'selection', 'sparse', 'training', 'reference', 'dense', 'cudnn', 'tokamax'),
    decoding=('selection', 'sparse', 'dense', 'cudnn', 'einsum', 'pallas'), blocked=32768, side=8192, numbers=1 << 30,
    roof_calls=20, shortest=0.05, longest=4.0, workers=12, watched=False)


def of(platform: str) -> Setting:
  """The setting of 'cpu', 'gpu' or 'tpu'; a TPU is timed as a CPU is."""
  return GPU if platform == 'gpu' else CPU


def cells(setting: Setting, lengths: Sequence[int], unions: Sequence[int | str], kinds: Sequence[tuple[str, str]],
          batches: Sequence[int]) -> list[Cell]:
  """First those that the claim needs, in the order of the aims, then the cheap ones."""
  once = HEADLINE if HEADLINE in unions else unions[0]
  found = []
  for n in lengths:
    for union in unions:
      if setting.unions and n not in setting.unions and union not in (once, *setting.everywhere):
        continue
      for phase, direction in kinds:
        if phase == 'prefill':
          found.append(Cell(phase, direction, n, 1, union, union == once))
        elif union == once:
          found += [Cell(phase, direction, n, batch, 1, True) for batch in batches if n * batch <= setting.most]
  needed = [(*a.part[:2], a.tokens, a.batch) for a in setting.aims]
  needed += [(*GROWING[:2], n, 1) for n in lengths] if setting.exponent else []
  claimed = lambda cell: cell[:4] in needed and (cell.whole or cell.union in setting.everywhere)
  rank = lambda cell: needed.index(cell[:4]) if claimed(cell) else len(needed)
  cost = lambda cell: cell.tokens if cell.phase == 'decode' else cell.tokens ** 2 * (1 + (cell.direction == 'backward'))
  return sorted(found, key=lambda cell: (rank(cell), cost(cell)))


PROGRAMS = {                   # of bench_attention_parts, in the order in which they take turns
    ('prefill', 'forward'): ('cudnn', 'tokamax', 'dense', 'masked_dense', 'score', 'selection', 'sparse', 'attend',
                             'reference'),
    ('prefill', 'backward'): ('cudnn', 'tokamax', 'dense', 'masked_dense', 'sparse', 'training'),
    ('decode', 'forward'): ('cudnn', 'einsum', 'pallas', 'dense', 'masked_dense', 'score', 'selection', 'sparse'),
}


def parts(setting: Setting, cell: Cell) -> list[str]:
  """Names of the programs of a cell. Where inputs differ by u alone, only what depends on it: no dense attention, and
  where `attend` is not a difference to it, no selection."""
  once = {'reference', 'masked_dense', 'score', *DENSE, *(['selection'] if 'attend' in setting.parts else [])}
  skipped = set() if cell.whole else once
  if setting.blocked and cell.tokens > setting.blocked:
    skipped |= {'dense', 'masked_dense'}
  timed = setting.decoding if cell.phase == 'decode' else setting.parts
  return [name for name in PROGRAMS[cell[:2]] if name in timed and name not in skipped]


def title(cell: Cell) -> str:
  return ', '.join([cell.phase, cell.direction, f'u = {cell.union}', f'{cell.tokens} tokens',
                    *([f'batch {cell.batch}'] if cell.batch > 1 else [])])
