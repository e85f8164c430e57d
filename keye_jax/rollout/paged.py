"""Generation with caches in pages: each branch is a sequence as long as it is, not a share of a row of slots.

A pool of pages holds the keys of all sequences. It begins as large as the prompts need, doubles when no page is free,
and takes back the pages of a sequence that has ended. Tokens and their probabilities are those of contiguous caches, up
to rounding. On one device, for models with sparse attention.

B rows, Q branches of a row, P pages, A slots of a page, N pages of a sequence.
"""
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Batch
from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import decoder, head, keye
from keye_jax.nn.attention import Table
from keye_jax.rollout.frontier import Frontier, Sampling, draw, frontier_batch, is_stop, next_front, read_prompts
from keye_jax.rollout.pages import Pool, prompts
from pallas_kernels.dsa_decode import PAGE, Pages


@functools.partial(jax.jit, static_argnames=('config', 'eight', 'sampling'))
def prefill(config: ModelConfig, params, batch: Batch, last_BQ, source_PA, eight: bool, sampling: Sampling, key):
  """Reads the prompts and draws the first token of each branch: (Pages, Frontier)."""
  kv, front = read_prompts(config, params, batch, last_BQ, sampling, key)
  return decoder.paged(config, kv, source_PA, eight), front


@functools.partial(jax.jit, static_argnames=('config', 'stop', 'sampling'), donate_argnames='pages')
def step(config: ModelConfig, params, pages: Pages, table: Table, front: Frontier, stop: tuple[int, ...],
         sampling: Sampling, key):
  """Feeds the newest tokens, for which the table has room, and draws the next ones: (Pages, Frontier)."""
  segment_BQ = jnp.where(is_stop(front.token_BQ, stop), 0, front.segment_BQ)
  B, Q = segment_BQ.shape
  batch = frontier_batch(config, front, segment_BQ)
  batch = jax.tree.map(lambda x: x.reshape(B * Q, x.shape[1] // Q, *x.shape[2:]), batch)       # a row a branch
  cache = decoder.PagedCache(pages, table)
  out = keye.apply(config, params, batch, cache)
  hidden_BQD = out.hidden_BTD.reshape(B, Q, -1)
  token_BQ, logp_BQ = draw(config.layout, head.logits(hidden_BQD, out.head_DV), sampling, key)
  return decoder.extend_pages(cache, out.kv), next_front(front, token_BQ, logp_BQ, segment_BQ)


def fronts(config: ModelConfig, params, decode_params, batch: Batch, last_BQ, new_tokens: int, stop: tuple[int, ...],
           sampling: Sampling, seed: int, page: int = PAGE, eight: bool = False, pool: Pool | None = None
           ) -> Iterator[Frontier]:
  """The frontier after each step, on the host, until every branch has ended or has `new_tokens` tokens.

  decode_params: the parameters as decoding wants them. eight: index keys in 8 bits. pool: an empty one, to watch.
  Raises ValueError under a mesh, or for a model whose attention is not sparse.
  """
  if sharding.has_mesh():
    raise ValueError('caches in pages live on one device; use contiguous ones under a mesh')
  first, rest = jax.random.split(jax.random.key(seed))
  pool, last_BQ = pool or Pool(page), np.asarray(last_BQ)
  sequences = prompts(np.asarray(batch.segment_BT), np.asarray(batch.order_BT), last_BQ)
  source_PA = pool.begin(sequences)
  width = -(-(max(map(len, sequences.values()), default=0) + new_tokens) // pool.size)
  source_PA = np.pad(source_PA, ((0, room(pool.total) - pool.total), (0, 0)), constant_values=-1)
  pages, front = prefill(config, params, batch, jnp.asarray(last_BQ), source_PA, eight, sampling, first)
  for n in range(new_tokens):
    now = jax.tree.map(np.asarray, front)
    yield now
    going = ((now.segment_BQ > 0) & ~np.isin(now.token_BQ, stop)).reshape(-1)
    if n + 1 == new_tokens or not going.any():
      return
    for sequence in [s for s in pool.lengths if not going[s]]:
      pool.end(sequence)
    for sequence in pool.lengths:
      pool.grow(sequence)
    short = room(pool.total) - pages.ik_PAJ.shape[1]
    if short > 0:
      pages = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2))), pages)
    table = Table(*pool.table(last_BQ.size, width))
    pages, front = step(config, decode_params, pages, table, front, stop, sampling, jax.random.fold_in(rest, n + 1))


def room(pages: int) -> int:
  """Pages of the device's pool: few sizes, so that few programs are compiled."""
  return 1 << max(pages - 1, 0).bit_length()
