"""Our side of `keye bench model`: prefill, training step and decoding of one mid-sized decoder, through the functions
that training and generation use.
"""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Batch
from keye_jax.config import IndexerConfig, ModelConfig, OptimizerConfig, TextConfig
from keye_jax.nn import counts, keye
from keye_jax.objectives.sft import sft
from keye_jax.rollout import frontier, sampler
from keye_jax.steps import state
from keye_jax.steps.optimizer import make_optimizer, rates
from keye_jax.steps.update import make_update
from launch.bench_timing import timed

MODEL = ModelConfig(TextConfig(layers=8, embed=512, heads=8, kv_heads=2, head_dim=64, vocab=8192, ffn=256, experts=32,
                               experts_per_token=4, rope_theta=1e6))
INDEXER = IndexerConfig(heads=4, head_dim=32, topk=2048)      # heads x head_dim = heads x head_dim of attention / 4


def peer_shape(config: ModelConfig) -> dict:
  """Keyword arguments of transformers' Qwen3MoeConfig for the same decoder."""
  t = config.text
  return dict(vocab_size=t.vocab, hidden_size=t.embed, num_hidden_layers=t.layers, num_attention_heads=t.heads,
              num_key_value_heads=t.kv_heads, head_dim=t.head_dim, num_experts=t.experts,
              num_experts_per_tok=t.experts_per_token, moe_intermediate_size=t.ffn, norm_topk_prob=True,
              decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False, rope_theta=t.rope_theta,
              rms_norm_eps=t.norm_eps, max_position_embeddings=t.max_position)


def text_batch(config: ModelConfig, tokens: int, seed: int = 0) -> Batch:
  """One row of random text."""
  rng = np.random.default_rng(seed)
  token_BT = rng.integers(0, config.text.vocab, (1, tokens), dtype=np.int32)
  place_BT = np.arange(tokens, dtype=np.int32)[None]
  none = np.zeros((1, 0, 0), np.int32)
  return jax.tree.map(jnp.asarray, Batch(
      token_BT, np.roll(token_BT, -1, 1), np.ones((1, tokens), np.float32), np.repeat(place_BT[..., None], 3, 2),
      np.full((1, tokens), 1 << 8, np.int32), place_BT, np.full((1, tokens), -1, np.int32),
      np.zeros((1, 0, 0, config.vision.patch_dim), np.uint8), np.zeros((1, 0, 0, 4), np.int32), none,
      np.zeros((1, tokens), np.int32)))


def flops(config: ModelConfig, kind: str, tokens: int, whole: bool) -> float:
  """Matrix products of a prefill up to the last token's logits, or of a training step; 0 for decoding, which waits for
  memory. whole: the last layer of a prefill computes all of every token, not its key and value alone."""
  t, part = config.text, counts.flops_per_token(config, tokens)
  each = part['layers'] + part['attention']
  read = each if whole else each * (1 - 1 / t.layers) + 4 * t.embed * t.kv_heads * t.head_dim
  return {'prefill': tokens * read + part['head'], 'train': 3 * tokens * (each + part['head'])}.get(kind, 0.0)


@functools.partial(jax.jit, static_argnums=0)
def read(config: ModelConfig, params, batch: Batch, last_BQ):
  """A prompt as generation reads it: first token and caches. The peer computes the last token's logits alone."""
  return frontier.read_prompts(config, params, batch, last_BQ, frontier.GREEDY, None)


def prefill(config: ModelConfig, params, tokens: int) -> Callable[[], float]:
  batch, last_BQ = text_batch(config, tokens), jnp.full((1, 1), tokens - 1)
  return lambda: timed(read, config, params, batch, last_BQ)[0]


def train(config: ModelConfig, params, tokens: int) -> Callable[[], float]:
  """One whole training step: forward, backward, clipping, AdamW."""
  tx, rate = make_optimizer(OptimizerConfig()), rates(OptimizerConfig(), 1000)(0)
  update = make_update(functools.partial(keye.apply, config), sft(config.layout, 0.001, 1.0), tx)
  batch = text_batch(config, tokens)
  current = [state.create(jax.tree.map(jnp.copy, params), tx, (), config.dtype, jax.random.key(0))]

  def once():
    seconds, (current[0], _) = timed(update, current[0], batch, rate)
    return seconds
  return once


def decode(config: ModelConfig, params, tokens: int, new: int) -> Callable[[], float]:
  """`new` greedy tokens after the prompt; reading the prompt is not timed."""
  batch, last_BQ = text_batch(config, tokens), jnp.full((1, 1), tokens - 1)
  split = sampler.decode_params(params)
  greedy, key = sampler.Sampling(), jax.random.key(0)

  def once():
    cache, front = jax.block_until_ready(
        sampler.prefill(config, params, batch, last_BQ, tokens + new, greedy, key))
    return timed(sampler.decode, config, split, cache, front, new, (), greedy, key)[0]
  return once
