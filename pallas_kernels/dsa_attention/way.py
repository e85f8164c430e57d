"""The two ways to attend to a selection, which give the same function, and which of them serves.

'masked_dense' goes over whole key tiles under the mask of the selection and leaves out tiles in which nobody of a chunk
selected a key: every product is a large one, and keys lie in order. 'gathered' takes the union of the keys that 16
neighbouring queries selected out of their rows first, so that long rows cost what was selected; chunks whose union is
not few of their keys are masked all the same (`chunks.gathered_or`). Scores, thresholds and the backward pass do not
depend on the way: it is masked tiles in both, as is the pass of the indexer's loss, which needs them anyway.

H query heads, T query time, S key time.
"""
from typing import Literal

from pallas_kernels import dispatch
from pallas_kernels.dsa_attention import union
from pallas_kernels.index_select.xla import is_small

Way = Literal['masked_dense', 'gathered']

# Of an implementation. Kernels have one way at every length: a TPU issues each copy of a gather, so that theirs mask
# whole tiles (tpu.py), while a GPU gathers as fast as it reads.
WAYS = {'reference': ('masked_dense',), 'xla': ('masked_dense', 'gathered'), 'tpu': ('masked_dense',),
        'gpu': ('gathered',)}

# Keys of a row up to which it is masked whole, over the fewest that a gather takes: topk, or one step of union.attend.
# By platform; measured on a CPU only (docs/kernels.md).
CROSSOVER = {'cpu': 2.0}


def choose(implementation: str, H: int, T: int, S: int, topk: int, want_kl: bool, way: Way | None) -> Way:
  """`way`, or when it is None the better one for these shapes. Raises ValueError for one that does not exist."""
  existing = WAYS[implementation]
  if way is None and len(existing) == 1:
    return existing[0]
  if way is None:
    crossover = CROSSOVER.get(dispatch.platform(), CROSSOVER['cpu'])
    short = is_small(H, T, S) or S <= crossover * max(topk, union.GATHER)
    return 'masked_dense' if short or want_kl else 'gathered'
  if way not in existing:
    raise ValueError(f'dsa_attention: {implementation} has no way {way!r}; use {" or ".join(existing)}')
  return way
