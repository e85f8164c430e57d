"""No program of a long row holds a T x S matrix: the compiler's own account of its temporaries, at 8192 tokens."""
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.index_select import index_select
from pallas_kernels.indexer_warmup import indexer_warmup

T, H, G, K, I, J = 8192, 2, 1, 16, 2, 8


def shapes(T):
  f = lambda *s: jax.ShapeDtypeStruct((1, T, *s), jnp.float32)
  i = jax.ShapeDtypeStruct((1, T), jnp.int32)
  return dict(q=f(H, K), k=f(G, K), v=f(G, K), iq=f(I, J), ik=f(J), gate=f(I), places=(i, i, i, i), lse=f(H))


def dense(a):
  return (dense_attention(a['q'], a['k'], a['v'], *a['places'])[0] ** 2).sum()


def sparse(a):
  out = dsa_attention(*(a[n] for n in ('q', 'k', 'v', 'iq', 'ik', 'gate')), *a['places'], topk=512)
  return (out.o_BTHK ** 2).sum() + out.kl_BT.sum()


def select(a):
  return index_select(a['iq'], a['ik'], a['gate'], *a['places'], topk=512).threshold_BT.sum()


def warmup(a):
  return indexer_warmup(a['q'], a['k'], a['lse'], a['iq'], a['ik'], a['gate'], *a['places']).sum()


@pytest.mark.parametrize('fn, differentiate', [(dense, True), (sparse, True), (select, False), (warmup, True)])
def test_temporaries_are_far_below_a_square(fn, differentiate):
  def run(a):
    floats = {n: x for n, x in a.items() if n != 'places'}
    loss = lambda floats: fn(floats | {'places': a['places']})
    return jax.grad(loss)(floats) if differentiate else loss(floats)

  temporaries = jax.jit(run).lower(shapes(T)).compile().memory_analysis().temp_size_in_bytes
  assert 0 < temporaries < T * T * 4 / 8
