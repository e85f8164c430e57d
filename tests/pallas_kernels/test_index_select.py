import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.index_select import index_select, search, select_mask, tpu
from tests.pallas_kernels import cases, independent, kinds
from tests.tolerances import assert_close

SIZE = dict(B=2, T=24, H=4, G=2, K=8, I=2, J=8)


@functools.cache
def select(kind: str, topk: int):
  return jax.jit(kinds.named(kind, lambda *a, implementation: index_select(*a, topk=topk,
                                                                           implementation=implementation)))


def expected_mask(case, topk):
  B, T = case.q_order.shape
  mask = np.zeros((B, T, case.k.shape[1]), bool)
  for b in range(B):
    for t in range(T):
      mask[b, t, independent.chosen(case, b, t, topk)] = True
  return mask


@pytest.mark.parametrize('kind', [*kinds.KINDS, 'tpu', kinds.GPU])
class TestEveryImplementation:

  @pytest.mark.parametrize('topk', [1, 5])
  @pytest.mark.parametrize('layout, shuffle', [('one', False), ('branches', False), ('packed', True)])
  def test_chooses_the_set_of_plain_loops(self, kind, layout, shuffle, topk):
    case = cases.make(topk, **SIZE, layout=layout, shuffle=shuffle)
    selection = select(kind, topk)(*case.cast('float32').index)
    assert (np.asarray(select_mask(selection, *case.cast('float32').index)) == expected_mask(case, topk)).all()

  def test_rows_of_exact_and_negative_zeros_take_the_lowest_orders(self, kind):
    case = cases.make(1, **SIZE, layout='one', shuffle=True)
    zero = case._replace(gate=-np.abs(case.gate), ik=np.zeros_like(case.ik))     # every score is -0.0
    mask = np.asarray(select_mask(select(kind, 5)(*zero.cast('float32').index), *zero.cast('float32').index))
    lowest = zero.k_order[:, None] < 5
    causal = zero.k_order[:, None] <= zero.q_order[..., None]
    assert (mask == (lowest & causal)).all()

  def test_scores_of_real_size_may_differ_at_the_threshold_only(self, kind):
    """With inexact scores two implementations may disagree where a score is within 4 ulp of the threshold."""
    case = cases.make(2, **SIZE, index='normal').cast('float32')
    mine, other = (select(k, 5)(*case.index) for k in (kind, 'reference'))
    threshold = np.asarray(other.threshold_BT)
    seen = np.isfinite(threshold)
    gap = np.abs(np.asarray(mine.threshold_BT)[seen] - threshold[seen])
    assert (gap <= 4 * np.spacing(np.abs(threshold[seen]) + 1)).all()
    assert (np.asarray(mine.last_BT) == np.asarray(other.last_BT)).all()

  def test_bfloat16_inputs_choose_by_float32_scores(self, kind):
    case = cases.make(3, **SIZE)
    mask = [np.asarray(select_mask(select(kind, 5)(*case.cast(d).index), *case.cast('float32').index))
            for d in ('float32', 'bfloat16')]
    assert (mask[0] == mask[1]).all()

  def test_decoding_chooses_the_set_of_the_full_row(self, kind):
    case = cases.make(4, **SIZE, layout='one').cast('float32')
    whole = select(kind, 5)(*case.index)
    for t in (3, 17):
      k_segment = jnp.where(jnp.arange(24) <= t, case.k_segment, 0)                 # later slots are not written yet
      k_order = jnp.where(k_segment > 0, case.k_order, 0)
      now = slice(t, t + 1)
      part = select(kind, 5)(case.iq[:, now], case.ik, case.gate[:, now], case.q_segment[:, now], k_segment,
                             case.q_order[:, now], k_order)
      assert (np.asarray(part.threshold_BT) == np.asarray(whole.threshold_BT)[:, now]).all()
      assert (np.asarray(part.last_BT) == np.asarray(whole.last_BT)[:, now]).all()


class TestTPU:

  @pytest.mark.parametrize('size', [dict(T=40), dict(T=9, S=40, layout='packed', shuffle=True)])
  @pytest.mark.parametrize('index', ['integers', 'zeros'])
  def test_the_selection_is_that_of_the_reference_bit_for_bit(self, size, index):
    case = cases.make(9, **SIZE | size).cast('float32')
    case = case if index == 'integers' else case._replace(gate=-0.0 * case.gate)
    got, want = (select(kind, 7)(*case.index) for kind in ('tpu', 'reference'))
    assert (np.asarray(got.threshold_BT) == np.asarray(want.threshold_BT)).all()
    assert (np.asarray(got.last_BT) == np.asarray(want.last_BT)).all()

  def test_scores_far_apart_and_close_together(self):
    """One index head and one feature: the score of a key is its only number, whatever the summation."""
    rng = np.random.default_rng(0)
    keys = np.exp2(rng.integers(-100, 100, 40)).astype(np.float32)
    keys[10:20] = np.float32(1) + np.float32(2 ** -23) * np.arange(10, dtype=np.float32)
    one = np.ones((1, 40, 1), np.float32)
    positive = cases.make(0, B=1, T=40, layout='one')._replace(iq=one[..., None], ik=keys[None, :, None], gate=one)
    for case in (positive, positive._replace(gate=-one)):
      got, want = (select(kind, 13)(*case.cast('float32').index) for kind in ('tpu', 'reference'))
      assert (np.asarray(got.threshold_BT) == np.asarray(want.threshold_BT)).all()
      assert (np.asarray(got.last_BT) == np.asarray(want.last_BT)).all()

  def test_a_row_whose_scores_do_not_fit(self):
    with pytest.raises(ValueError, match='the scores of 8 queries against 2000000 keys need more than 32 MiB of VMEM'):
      tpu.group_size(8, 2000000)


class TestSearch:

  def test_keys_keep_the_order_of_floats(self):
    x = np.sort(np.float32([-3e38, -1.5, -1e-38, -1e-45, 0, 1e-45, 1e-38, 1, 1.0000001, 3e38]))
    keys = np.asarray(search.key(jnp.asarray(x)))
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert (np.asarray(search.value(jnp.asarray(keys))) == x).all()

  @pytest.mark.parametrize('spread', ['wide', 'equal', 'two values', 'tiny'])
  def test_kth_is_that_of_a_sort(self, spread):
    rng = np.random.default_rng(0)
    x = {'wide': rng.standard_normal((3, 4, 16)) * 10.0 ** rng.integers(-30, 30, (3, 4, 16)),
         'equal': np.full((3, 4, 16), -2.5), 'two values': rng.choice([0.0, 1.0], (3, 4, 16)),
         'tiny': rng.standard_normal((3, 4, 16)) * 1e-36}[spread].astype(np.float32)
    x[2, 1] = -np.inf                                                              # a row with two tiles only
    order = rng.permutation(48).reshape(3, 16).astype(np.int32)
    flat = x.transpose(1, 0, 2).reshape(4, 48)
    for k in (1, 7, 31):
      threshold, last = jax.jit(search.kth, static_argnums=2)(jnp.asarray(x), jnp.asarray(order), k)
      for t in range(4):
        ranked = sorted((-v, o) for v, o in zip(flat[t], order.reshape(-1)) if np.isfinite(v))
        assert (float(threshold[t]), int(last[t])) == (-ranked[k - 1][0], ranked[k - 1][1])

  def test_bits_of_a_word_are_the_selection(self):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-2, 3, (2, 32, 8)), jnp.float32).at[:, 3].set(-jnp.inf)
    order = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    threshold, last = jax.jit(search.kth, static_argnums=2)(x, order, 5)
    word = np.asarray(jax.jit(search.words)(x, order, threshold, last)).view(np.uint32)
    bits = (word[:, None] >> np.arange(32, dtype=np.uint32)[:, None]) & 1          # [P, T, S]
    kept = np.asarray(search.kept(x.swapaxes(0, 1).reshape(32, 16), order.reshape(-1), threshold, last))
    assert (bits.swapaxes(0, 1).reshape(32, 16) == kept).all()
    assert (kept.sum(-1) == np.where(np.arange(32) == 3, 0, 5)).all()


def test_topk_must_be_positive():
  case = cases.make(0, **SIZE)
  with pytest.raises(ValueError, match='index_select: topk is 0, it must be at least 1'):
    index_select(*case.index, topk=0)


def test_the_mask_never_holds_more_than_topk():
  case = cases.make(5, **SIZE, layout='one').cast('float32')
  for topk in (1, 5):
    count = np.asarray(select_mask(select('xla', topk)(*case.index), *case.index)).sum(-1)
    assert (count == np.minimum(np.arange(24) + 1, topk)).all()


def test_selection_is_not_differentiated():
  case = cases.make(6, **SIZE).cast('float32')
  grad = jax.jit(jax.grad(lambda iq: index_select(iq, *case.index[1:], topk=5).threshold_BT.clip(-9, 9).sum()))(case.iq)
  assert_close(grad, np.zeros(grad.shape))
