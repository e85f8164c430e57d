"""What is compiled: one row for each op, direction, length and device."""
import importlib.util
from typing import NamedTuple

LENGTHS = (32768, 131072, 262144)
OPS = ('index_select', 'dsa_attention', 'dsa_decode', 'indexer_warmup', 'dense_attention', 'grouped_matmul',
       'routed_swiglu')
FORWARD_ONLY = 'index_select', 'dsa_decode'
DECODED = 16             # sequences of dsa_decode, one query each
DIRECTIONS = ('forward', 'backward')

# Name of a target -> (package that holds its compiler, platform, name of a topology: topology.py). One device of it is
# compiled for.
TARGETS = {
    'v5p': ('libtpu', 'tpu', 'v5p:2x2x1'),
    'v6e': ('libtpu', 'tpu', 'v6e:2x2'),
    'tpu7x': ('libtpu', 'tpu', 'tpu7x:2x2x1'),
    'h100': ('jax_cuda12_plugin', 'cuda', 'h100:1'),
}

# A device of a context-parallel group holds a share of the queries and all keys; what it may then need, in bytes.
SHARDED_OP, SHARDED_LENGTH, SHARDS = 'dsa_attention', 262144, 8
LIMITS = {'forward': 2 * 2**30, 'backward': 4 * 2**30}


class Row(NamedTuple):
  op: str
  direction: str
  target: str
  length: int              # keys (of expert ops: tokens; of dsa_decode: keys of each sequence)
  shards: int              # queries are length / shards

  @property
  def limit(self) -> int | None:
    """Bytes of temporaries that this row may need, where there is a requirement."""
    required = (self.op, self.length, self.shards) == (SHARDED_OP, SHARDED_LENGTH, SHARDS)
    return LIMITS[self.direction] if required else None


def installed(target: str) -> bool:
  return importlib.util.find_spec(TARGETS[target][0]) is not None


def rows(ops=(), directions=(), targets=(), lengths=()) -> list[Row]:
  """All rows that pass the filters; an empty filter passes what can be compiled here (of targets: and every TPU)."""
  targets = targets or [t for t in TARGETS if TARGETS[t][1] == 'tpu' or installed(t)]
  out = []
  for target in targets:
    for op in ops or OPS:
      for length in lengths or LENGTHS:
        for direction in directions or DIRECTIONS:
          if op in FORWARD_ONLY and direction == 'backward':
            continue
          out.append(Row(op, direction, target, length, max(length // DECODED, 1) if op == 'dsa_decode' else 1))
          if (op, length) == (SHARDED_OP, SHARDED_LENGTH):
            out.append(Row(op, direction, target, length, SHARDS))
  return out
