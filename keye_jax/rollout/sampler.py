"""Generation: prefill once, then one token a step for every open branch.

A row may hold one prompt, or a shared trunk with several branches (the questions of a clip, the samples of a group):
each step then decodes one token for every branch of every row, and the trunk's cache is stored and read once. Caches
are contiguous, a row of slots for all branches of a row, or in pages (paged.py), a sequence for each branch.

B rows, Q branches of a row, T prompt tokens, N new tokens, V vocabulary, D embed.
"""
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Batch
from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import decoder, head, keye
from keye_jax.rollout import paged
from keye_jax.rollout.frontier import (
  GREEDY,
  Frontier,
  Samples,
  Sampling,
  constrain_rows,
  draw,
  frontier_batch,
  is_stop,
  next_front,
  read_prompts,
)

Caches = Literal['contiguous', 'paged']


@functools.partial(jax.jit, static_argnames=('config', 'slots', 'sampling'))
def prefill(config: ModelConfig, params, batch: Batch, last_BQ, slots: int, sampling: Sampling, key):
  """Reads the prompts and draws the first token of each branch: (Cache of `slots` slots, Frontier)."""
  kv, front = read_prompts(config, params, batch, last_BQ, sampling, key)
  batch = sharding.constrain_batch(batch, config.layout)
  cache = decoder.empty_cache(config, len(batch.token_BT), slots)
  return decoder.extend(cache, kv, batch.segment_BT, batch.order_BT), front


def step(config: ModelConfig, params, cache: decoder.Cache, front: Frontier, stop: tuple[int, ...],
         sampling: Sampling, key):
  """Feeds the newest tokens and draws the next ones: (Cache, Frontier)."""
  segment_BQ = jnp.where(is_stop(front.token_BQ, stop), 0, front.segment_BQ)
  batch = frontier_batch(config, front, segment_BQ)
  out = keye.apply(config, params, sharding.constrain_batch(batch, config.layout), cache)
  cache = decoder.extend(cache, out.kv, segment_BQ, front.order_BQ)
  token_BQ, logp_BQ = draw(config.layout, head.logits(out.hidden_BTD, out.head_DV), sampling, key)
  return cache, next_front(front, token_BQ, logp_BQ, segment_BQ)


stream_step = jax.jit(step, static_argnames=('config', 'stop', 'sampling'), donate_argnames='cache')


@functools.partial(jax.jit, static_argnames=('config', 'new_tokens', 'stop', 'sampling'))
def decode(config: ModelConfig, params, cache: decoder.Cache, front: Frontier, new_tokens: int,
           stop: tuple[int, ...], sampling: Sampling, key):
  """Steps until every branch has ended or has `new_tokens` tokens: (token_BQN, logp_BQN, length_BQ)."""
  B, Q = front.token_BQ.shape

  def record(out, front, n):
    token_BQN, logp_BQN, length_BQ = out
    alive_BQ = front.segment_BQ > 0
    put = lambda a, x: jax.lax.dynamic_update_index_in_dim(a, jnp.where(alive_BQ, x, 0), n, 2)
    return put(token_BQN, front.token_BQ), put(logp_BQN, front.logp_BQ), length_BQ + alive_BQ

  def more(carry):
    _, front, _, n = carry
    return (n < new_tokens) & ((front.segment_BQ > 0) & ~is_stop(front.token_BQ, stop)).any()

  def body(carry):
    cache, front, out, n = carry
    cache, front = step(config, params, cache, front, stop, sampling, jax.random.fold_in(key, n))
    return cache, front, record(out, front, n), n + 1

  empty = jnp.zeros((B, Q, new_tokens), jnp.int32), jnp.zeros((B, Q, new_tokens)), jnp.zeros((B, Q), jnp.int32)
  empty = jax.tree.map(functools.partial(constrain_rows, config), empty)
  _, _, out, _ = jax.lax.while_loop(more, body, (cache, front, record(empty, front, 0), jnp.ones((), jnp.int32)))
  return out


def generate(config: ModelConfig, params, batch: Batch, last_BQ, new_tokens: int, stop: tuple[int, ...],
             sampling: Sampling = GREEDY, seed: int = 0, caches: Caches = 'contiguous') -> Samples:
  """Answers every branch of every row. The compiled programs depend on the shapes only: bucket prompts.

  caches: 'paged' takes memory for the tokens that there are, which pays when sequences differ in length; sparse
  attention on one device only.
  """
  if caches == 'paged':
    fronts = paged.fronts(config, params, decode_params(params), batch, last_BQ, new_tokens, stop, sampling, seed)
    return collect(fronts, np.shape(last_BQ), new_tokens)
  first, rest = jax.random.split(jax.random.key(seed))
  B, Q = np.shape(last_BQ)
  slots = batch.token_BT.shape[1] + Q * new_tokens
  cache, front = prefill(config, params, batch, jnp.asarray(last_BQ), slots, sampling, first)
  return Samples(*map(np.asarray, decode(config, decode_params(params), cache, front, new_tokens, stop, sampling,
                                         rest)))


def stream(config: ModelConfig, params, batch: Batch, last_BQ, new_tokens: int, stop: tuple[int, ...],
           sampling: Sampling = GREEDY, seed: int = 0,
           caches: Caches = 'contiguous') -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Like `generate`, yielding (token_BQ, alive_BQ) as each step ends; a stop token is the last that is alive."""
  if caches == 'paged':
    for front in paged.fronts(config, params, decode_params(params), batch, last_BQ, new_tokens, stop, sampling, seed):
      yield front.token_BQ, front.segment_BQ > 0
    return
  first, rest = jax.random.split(jax.random.key(seed))
  B, Q = np.shape(last_BQ)
  slots = batch.token_BT.shape[1] + Q * new_tokens
  cache, front = prefill(config, params, batch, jnp.asarray(last_BQ), slots, sampling, first)
  params = decode_params(params)
  for n in range(new_tokens):
    token_BQ, alive_BQ = np.asarray(front.token_BQ), np.asarray(front.segment_BQ) > 0
    yield token_BQ, alive_BQ
    if n + 1 == new_tokens or not (alive_BQ & ~np.isin(token_BQ, stop)).any():
      return
    cache, front = stream_step(config, params, cache, front, stop, sampling, jax.random.fold_in(rest, n + 1))


def collect(fronts: Iterator[Frontier], shape: tuple[int, int], new_tokens: int) -> Samples:
  """What each branch has drawn: host frontiers, one a step, as Samples."""
  out = Samples(np.zeros((*shape, new_tokens), np.int32), np.zeros((*shape, new_tokens), np.float32),
                np.zeros(shape, np.int32))
  for n, front in enumerate(fronts):
    alive_BQ = front.segment_BQ > 0
    out.token_BQN[..., n], out.logp_BQN[..., n] = front.token_BQ * alive_BQ, np.where(alive_BQ, front.logp_BQ, 0)
    out.length_BQ[...] += alive_BQ
  return out


def decode_params(params):
  """Layer stacks split into a tuple of layers where that pays: on a CPU, a scan over layers would copy each layer's
  weights at every token, and a host has memory for the second copy."""
  return _split_layers(params) if jax.default_backend() == 'cpu' else params


@jax.jit
def _split_layers(params):
  L = jax.tree.leaves(params['layers'])[0].shape[0]
  return params | {'layers': tuple(jax.tree.map(lambda a: a[i], params['layers']) for i in range(L))}
