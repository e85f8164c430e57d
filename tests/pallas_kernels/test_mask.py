import jax
import numpy as np
import pytest

from data_pipelines import schema
from pallas_kernels import dispatch, mask, tiles
from pallas_kernels.dense_attention import dense_attention, xla
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.indexer_warmup import indexer_warmup
from tests.pallas_kernels import cases, independent
from tests.tolerances import assert_close


def test_the_rule_is_that_of_the_data():
  assert mask.BRANCH_BITS == schema.BRANCH_BITS


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('layout', ['one', 'packed', 'branches'])
def test_visible_equals_plain_loops(layout, causal):
  case = cases.make(0, T=24, layout=layout, shuffle=True)
  got = mask.visible(case.q_segment[:, :, None], case.k_segment[:, None], case.q_order[:, :, None],
                     case.k_order[:, None], causal)
  for b in range(2):
    for t in range(24):
      assert np.flatnonzero(got[b, t]).tolist() == independent.seen(case, b, t, causal)


def test_an_implementation_that_does_not_exist_is_refused_by_name():
  assert dispatch.choose('dense_attention', None) == 'xla'
  assert dispatch.choose('dense_attention', 'reference') == 'reference'
  with pytest.raises(ValueError, match="adapted_swiglu: there is no implementation 'tpu'; use one of reference, xla"):
    dispatch.choose('adapted_swiglu', 'tpu')


def test_masks_of_small_rows_are_made_before_the_loop_over_them_or_within(monkeypatch):
  case = cases.make(3, T=24, layout='branches', shuffle=True).cast('float32')
  monkeypatch.setattr(tiles, 'MANY', 1)

  def loss(q, ik):
    o, lse = dense_attention(q, *case.dense[1:])
    kl = indexer_warmup(case.q, case.k, jax.lax.stop_gradient(lse), case.iq, ik, *case[5:])
    out = dsa_attention(q, case.k, case.v, case.iq, ik, *case[5:], topk=6)
    return (o ** 2).sum() + kl.sum() + (out.o_BTHK ** 2).sum() + out.kl_BT.sum()

  def gradient():
    return jax.jit(jax.value_and_grad(lambda *x: loss(*x), (0, 1)))(case.q, case.ik)
  assert xla.masks_first(2, 24, 24)
  expected = gradient()
  monkeypatch.setattr(xla, 'MASKS', 2 * 24 * 24 - 1)
  assert not xla.masks_first(2, 24, 24)
  for got, want in zip(jax.tree.leaves(gradient()), jax.tree.leaves(expected), strict=True):
    assert_close(got, want)
