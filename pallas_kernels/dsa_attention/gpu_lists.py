"""Lists of the keys that groups of queries selected, read the other way round: which groups selected a key.

The backward pass writes what the entries of the lists give to their keys into the rows of a buffer, and adds them up
key by key. Rows are sorted by key, those of a key by group, so that a key finds its own in one piece. The buffer is
smaller than all lists of a chunk: they are laid end to end, each from a multiple of STEP, and a batch is a span of
that line.

S keys, M groups of a chunk, U room for the keys of a group (in a kernel: keys of a step), C rows of the buffer.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import gpu_call
from pallas_kernels.gpu_call import int32

STEP = 64              # keys of a step over a list
WRITERS = 16           # programs that go over the list of a group to invert it
TOGETHER = 4           # rows of a key that are read at the same time: the buffer has as many more, for what is no entry
KEYS = 1024            # of a program that counts, at most


class Inverse(NamedTuple):
  """The lists of a chunk by key."""
  rank_MS: jax.Array       # place of the key in the list of the group, or -1
  start_M: jax.Array       # where the list of the group begins in the line of all lists
  count_M: jax.Array       # how long it is
  length: jax.Array        # of the line


class Batch(NamedTuple):
  """Where the entries of a span of the line lie in the buffer: that of a key and a group at offset_S + before_MS."""
  first_1: jax.Array       # where the span begins
  start_M: jax.Array
  before_MS: jax.Array     # how many groups before this one have the key in the span; of groups outside not written
  offset_S: jax.Array
  total_S: jax.Array       # how many entries of the key the span has


def invert(index_MU: jax.Array, count_M: jax.Array, S: int) -> Inverse:
  M = len(count_M)
  padded_M = -(-count_M // STEP) * STEP
  end_M = jnp.cumsum(padded_M, dtype=jnp.int32)
  rank_MS, = gpu_call.call(_invert, (M, WRITERS), [index_MU, count_M, jnp.full((M, S), -1, jnp.int32)], [int32(M, S)],
                           warps=2, stages=1, aliases={2: 0})
  return Inverse(rank_MS, end_M - padded_M, count_M, end_M[-1])


def _invert(index_ref, count_ref, _, rank_out):
  m, writer = pl.program_id(0), pl.program_id(1)
  count = count_ref[m]

  def step(i, done):
    rank_U = (i * WRITERS + writer) * STEP + jnp.arange(STEP, dtype=jnp.int32)
    mask_U = rank_U < count
    index_U = triton.load(index_ref.at[m, rank_U], mask=mask_U, other=0)
    gpu_call.store(rank_out, (m, index_U), rank_U, mask_U)
    return done

  jax.lax.fori_loop(0, pl.cdiv(count, STEP * WRITERS), step, count)


def batch(lists: Inverse, first: jax.Array, room: int) -> Batch:
  """The span of `room` entries from `first` on, both multiples of STEP."""
  M, S = lists.rank_MS.shape
  size = min(KEYS, S & -S)
  last = first + room
  groups = (lists.start_M + lists.count_M <= first).sum(), (lists.start_M < last).sum()
  span = jnp.stack([first, *groups]).astype(jnp.int32)
  before_MS, within_S, total_S, sum_N = gpu_call.call(
      functools.partial(_count, room=room, size=size), (S // size,), [span, lists.start_M, lists.rank_MS],
      [int32(M, S), int32(S), int32(S), int32(S // size)], warps=4, stages=1)
  offset_S = (within_S.reshape(-1, size) + (jnp.cumsum(sum_N) - sum_N)[:, None]).reshape(-1)
  return Batch(span[:1], lists.start_M, before_MS, offset_S, total_S)


def _count(span_ref, start_ref, rank_ref, before_out, within_out, total_out, sum_out, *, room, size):
  n = pl.program_id(0)
  keys = pl.ds(n * size, size)

  def add(m, total_S):
    before_out[m, keys] = total_S
    rank_S = rank_ref[m, keys]
    row_S = start_ref[m] - span_ref[0] + rank_S
    return total_S + ((rank_S >= 0) & (row_S >= 0) & (row_S < room)).astype(jnp.int32)

  total_S = jax.lax.fori_loop(span_ref[1], span_ref[2], add, jnp.zeros(size, jnp.int32))
  within_out[keys], total_out[keys] = jnp.cumsum(total_S) - total_S, total_S
  sum_out[n] = total_S.sum()


def form(dtype) -> tuple[int, int]:
  """(keys of a step, stages of the pipeline) of kernels that gather keys: a gather through a list is only overlapped
  with products from 5 stages on, for which there is no room when elements are wide."""
  return (STEP, 5) if jnp.dtype(dtype).itemsize <= 2 else (STEP // 4, 1)


def own_steps(first, room: int, start, count, step: int):
  """The steps over a list, from and to, that lie in the span."""
  return jnp.maximum(first - start, 0) // step, pl.cdiv(jnp.minimum(first + room - start, count), step)


def places(index_U, i, m, count, offset_ref, before_ref, room: int) -> jax.Array:
  """Rows of the buffer of step i over the list of group m. Those behind its end share one that nobody reads: stores by
  whole rows are wide ones, masked stores are not."""
  step, = index_U.shape
  mask_U = i * step + jnp.arange(step, dtype=jnp.int32) < count
  return jnp.where(mask_U, offset_ref[index_U] + before_ref[m, index_U], room)


def selected(bit_N, word_U) -> jax.Array:
  """Which queries selected the keys, bool [N, U]."""
  return (jnp.right_shift(word_U[None], bit_N[:, None]) & 1) > 0
