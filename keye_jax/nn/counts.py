"""What a model is made of, in numbers: parameters, bytes, FLOPs and cache by part. Nothing is allocated."""
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax

from keye_jax.config import ModelConfig
from keye_jax.nn import flops as flops_of
from keye_jax.nn import model
from keye_jax.sharding import SCALE

WIDTH = {'float32': 4, 'bfloat16': 2}
# By the first name of a parameter's path; what is not here is of the language model.
PARTS = {'vision': 'vision', 'projector': 'projector'} | dict.fromkeys(('text', 'log_scale', 'bias'), 'text tower')


def parts(params) -> dict[str, int]:
  """Parameters of the tree by part: language, indexers, vision, projector; text tower where there is one. The scales of
  weights in 8 bits are none."""
  total = dict(language=0, indexers=0, vision=0, projector=0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    keys = [k.key for k in path]
    if keys[-1].endswith(SCALE):
      continue
    part = 'indexers' if 'indexer' in keys else PARTS.get(keys[0], 'language')
    total[part] = total.get(part, 0) + math.prod(leaf.shape)
  return total


def active(config: ModelConfig) -> dict[str, int]:
  """Parameters that one text token multiplies with: matrices only, routed experts by their share, no embedding."""
  t = config.text
  attention = 2 * t.embed * t.head_dim * (t.heads + t.kv_heads)
  mlp = 3 * t.embed * t.ffn * (t.experts_per_token if t.experts else 1) + t.embed * t.experts
  i = t.indexer
  indexer = t.embed * (i.heads * i.head_dim + i.heads + i.head_dim) if i.heads else 0
  head = 0 if config.contrast else t.embed * t.vocab         # two towers compare one embedding of a sample
  return dict(layers=t.layers * (attention + mlp), head=head, indexers=t.layers * indexer)


def flops_per_token(config: ModelConfig, length: int) -> dict[str, float]:
  """Forward FLOPs of one token, averaged over a causal sequence of `length` tokens (multiply-add = 2).

  The training step costs three times as much for everything but the frozen parts. Vision is per language token that
  an image fills, with attention inside a frame of one 384-pixel square.
  """
  t, v, i = config.text, config.vision, config.text.indexer
  keys = (length + 1) / 2
  sparse = config.attention == 'sparse' and i.heads
  # mean over t of min(t, k): below k a query sees everything
  seen = keys if not sparse or length <= i.topk else (i.topk * (i.topk + 1) / 2 + (length - i.topk) * i.topk) / length
  a = active(config)
  flops = dict(layers=2.0 * a['layers'], head=2.0 * a['head'],
               attention=4.0 * t.layers * t.heads * t.head_dim * seen)
  if i.heads:
    flops['indexer_projections'] = 2.0 * a['indexers']
    flops['indexer_scores'] = 2.0 * t.layers * i.heads * i.head_dim * keys
  if v.layers:
    patch, pair = flops_of.patch(v)
    flops['vision'] = v.merge ** 2 * (patch + pair * v.grid ** 2)
    if not config.contrast:
      flops['projector'] = flops_of.projected(config)
  return flops


def row_flops(config: ModelConfig, tokens: int, samples: Iterable[int]) -> float:
  """Forward FLOPs of the language model on a row of so many tokens, with padding, that holds samples of these
  lengths."""
  part = flops_per_token(config, tokens)
  linear = sum(part[k] for k in ('layers', 'head', 'indexer_projections') if k in part)
  return tokens * linear + sum(n * _pairs(config, n) for n in samples)


@functools.lru_cache(1 << 16)
def _pairs(config: ModelConfig, length: int) -> float:
  """FLOPs of a token with the keys that it sees, averaged over a sample."""
  part = flops_per_token(config, length)
  return part['attention'] + part.get('indexer_scores', 0.0)


def cache_bytes_per_token(config: ModelConfig) -> dict[str, int]:
  t = config.text
  width = WIDTH[config.dtype]
  kv = 2 * t.layers * t.kv_heads * t.head_dim * width
  return dict(kv=kv, index_keys=t.layers * t.indexer.head_dim * width if t.indexer.heads else 0)


def describe(config: ModelConfig, length: int | None = None) -> dict[str, Any]:
  """Everything above in one JSON-able dict; `length` (tokens) defaults to the model's longest."""
  length = length or config.text.max_position
  by_part = parts(model.param_shapes(config))
  total, a = sum(by_part.values()), active(config)
  return dict(parameters=total, parameters_by_part=by_part,
              bytes_by_part={k: n * WIDTH[config.param_dtype] for k, n in by_part.items()},
              active_parameters=sum(a.values()), active_by_part=a, length=length,
              flops_per_token=flops_per_token(config, length), cache_bytes_per_token=cache_bytes_per_token(config))
