"""What generation has in common whatever its caches: the frontier of newest tokens, how the next ones are drawn, and
the pass over the prompts.

B rows, Q branches of a row, T prompt tokens, N new tokens, V vocabulary.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Batch
from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import head, keye


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


def read_prompts(config: ModelConfig, params, batch: Batch, last_BQ, sampling: Sampling, key):
  """(keys and values of the prompts, leaves [L, B, T, ...]; Frontier with the first token of each branch).

  last_BQ: place in the row of each branch's last prompt token; -1 where a row has fewer branches.
  """
  batch, last_BQ = sharding.constrain_batch(batch, config.layout), constrain_rows(config, last_BQ)
  place_BQ = jnp.maximum(last_BQ, 0)
  out = keye.apply(config, params, batch, keep_kv=True, asking_BQ=place_BQ)
  at = functools.partial(sharding.take, index_BQ=place_BQ, layout=config.layout)
  token_BQ, logp_BQ = draw(config.layout, head.logits(out.hidden_BTD, out.head_DV), sampling, key)
  segment_BQ = jnp.where(last_BQ < 0, 0, at(batch.segment_BT))
  return out.kv, Frontier(token_BQ, logp_BQ, at(batch.position_BT3) + 1, segment_BQ, at(batch.order_BT) + 1)


def frontier_batch(config: ModelConfig, front: Frontier, segment_BQ: jax.Array) -> Batch:
  """The newest tokens as a batch of text, a row's branches beside each other."""
  B, Q = segment_BQ.shape
  none = jnp.zeros((B, 0, 0), jnp.int32)
  return Batch(front.token_BQ, front.token_BQ, jnp.zeros((B, Q)), front.position_BQ3, segment_BQ, front.order_BQ,
               jnp.full((B, Q), -1, jnp.int32), jnp.zeros((B, 0, 0, config.vision.patch_dim), jnp.uint8),
               jnp.zeros((B, 0, 0, 4), jnp.int32), none, jnp.zeros((B, Q), jnp.int32))


def next_front(front: Frontier, token_BQ: jax.Array, logp_BQ: jax.Array, segment_BQ: jax.Array) -> Frontier:
  return Frontier(token_BQ, logp_BQ, front.position_BQ3 + 1, segment_BQ, front.order_BQ + 1)
