"""Which implementation of an op runs."""
from typing import Literal

Implementation = Literal['reference', 'xla', 'tpu', 'gpu']

EXISTING = ('reference', 'xla')


def choose(op: str, implementation: Implementation | None) -> str:
  """Name of the implementation of `op` to run.

  None is the best one for the platform of the context mesh. That is 'xla' on every platform until kernels for TPU
  and GPU exist; then only this function changes. Raises ValueError for a name that does not exist.
  """
  if implementation is None:
    return 'xla'
  if implementation not in EXISTING:
    raise ValueError(f'{op}: there is no implementation {implementation!r}; use one of {", ".join(EXISTING)}')
  return implementation
