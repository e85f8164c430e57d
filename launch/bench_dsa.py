"""`keye bench model --dsa N`: the parts of sparse attention of one layer as the sequence grows, beside dense attention.

T tokens, S keys, I indexer heads, J indexer head dim, H query heads, G KV heads, K head dim.
"""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from data_pipelines.errors import InputError
from keye_jax.nn import keye
from launch import bench_attention_cpu, bench_model, bench_rounds
from launch.bench_timing import timed
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.index_select import index_select

SMALLEST = 8192


def measure(tokens: int, say: Callable[[str], None], smallest: int = SMALLEST, config=bench_model.MODEL) -> dict:
  """Seconds of each part at `smallest`, twice that, ... up to `tokens`, the exponent of its growth, and prefill of the
  whole model at `tokens`. Raises InputError when there are not at least two lengths.

  score: all index scores, reduced to their maxima. select: what the exact top-k adds to that. attend: attention to a
  selection that is given. sparse: the fused op of the three, without the indexer's loss.
  """
  sizes = [smallest * 2 ** i for i in range(32) if smallest * 2 ** i <= tokens]
  if len(sizes) < 2:
    raise InputError(f'keye bench: --dsa {tokens} leaves one length or none; it starts at {smallest} and doubles')
  seconds = {}
  for n in sizes:
    row = parts(bench_model.sparse(config), n)
    for name, s in row.items():
      seconds.setdefault(name, {})[str(n)] = s
    say(f'{n} tokens, one layer: ' + ', '.join(f'{name} {s:.2f} s' for name, s in row.items()) +
        (f'; {sizes[-1]} in about {sum(row.values()) * (sizes[-1] / n) ** 2:.0f} s' if n < sizes[-1] else ''))
  prefill = {}
  for name, c in (('dense', config), ('sparse', bench_model.sparse(config))):
    side = bench_model.prefill(c, keye.init(c, jax.random.key(0)), sizes[-1])
    side()                                                                 # compiles
    prefill[name] = side()
    say(f'prefill of {sizes[-1]} tokens, {name}: {prefill[name]:.1f} s')
  growth = {name: bench_rounds.exponent(sizes, list(row.values())) if min(row.values()) > 0 else None
            for name, row in seconds.items()}
  return {'topk': bench_model.INDEXER.topk, 'seconds': seconds, 'exponents': growth,
          'prefill tokens': sizes[-1], 'prefill seconds': prefill}


def parts(config, n: int) -> dict[str, float]:
  """Seconds of one layer's attention over a row of n tokens: best of two after compiling."""
  t, index = config.text, config.text.indexer
  keys = iter(jax.random.split(jax.random.key(0), 6))
  normal = lambda *shape: jax.random.normal(next(keys), (1, n, *shape))
  q, k, v = normal(t.heads, t.head_dim), normal(t.kv_heads, t.head_dim), normal(t.kv_heads, t.head_dim)
  iq, ik, gate = normal(index.heads, index.head_dim), normal(index.head_dim), normal(index.heads)
  segment, order = jnp.full((1, n), 1 << 8, jnp.int32), jnp.arange(n, dtype=jnp.int32)[None]
  place = segment, segment, order, order
  sparse = functools.partial(dsa_attention, topk=index.topk, want_kl=False)
  select = jax.jit(functools.partial(index_select, topk=index.topk))
  everything = q, k, v, iq, ik, gate, *place
  words = jax.jit(functools.partial(bench_attention_cpu.words, index.topk))(everything)

  def best(fn, *args):
    timed(fn, *args)
    return min(timed(fn, *args)[0] for _ in range(2))

  score = best(jax.jit(bench_attention_cpu.score), *(a[0] for a in (iq, ik, gate, *place)))
  return {
      'dense': best(jax.jit(lambda *a: dense_attention(*a)[0]), q, k, v, *place),
      'score': score,
      'select': best(select, iq, ik, gate, *place) - score,
      'attend': best(jax.jit(functools.partial(bench_attention_cpu.attend, index.topk)), everything, words),
      'sparse': best(jax.jit(lambda *a: sparse(*a).o_BTHK), *everything),
  }
