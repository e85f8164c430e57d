import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.dsa_decode import Pages, dsa_decode, eight_bits, newest, tpu, write, xla
from pallas_kernels.mask import NEG_INF
from tests.pallas_kernels import cases, independent, kinds
from tests.tolerances import assert_close

KINDS = ('reference', 'xla', 'blocks', 'tpu', 'gpu')       # blocks: xla with blocks of few tokens; kernels: interpreted
S, T, A = 24, 3, 4
SIZE = dict(B=3, T=S, H=4, G=2, K=8, I=2, J=8, layout='one')


def paged(case, lengths, seed=0, eight=False, spare=3):
  """The rows of a case cut after `lengths` tokens, in pages that lie anywhere; all else in the pool is NaN."""
  rng = np.random.default_rng(seed)
  B, N = len(lengths), S // A
  place_BN = rng.permutation(B * N + spare)[:B * N].reshape(B, N)
  scale = None
  ik = case.ik
  if eight:
    ik, scale = eight_bits(ik)

  def pool(x_BS, fill=np.nan):
    out = np.full((B * N + spare, A, *x_BS.shape[2:]), fill, np.asarray(x_BS).dtype)
    for b, length in enumerate(lengths):
      for s in range(length):
        out[place_BN[b, s // A], s % A] = x_BS[b, s]
    return jnp.asarray(out)

  used = np.arange(N) * A < np.asarray(lengths)[:, None]
  table = np.where(used, place_BN, rng.choice([-1, 10 ** 6], (B, N))).astype(np.int32)
  pages = Pages(pool(case.k), pool(case.v), pool(ik), None if scale is None else pool(scale))
  return pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def queries(case, lengths):
  """q, iq and gate of the last T tokens of each row; of places before the row: of its first token."""
  at = np.maximum(np.asarray(lengths)[:, None] - T + np.arange(T), 0)
  return [jnp.take_along_axis(jnp.asarray(x), at.reshape(*at.shape, *(1,) * (x.ndim - 2)), 1)
          for x in (case.q, case.iq, case.gate)]


@functools.cache
def program(kind: str, topk: int):
  def run(q, pages, iq, gate, table, lengths):
    size, xla.BLOCK = xla.BLOCK, 8 if kind == 'blocks' else xla.BLOCK
    try:
      with kinds.small(kind if kind in dispatch.KERNELS else 'xla'):
        return dsa_decode(q, pages, iq, gate, table, lengths, topk=topk,
                          implementation='xla' if kind == 'blocks' else kind)
    finally:
      xla.BLOCK = size
  return jax.jit(run)


def decode(kind, case, lengths, topk, **how):
  pages, table, lengths_B = paged(case, lengths, **how)
  q, iq, gate = queries(case, lengths)
  return program(kind, topk)(q, pages, iq, gate, table, lengths_B)


def chosen(out, case, b, t, length) -> set[int]:
  """The places that query t of sequence b selected, from its threshold and last place."""
  order = length - T + t
  value = independent.scores(case, b, order)
  threshold, last = float(out.selection.threshold_BT[b, t]), int(out.selection.last_BT[b, t])
  return {s for s in range(order + 1) if value[s] > threshold or (value[s] == threshold and s <= last)}


@pytest.mark.parametrize('kind', [*KINDS[:-1], kinds.GPU])
class TestEveryImplementation:

  @pytest.mark.parametrize('topk', [1, 5, 40])
  def test_equals_plain_loops(self, kind, topk):
    case, lengths = cases.make(topk, **SIZE), (24, 9, 4)
    out = decode(kind, case.cast('float32'), lengths, topk)
    o, lse, _ = independent.attention(case, lambda b, t: independent.chosen(case, b, t, topk))
    for b, n in enumerate(lengths):
      assert_close(out.o_BTHK[b], o[b, n - T:n])
      assert_close(out.lse_BTH[b], lse[b, n - T:n])
      for t in range(T):
        assert chosen(out, case, b, t, n) == set(independent.chosen(case, b, n - T + t, topk))

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_is_the_forward_pass_of_training(self, kind, dtype):
    case, lengths = cases.make(7, **SIZE).cast(dtype), (24, 17, 5)
    out = decode(kind, case, lengths, 5)
    whole = dsa_attention(*case, topk=5, want_kl=False)
    for b, n in enumerate(lengths):
      assert_close(out.o_BTHK[b], whole.o_BTHK[b, n - T:n], dtype)
      assert_close(out.lse_BTH[b], whole.lse_BTH[b, n - T:n], dtype)
      for got, want in zip(out.selection, whole.selection):
        assert (np.asarray(got[b]) == np.asarray(want[b, n - T:n])).all()

  def test_empty_and_one_token_sequences(self, kind):
    case = cases.make(8, **SIZE).cast('float32')
    out = decode(kind, case, (0, 1, 2), 5)
    seen = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1]], bool)
    assert (np.asarray(out.o_BTHK)[~seen] == 0).all() and (np.asarray(out.lse_BTH)[~seen] == np.float32(NEG_INF)).all()
    alone = np.repeat(np.asarray(case.v)[1:2, 0], 2, axis=1)[0]            # one key: its value, for all query heads
    assert_close(out.o_BTHK[1, 2], alone)
    assert np.isfinite(np.asarray(out.o_BTHK)).all()

  def test_index_keys_of_eight_bits_are_scaled_before_the_product(self, kind):
    """Small integers fit into 8 bits exactly: the very same result as without."""
    case, lengths = cases.make(9, **SIZE).cast('float32'), (24, 17, 5)
    wide = case._replace(ik=case.ik * jnp.exp2(jnp.arange(S) % 5 - 2.0)[:, None])
    for got, want in zip(jax.tree.leaves(decode(kind, wide, lengths, 5, eight=True)),
                         jax.tree.leaves(decode(kind, wide, lengths, 5))):
      assert (np.asarray(got) == np.asarray(want)).all()

  def test_where_the_pages_lie_changes_nothing(self, kind):
    case, lengths = cases.make(10, **SIZE, index='normal').cast('float32'), (23, 11, 3)
    first, second = (jax.tree.leaves(decode(kind, case, lengths, 5, seed=seed)) for seed in (0, 1))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, second))


@pytest.mark.parametrize('others', [KINDS[1:3], pytest.param(('tpu', 'gpu'), marks=pytest.mark.slow)])
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2 ** 31 - 1), topk=st.sampled_from([1, 5]), eight=st.booleans(),
                  lengths=st.tuples(*[st.integers(0, S)] * 3), gate=st.sampled_from([1.0, 0.0, -0.0]))
def test_every_implementation_chooses_the_same_set(others, seed, topk, eight, lengths, gate):
  case = cases.make(seed, **SIZE)
  case = case._replace(gate=case.gate * gate)
  outs = [decode(kind, case.cast('float32'), lengths, topk, seed=seed, eight=eight) for kind in ('reference', *others)]
  for out in outs:
    assert all(np.isfinite(x).all() for x in out[:2])
    for b, n in enumerate(lengths):
      for t in range(max(T - n, 0), T):
        assert chosen(out, case, b, t, n) == set(independent.chosen(case, b, n - T + t, topk))
    for got, want in zip(out[:2], outs[0][:2]):
      assert_close(np.asarray(got) + 1, np.asarray(want) + 1)      # + 1: all may be 0


class TestTPU:

  def arguments(self, eight=False):
    case, lengths = cases.make(12, **SIZE).cast('float32'), (24, 9, 1)
    pages, table, lengths_B = paged(case, lengths, eight=eight)
    q, iq, gate = queries(case, lengths)
    return q, pages, iq, gate, table, lengths_B

  def test_tables_too_large_for_one_call_go_one_after_the_other(self, monkeypatch):
    together = program('tpu', 5)(*self.arguments())
    monkeypatch.setattr(tpu, 'ENTRIES', S // A)
    for got, want in zip(jax.tree.leaves(program.__wrapped__('tpu', 5)(*self.arguments())), jax.tree.leaves(together)):
      assert (np.asarray(got) == np.asarray(want)).all()

  def test_scores_that_do_not_fit_are_refused(self):
    q, pages, iq, gate, _, lengths = self.arguments()
    with pytest.raises(ValueError, match='queries against 1000000 pages need more than 16 MiB of VMEM'):
      jax.eval_shape(functools.partial(dsa_decode, topk=5, implementation='tpu'), q, pages, iq, gate,
                     jax.ShapeDtypeStruct((3, 10 ** 6), jnp.int32), lengths)

  @pytest.mark.slow
  def test_no_races(self, monkeypatch):
    arguments = self.arguments(eight=True)
    out = kinds.without_races(monkeypatch, program.__wrapped__('tpu', 5), *arguments)
    want = program('reference', 5)(*arguments)
    assert_close(out.o_BTHK, want.o_BTHK)
    for got, expected in zip(out.selection, want.selection):
      assert (np.asarray(got) == np.asarray(expected)).all()


@pytest.mark.parametrize('eight', [False, True])
def test_new_tokens_are_written_where_they_are_read(eight):
  """Pages that miss the last tokens of each sequence, and get them, are the pages that had them from the start."""
  case, lengths = cases.make(11, **SIZE).cast('float32'), (24, 9, 2)
  pages, table, lengths_B = paged(case, lengths, eight=eight)
  slot_BT = np.asarray(newest(table, lengths_B, T, pages))
  assert len(set(slot_BT.flat)) == slot_BT.size and slot_BT[2, 0] >= pages.ik_PAJ.shape[0] * A     # the third has two
  at = np.maximum(np.asarray(lengths)[:, None] - T + np.arange(T), 0)
  new = [jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), 1) for x in (case.k, case.v, case.ik)]
  erased = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]).at[slot_BT].set(7, mode='drop').reshape(x.shape), pages)
  assert not np.array_equal(erased.v_PAGK, pages.v_PAGK, equal_nan=True)
  got = write(erased, slot_BT.reshape(-1), *(x.reshape(-1, *x.shape[2:]) for x in new))
  for x, want in zip(jax.tree.leaves(got), jax.tree.leaves(pages)):
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(want, np.float32))


def test_eight_bits_keep_three_of_mantissa():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7, 64)) * 10.0 ** np.arange(-3, 4)[:, None])
  bits, scale = eight_bits(x)
  assert bits.dtype == jnp.float8_e4m3fn and scale.shape == (5, 7)
  assert (np.log2(np.asarray(scale)) % 1 == 0).all()
  back = np.asarray(bits, np.float32) * np.asarray(scale)[..., None]
  largest = np.abs(np.asarray(x)).max(-1, keepdims=True)
  assert (np.abs(back - x) <= np.maximum(np.abs(x) / 16, largest * 2 ** -16)).all()
  zero, one = eight_bits(jnp.zeros((2, 4)))
  assert (np.asarray(zero, np.float32) == 0).all() and (np.asarray(one) == 1).all()


@pytest.mark.parametrize('change, message', [
  (dict(topk=0), 'topk is 0'), (dict(tokens=33), '33 new tokens'), (dict(heads=3), '3 query heads'),
  (dict(bits=jnp.int8), 'index keys of int8 need ik_scale_PA')])
def test_what_cannot_be_decoded_is_named(change, message):
  heads, tokens = change.get('heads', 4), change.get('tokens', 1)
  pages = Pages(*[jnp.zeros((2, A, 2, 8))] * 2, jnp.zeros((2, A, 8), change.get('bits', jnp.float32)), None)
  with pytest.raises(ValueError, match=message):
    dsa_decode(jnp.zeros((1, tokens, heads, 8)), pages, jnp.zeros((1, tokens, 2, 8)), jnp.zeros((1, tokens, 2)),
               jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), topk=change.get('topk', 1))
