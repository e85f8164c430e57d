"""Random rows of every kind: all implementations choose the set of plain loops and agree on what follows from it."""
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from pallas_kernels.index_select import select_mask
from tests.pallas_kernels import cases, independent, kinds
from tests.tolerances import assert_close

T = 24
FEW = hypothesis.settings(max_examples=20, deadline=None, derandomize=True,
                          suppress_health_check=[hypothesis.HealthCheck.too_slow])


@st.composite
def rows(draw):
  """One row of T tokens: samples and branches of random lengths down to one token, padding, zero scores, any layout."""
  rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
  case = cases.make(int(rng.integers(2 ** 31)), B=1, T=T, H=4, G=2, K=8, I=2, J=8)
  lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
  branch = draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))
  ids = [(i + 1) << 8 | b for i, (n, b) in enumerate(zip(lengths, branch)) for _ in range(n)]
  if draw(st.booleans()):                                  # parts of one sample rather than samples
    ids = [1 << 8 | x & 255 for x in ids]
  segment = np.int32((ids + [0] * T)[:T])[None]
  unwritten = draw(st.integers(0, T // 2))
  k_segment = segment.copy()
  k_segment[:, T - unwritten:] = 0
  k_order = np.where(k_segment > 0, case.k_order, 0)
  gate = case.gate * draw(st.sampled_from([1.0, 0.0, -0.0]))
  gate[:, draw(st.integers(0, T - 1))] = 0
  ik = case.ik * draw(st.sampled_from([1.0, 0.0]))
  case = case._replace(q_segment=segment, k_segment=k_segment, k_order=k_order, gate=gate, ik=ik)
  if draw(st.booleans()):
    place = rng.permutation(T)
    case = cases.Case(*(x[:, place] for x in case))
  return case


@pytest.mark.parametrize('others', [('xla', 'tiles', 'tpu', 'gathered'),
                                    pytest.param(('gpu',), marks=pytest.mark.slow)])
@FEW
@hypothesis.given(case=rows(), topk=st.sampled_from([1, 5]))
def test_every_implementation_chooses_the_same_set(others, case, topk):
  device = case.cast('float32')
  alive = case.q_segment[0] > 0                # padding sees unwritten slots, which all have order 0
  expected = np.zeros((T, T), bool)
  for t in np.flatnonzero(alive):
    expected[t, independent.chosen(case, 0, t, topk)] = True
  outs = {kind: kinds.sparse_values(kind, topk, want_kl=True)(device, None) for kind in ('reference', *others)}
  for out in outs.values():
    mask = np.asarray(select_mask(out.selection, *device.index))[0]
    assert (mask[alive] == expected[alive]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out[:3]))
    for got, want in zip(out[:3], outs['reference'][:3]):
      assert_close(np.asarray(got)[:, alive] + 1, np.asarray(want)[:, alive] + 1)      # + 1: all may be 0


@pytest.mark.parametrize('others', [('xla', 'tiles'), pytest.param(('tpu', 'gpu'), marks=pytest.mark.slow)])
@FEW
@hypothesis.given(case=rows())
def test_dense_attention_agrees(others, case):
  device = case.cast('float32')
  results = {kind: jax.tree.leaves(kinds.dense(kind)(*device.dense)) for kind in ('reference', *others)}
  for got in results.values():
    for x, want in zip(got, results['reference']):
      assert_close(np.asarray(x), want)
