import jax
import numpy as np
import pytest

from pallas_kernels import tiles
from pallas_kernels.dense_attention import dense_attention
from tests.pallas_kernels import cases, independent, kinds
from tests.tolerances import assert_close

SIZE = dict(B=2, T=24, H=4, G=2, K=8, I=2, J=8)


@pytest.fixture(scope='module')
def torch_case(fixtures):
  return fixtures('dsa_torch.npz')


def lse_of(case):
  return kinds.dense('reference')(*case.dense)[1][1]


@pytest.mark.parametrize('kind', [*kinds.KINDS, 'tpu', kinds.GPU])
class TestEveryImplementation:

  @pytest.mark.parametrize('layout, shuffle', [('branches', False), ('packed', True)])
  def test_equals_plain_loops(self, kind, layout, shuffle):
    case = cases.make(1, **SIZE, layout=layout, shuffle=shuffle)
    keys = lambda b, t: independent.seen(case, b, t)
    _, lse, mean = independent.attention(case, keys)
    _, kl = kinds.warmup(kind)(case.cast('float32'), np.float32(lse))
    assert_close(kl, independent.kl(case, mean, keys))

  def test_equals_torch_with_gradients(self, kind, torch_case):
    n = torch_case
    grads, kl = kinds.warmup(kind)(n['case'], lse_of(n['case']))
    assert_close(kl, n['warmup_kl'], what='kl')
    for name, got in zip(('diq', 'dik', 'dgate'), grads[3:]):
      assert_close(got, n[f'warmup_{name}'], what=name)

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_equals_the_reference_with_gradients(self, kind, dtype):
    case = cases.make(2, **SIZE).cast(dtype)
    lse = lse_of(case.cast('float32'))
    expected = jax.tree.leaves(kinds.warmup('reference')(case.cast('float32'), lse))
    for got, want in zip(jax.tree.leaves(kinds.warmup(kind)(case, lse)), expected):
      assert_close(got, want, dtype)

  def test_only_the_indexer_learns(self, kind):
    case = cases.make(3, **SIZE).cast('float32')
    grads, _ = kinds.warmup(kind)(case, lse_of(case))
    assert all(np.abs(g).sum() == 0 for g in grads[:3]) and all(np.abs(g).sum() > 0 for g in grads[3:])

  def test_a_query_that_sees_nothing(self, kind):
    case = cases.make(4, **SIZE).cast('float32')
    case = case._replace(q_segment=case.q_segment.at[:, 5].set(77 << 8))
    grads, kl = kinds.warmup(kind)(case, lse_of(case))
    assert (np.asarray(kl)[:, 5] == 0).all() and (np.asarray(grads[3])[:, 5] == 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, kl)))


@pytest.mark.parametrize('kind', ['tiles', 'tpu', 'gpu'])
def test_sizes_that_are_no_powers_of_two(kind):
  case = cases.make(9, B=1, T=21, H=9, G=3, K=12, I=3, J=12, layout='packed').cast('float32')
  lse = lse_of(case)
  for got, want in zip(jax.tree.leaves(kinds.warmup(kind)(case, lse)),
                       jax.tree.leaves(kinds.warmup('reference')(case, lse))):
    assert_close(got, want)


@pytest.mark.slow
def test_no_races_on_a_tpu(monkeypatch):
  case = cases.make(6, **SIZE | dict(B=1)).cast('float32')
  lse = lse_of(case)
  for got, want in zip(jax.tree.leaves(kinds.without_races(monkeypatch, kinds.warmup.__wrapped__('tpu'), case, lse)),
                       jax.tree.leaves(kinds.warmup('reference')(case, lse))):
    assert_close(got, want)


def test_large_tiles_where_a_platform_has_no_cache_to_suit(monkeypatch):
  """As on a GPU, attention and the loss of its indexer: some tiles are left out, and a row of few tokens is one."""
  case = cases.make(5, **SIZE | dict(T=40), layout='packed').cast('float32')
  want = jax.tree.leaves((kinds.dense('reference')(*case.dense), kinds.warmup('reference')(case, lse_of(case))))
  monkeypatch.setattr(kinds, 'SMALL', ((tiles, 'LARGE', {'cpu': 16}), *kinds.SMALL))
  got = jax.tree.leaves((kinds.dense('tiles')(*case.dense), kinds.warmup('tiles')(case, lse_of(case))))
  for a, b in zip(got, want):
    assert_close(a, b)
  monkeypatch.setattr(kinds, 'SMALL', ((tiles, 'LARGE', {'cpu': 40}), *kinds.SMALL[1:]))
  assert 'argsort' not in str(jax.make_jaxpr(kinds.named('tiles', dense_attention))(*case.dense))
