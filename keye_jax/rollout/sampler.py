"""Generation: prefill once, then one token a step for every open branch.

A row may hold one prompt, or a shared trunk with several branches (the questions of a clip, the samples of a group):
each step then decodes one token for every branch of every row, and the trunk's cache is stored and read once.

B rows, Q branches of a row, T prompt tokens, N new tokens, V vocabulary, D embed.
"""
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Batch
from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import decoder, head, keye


class Sampling(NamedTuple):
  """temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""
  temperature: float = 0.0
  top_p: float = 1.0
  top_k: int = 0


GREEDY = Sampling()


class Frontier(NamedTuple):
  """The newest token of every branch, and where the next one goes."""
  token_BQ: jax.Array        # int32
  logp_BQ: jax.Array         # float32, under the model itself (temperature 1, nothing cut off)
  position_BQ3: jax.Array
  segment_BQ: jax.Array      # 0: the branch has ended
  order_BQ: jax.Array


class Samples(NamedTuple):
  token_BQN: np.ndarray      # stop token included, 0 after it
  logp_BQN: np.ndarray
  length_BQ: np.ndarray


def draw(layout: str, logits_BQV: jax.Array, sampling: Sampling, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(token_BQ, logp_BQ). The noise is drawn for the whole batch, so a mesh does not change what is sampled."""
  noise = jax.random.gumbel(key, logits_BQV.shape) if sampling.temperature else None
  rows = ('batch', None, None)

  def fn(logits_BQV, *noise_BQV):
    logp_BQV = jax.nn.log_softmax(logits_BQV)
    if not noise_BQV:
      token_BQ = jnp.argmax(logits_BQV, -1)
    else:
      z_BQV = logits_BQV / sampling.temperature
      if cut := sampling.top_k or sampling.top_p < 1:
        order_BQV = jnp.argsort(-z_BQV, axis=-1)
        z_BQV = jnp.take_along_axis(z_BQV, order_BQV, -1)
        p_BQV = jax.nn.softmax(z_BQV)
        keep_BQV = jnp.cumsum(p_BQV, -1) - p_BQV < sampling.top_p     # the first token is always kept
        keep_BQV &= jnp.arange(z_BQV.shape[-1]) < (sampling.top_k or z_BQV.shape[-1])
        z_BQV = jnp.where(keep_BQV, z_BQV, -jnp.inf)
      token_BQ = jnp.argmax(z_BQV + noise_BQV[0], -1)
      if cut:
        token_BQ = jnp.take_along_axis(order_BQV, token_BQ[..., None], -1)[..., 0]
    token_BQ = token_BQ.astype(jnp.int32)
    return token_BQ, jnp.take_along_axis(logp_BQV, token_BQ[..., None], -1)[..., 0]

  arrays = [sharding.constrain(x, layout, *rows) for x in (logits_BQV, noise) if x is not None]
  return sharding.local(fn, layout, (rows,) * len(arrays), (rows[:2], rows[:2]))(*arrays)


def is_stop(token_BQ, stop: tuple[int, ...]):
  return (token_BQ[..., None] == jnp.asarray(stop, jnp.int32)).any(-1) if stop else jnp.zeros(token_BQ.shape, bool)


def constrain_rows(config: ModelConfig, x: jax.Array) -> jax.Array:
  """`x`, which leads with B, with its rows sharded and all other axes whole."""
  return sharding.constrain(x, config.layout, 'batch', *(None,) * (x.ndim - 1))


@functools.partial(jax.jit, static_argnames=('config', 'slots', 'sampling'))
def prefill(config: ModelConfig, params, batch: Batch, last_BQ, slots: int, sampling: Sampling, key):
  """Reads the prompts and draws the first token of each branch: (Cache of `slots` slots, Frontier).

  last_BQ: place in the row of each branch's last prompt token; -1 where a row has fewer branches.
  """
  batch, last_BQ = sharding.constrain_batch(batch, config.layout), constrain_rows(config, last_BQ)
  out = keye.apply(config, params, batch, keep_kv=True)
  cache = decoder.extend(decoder.empty_cache(config, len(batch.token_BT), slots), out.kv, batch.segment_BT,
                         batch.order_BT)

  def at(a):
    """Entries of [B, T, ...] at the last places: [B, Q, ...]. Each device reads its own rows, whole."""
    axes = ('batch',) + (None,) * (a.ndim - 1)
    read = sharding.local(jax.vmap(lambda row, i: row[i]), config.layout, (axes, ('batch', None)), axes)
    return read(constrain_rows(config, a), jnp.maximum(last_BQ, 0))

  token_BQ, logp_BQ = draw(config.layout, head.logits(at(out.hidden_BTD), out.head_DV), sampling, key)
  segment_BQ = jnp.where(last_BQ < 0, 0, at(batch.segment_BT))
  return cache, Frontier(token_BQ, logp_BQ, at(batch.position_BT3) + 1, segment_BQ, at(batch.order_BT) + 1)


def step(config: ModelConfig, params, cache: decoder.Cache, front: Frontier, stop: tuple[int, ...],
         sampling: Sampling, key):
  """Feeds the newest tokens and draws the next ones: (Cache, Frontier)."""
  segment_BQ = jnp.where(is_stop(front.token_BQ, stop), 0, front.segment_BQ)
  B, Q = segment_BQ.shape
  v = config.vision
  batch = Batch(front.token_BQ, front.token_BQ, jnp.zeros((B, Q)), front.position_BQ3, segment_BQ, front.order_BQ,
                jnp.full((B, Q), -1, jnp.int32), jnp.zeros((B, 0, 0, v.patch_dim), jnp.uint8),
                jnp.zeros((B, 0, 0, 4), jnp.int32), jnp.zeros((B, 0, 0), jnp.int32))
  out = keye.apply(config, params, sharding.constrain_batch(batch, config.layout), cache)
  cache = decoder.extend(cache, out.kv, segment_BQ, front.order_BQ)
  token_BQ, logp_BQ = draw(config.layout, head.logits(out.hidden_BTD, out.head_DV), sampling, key)
  return cache, Frontier(token_BQ, logp_BQ, front.position_BQ3 + 1, segment_BQ, front.order_BQ + 1)


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
             sampling: Sampling = GREEDY, seed: int = 0) -> Samples:
  """Answers every branch of every row. The compiled programs depend on the shapes only: bucket prompts."""
  first, rest = jax.random.split(jax.random.key(seed))
  B, Q = np.shape(last_BQ)
  slots = batch.token_BT.shape[1] + Q * new_tokens
  cache, front = prefill(config, params, batch, jnp.asarray(last_BQ), slots, sampling, first)
  return Samples(*map(np.asarray, decode(config, decode_params(params), cache, front, new_tokens, stop, sampling,
                                         rest)))


def stream(config: ModelConfig, params, batch: Batch, last_BQ, new_tokens: int, stop: tuple[int, ...],
           sampling: Sampling = GREEDY, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Like `generate`, yielding (token_BQ, alive_BQ) as each step ends; a stop token is the last that is alive."""
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


def decode_params(params):
  """Layer stacks split into a tuple of layers where that pays: on a CPU, a scan over layers would copy each layer's
  weights at every token, and a host has memory for the second copy."""
  return _split_layers(params) if jax.default_backend() == 'cpu' else params


@jax.jit
def _split_layers(params):
  L = jax.tree.leaves(params['layers'])[0].shape[0]
  return params | {'layers': tuple(jax.tree.map(lambda a: a[i], params['layers']) for i in range(L))}
