"""The kernels of the backward pass and of the indexer's loss on a GPU, interpreted, over random lists.

T queries of a group, S keys, G KV heads, N stacked queries, K head dim, I indexer heads, J indexer head dim, M groups.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu_call, tiles
from pallas_kernels.dsa_attention import gpu_backward, gpu_indexer, gpu_lists
from pallas_kernels.index_select.xla import products, score
from pallas_kernels.indexer_warmup.xla import head_mean, kl_gradient_one, kl_one
from pallas_kernels.mask import NEG_INF
from tests.tolerances import assert_close

M, T, S, G, R, K, I, J = 3, 8, 96, 2, 2, 16, 2, 8
U = 128
SCALE = K ** -0.5


def make(dtype: str):
  """(mask_MTS, lists, arrays of the queries and keys, sums to add to): a group that selects no key, one that selects
  more than a step, a query that selects none, and the same keys again in several groups."""
  rng = np.random.default_rng(0)
  mask_MTS = rng.random((M, T, S)) < np.array([0.1, 0.0, 0.4])[:, None, None]
  mask_MTS[0, 3] = False
  index_MU, word_MU = np.zeros((2, M, U), np.int32)
  flag_MS = mask_MTS.any(1)
  for m in range(M):
    listed, = np.nonzero(flag_MS[m])
    index_MU[m, :len(listed)] = listed
    word_MU[m, :len(listed)] = (mask_MTS[m][:, listed] << np.arange(T)[:, None]).sum(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  model = lambda *shape: normal(*shape).astype(dtype)
  arrays = dict(q=model(M, G, R * T, K), do=model(M, G, R * T, K), iq=model(M, I, T, J), gate=normal(M, T, I),
                dkl=normal(M, T), k=model(S, G, K), v=model(S, G, K), ik=model(S, J), delta=normal(M, G, R * T))
  carry = normal(S, G, K), normal(S, G, K), normal(S, J)
  return jnp.asarray(mask_MTS), (index_MU, word_MU, flag_MS.sum(1).astype(np.int32)), arrays, carry


@jax.jit
def expected(mask_MTS, x, carry):
  """(lse_MGN, kl_MT, index_lse_MT, dkeys, (dq_MGNK, diq_MITJ, dgate_MTI)) over all keys under the mask."""
  k_GSK, v_GSK = x['k'].swapaxes(0, 1), x['v'].swapaxes(0, 1)

  def one(mask_TS, q, do, iq, gate, dkl, delta):
    logits_GNS = jnp.where(jnp.tile(mask_TS, (R, 1)), tiles.dot('GNK,GSK->GNS', q, k_GSK) * SCALE, NEG_INF)
    lse_GN = jnp.where(jnp.tile(mask_TS.any(1), R), jax.nn.logsumexp(logits_GNS, -1), NEG_INF)
    bias_TS = tiles.bias(mask_TS)
    p_GNS, dq, dk, dv = tiles.gradients(q, k_GSK, v_GSK, lse_GN, delta, do, bias_TS, SCALE)
    z_ITS, p_TS = products(iq, x['ik']), head_mean(p_GNS, T)
    kl_T, index_lse_T = kl_one(score(z_ITS, gate), p_TS, mask_TS)
    diq, dik, dgate = kl_gradient_one(z_ITS, p_TS, bias_TS, iq, x['ik'], gate, index_lse_T, dkl)
    return lse_GN, kl_T, index_lse_T, (jnp.moveaxis(dk, -1, 0), jnp.moveaxis(dv, -1, 0), dik), (dq, diq, dgate)

  lse, kl, index_lse, dkeys, dqueries = jax.vmap(one)(mask_MTS, *(x[n] for n in 'q do iq gate dkl delta'.split()))
  return lse, kl, index_lse, [c + d.sum(0) for c, d in zip(carry, dkeys)], dqueries


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(gpu_call, 'INTERPRET', True)
  monkeypatch.setattr(gpu_lists, 'KEYS', 16)
  monkeypatch.setattr(gpu_lists, 'WRITERS', 2)
  monkeypatch.setattr(gpu_indexer, 'PARTS', 2)
  monkeypatch.setattr(gpu_indexer, 'ROWS', 8)


@pytest.mark.usefixtures('interpreted')
class TestBackward:

  @pytest.mark.parametrize('dtype, buffer', [('float32', 2**14), ('bfloat16', 2**30)])
  def test_gradients_are_those_under_a_mask(self, monkeypatch, dtype, buffer):
    """In batches of a step, which end within a list, and in one."""
    monkeypatch.setattr(gpu_backward, 'BUFFER', buffer)
    mask, lists, x, carry = make(dtype)
    exact = {n: a.astype(jnp.float32) for n, a in x.items()}
    lse, _, index_lse, dkeys, dqueries = expected(mask, exact, carry)
    run = jax.jit(functools.partial(gpu_backward.gradients, SCALE, G * R, True))
    args = (lists, x['q'], x['do'], lse, x['delta'], x['iq'], x['gate'], index_lse, x['dkl'], x['k'], x['v'], x['ik'],
            carry)
    got = run(*args)
    for name, a, b in zip(('dk', 'dv', 'dik', 'dq', 'diq', 'dgate'), (*got[0], *got[1]), (*dkeys, *dqueries)):
      assert_close(a, b, dtype, name)
    again = run(*args)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again)))

  def test_without_the_loss_its_gradients_are_as_before(self):
    mask, lists, x, carry = make('float32')
    lse, _, index_lse, dkeys, dqueries = expected(mask, x, carry)
    run = jax.jit(functools.partial(gpu_backward.gradients, SCALE, G * R, False))
    got, own = run(lists, x['q'], x['do'], lse, x['delta'], x['iq'], x['gate'], index_lse, x['dkl'], x['k'], x['v'],
                   x['ik'], carry)
    for a, b in zip((*got, own[0]), (*dkeys[:2], carry[2], dqueries[0])):
      assert_close(a, b)
    assert not np.any(own[1]) and not np.any(own[2])

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_the_loss_is_that_under_a_mask(self, dtype):
    mask, lists, x, carry = make(dtype)
    lse, kl, index_lse, *_ = expected(mask, {n: a.astype(jnp.float32) for n, a in x.items()}, carry)
    got_kl, got_lse = jax.jit(functools.partial(gpu_indexer.indexer_loss, SCALE, G * R))(
        lists, x['q'], lse, x['iq'], x['gate'], x['k'], x['ik'])
    assert_close(got_kl, kl, dtype, 'kl')
    seen = mask.any(2)
    assert_close(jnp.where(seen, got_lse, 0), jnp.where(seen, index_lse, 0), dtype, 'log-sum-exp')


def test_rows_of_the_buffer_are_sorted_by_key_and_then_by_group(interpreted):
  _, (index_MU, _, count_M), _, _ = make('float32')
  inverse = gpu_lists.invert(index_MU, count_M, S)
  start_M, length = np.asarray(inverse.start_M), int(inverse.length)
  assert (start_M % gpu_lists.STEP == 0).all()
  for first in range(0, length, 64):
    span = gpu_lists.batch(inverse, jnp.int32(first), 64)
    rows = {}
    for m in range(M):
      for u in range(count_M[m]):
        if first <= start_M[m] + u < first + 64:
          s = index_MU[m, u]
          rows[s, m] = int(span.offset_S[s] + span.before_MS[m, s])
    assert [rows[key] for key in sorted(rows)] == list(range(len(rows)))
    assert (np.bincount([s for s, _ in rows], minlength=S) == span.total_S).all()
