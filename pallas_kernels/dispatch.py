"""Which implementation of an op runs."""
from typing import Literal

import jax

Implementation = Literal['reference', 'xla', 'tpu', 'gpu']

# Ops that have kernels of their own on a platform; 'reference' and 'xla' exist for every op.
KERNELS: dict[str, tuple[str, ...]] = {
  'tpu': ('index_select', 'dsa_attention', 'dsa_decode', 'dense_attention', 'indexer_warmup', 'grouped_matmul',
          'routed_swiglu'),
  'gpu': ('index_select', 'dsa_attention', 'dsa_decode', 'dense_attention', 'indexer_warmup', 'grouped_matmul',
          'routed_swiglu', 'adapted_swiglu'),
}


def platform() -> str:
  """'cpu', 'tpu' or 'gpu': of the devices of the context mesh, which need not be the host's; without one, of jax."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = device.platform if device else jax.default_backend()
  return 'gpu' if name in ('cuda', 'rocm') else name


def choose(op: str, implementation: Implementation | None) -> str:
  """Name of the implementation of `op` to run.

  None is the best one for the platform of the context mesh: its own kernel where there is one, else 'xla'. Raises
  ValueError for a name that does not exist.
  """
  if implementation is None:
    return platform() if op in KERNELS.get(platform(), ()) else 'xla'
  existing = ('reference', 'xla', *(name for name, ops in KERNELS.items() if op in ops))
  if implementation not in existing:
    raise ValueError(f'{op}: there is no implementation {implementation!r}; use one of {", ".join(existing)}')
  return implementation
