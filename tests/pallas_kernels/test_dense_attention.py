import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tiles
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.mask import NEG_INF
from tests.pallas_kernels import cases, independent, kinds
from tests.tolerances import assert_close

SIZE = dict(B=2, T=24, H=4, G=2, K=8, I=2, J=8)


@pytest.fixture(scope='module')
def torch_case(fixtures):
  return fixtures('dsa_torch.npz')


@pytest.mark.parametrize('kind', [*kinds.KINDS, 'tpu', kinds.GPU])
class TestEveryImplementation:

  @pytest.mark.parametrize('layout, shuffle, causal', [('branches', False, True), ('packed', True, True),
                                                       ('packed', False, False)])
  def test_equals_plain_loops(self, kind, layout, shuffle, causal):
    case = cases.make(1, **SIZE, layout=layout, shuffle=shuffle)
    o, lse, _ = independent.attention(case, lambda b, t: independent.seen(case, b, t, causal), causal)
    _, (got_o, got_lse) = kinds.dense(kind, causal)(*case.cast('float32').dense)
    assert_close(got_o, o)
    assert_close(got_lse, lse)

  def test_equals_torch_with_gradients(self, kind, torch_case):
    n = torch_case
    grads, (o, _) = kinds.dense(kind)(*n['case'].dense)
    for name, got in zip(('o', 'dq', 'dk', 'dv'), (o, *grads)):
      assert_close(got, n[f'dense_{name}'], what=name)

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_equals_the_reference_with_gradients(self, kind, dtype):
    case = cases.make(2, **SIZE).cast(dtype)
    expected = jax.tree.leaves(kinds.dense('reference')(*case.cast('float32').dense))
    for got, want in zip(jax.tree.leaves(kinds.dense(kind)(*case.dense)), expected):
      assert_close(got, want, dtype)

  def test_decoding_against_a_cache_with_unwritten_slots(self, kind):
    case = cases.make(3, **SIZE, layout='one')
    k_segment = np.where(np.arange(24) < 20, case.k_segment, 0)
    query = slice(18, 20)
    whole = kinds.dense(kind)(*case.cast('float32').dense)[1]
    part = kinds.dense(kind)(case.q[:, query], case.k, case.v, case.q_segment[:, query], k_segment,
                             case.q_order[:, query], np.where(k_segment > 0, case.k_order, 0))[1]
    assert_close(part[0], whole[0][:, query])

  def test_a_query_that_sees_nothing(self, kind):
    case = cases.make(4, **SIZE)
    q_segment = case.q_segment.copy()
    q_segment[:, 5] = 77 << 8
    grads, (o, lse) = kinds.dense(kind)(*case.cast('float32')._replace(q_segment=q_segment).dense)
    assert (np.asarray(o)[:, 5] == 0).all() and (np.asarray(lse)[:, 5] == np.float32(NEG_INF)).all()
    assert (np.asarray(grads[0])[:, 5] == 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, o, lse)))

  def test_the_scale_is_used(self, kind):
    case = cases.make(2, **SIZE).cast('float32')
    twice = case._replace(q=2 * case.q)
    assert_close(kinds.dense(kind, scale=2 * 8 ** -0.5)(*case.dense)[1][0], kinds.dense(kind)(*twice.dense)[1][0])


  def test_large_logits(self, kind):
    """Exponentials of them as they are would overflow."""
    case = cases.make(10, **SIZE).cast('float32')
    case = case._replace(q=60 * case.q)
    expected = kinds.dense('reference')(*case.dense)
    assert np.abs(expected[1][1][expected[1][1] > NEG_INF]).max() > 88
    for got, want in zip(jax.tree.leaves(kinds.dense(kind)(*case.dense)), jax.tree.leaves(expected)):
      assert_close(got, want)


class TestTiledForm:

  def test_bounded_logits_need_no_maximum(self, monkeypatch):
    """The same with and without one, up to the bound itself."""
    case = cases.make(11, **SIZE, layout='packed').cast('float32')
    longest = lambda x: float(jnp.square(x).sum(-1).max()) ** 0.5
    q = case.q * (tiles.BOUND / (longest(case.q) * longest(case.k) * 8 ** -0.5) * (1 - 1e-6))
    case = case._replace(q=q)
    assert bool(tiles.bounded(case.q, case.k, 8 ** -0.5)) and not bool(tiles.bounded(1.01 * q, case.k, 8 ** -0.5))
    without = jax.tree.leaves(kinds.dense('tiles')(*case.dense))
    monkeypatch.setattr(tiles, 'BOUND', 0)
    kinds.dense.cache_clear()
    for got, want in zip(without, jax.tree.leaves(kinds.dense('tiles')(*case.dense))):
      assert_close(got, want)
    kinds.dense.cache_clear()

  def test_exp(self):
    x = np.linspace(-87, 88, 100001, dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(np.asarray(tiles.exp(x), np.float64), expected, rtol=2e-7)
    got = np.asarray(jax.jit(tiles.exp)(np.float32([0, -87.4, NEG_INF, -np.inf, np.nan])))
    np.testing.assert_array_equal(got, [1, 0, 0, 0, np.nan])

  def test_any_layout_of_the_row_gives_the_same_answer(self):
    case = cases.make(5, **SIZE, layout='packed').cast('float32')
    place = np.random.default_rng(0).permutation(24)
    moved = [x[:, place] for x in case.dense]
    (dq, dk, dv), (o, lse) = kinds.dense('tiles')(*case.dense)
    for got, want in zip(jax.tree.leaves(kinds.dense('tiles')(*moved)), (dq, dk, dv, o, lse)):
      assert_close(got, want[:, place])

  def test_two_runs_give_the_same_bits(self):
    case = cases.make(6, **SIZE).cast('float32')
    first, second = (jax.tree.leaves(kinds.dense('tiles')(*case.dense)) for _ in range(2))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, second))

  def test_inside_shard_map_scan_and_remat(self):
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P
    case = cases.make(7, **SIZE).cast('float32')
    expected = kinds.dense('tiles')(*case.dense)[1][0]
    mesh = jax.make_mesh((2, 2), ('data', 'context'), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    query, key = P('data', 'context'), P('data')

    def layer(q, places):
      k, v, *rest = places
      o, _ = kinds.named('tiles', dense_attention)(q, k, v, *rest)
      return o

    def model(q, *places):
      mapped = jax.shard_map(lambda *a: layer(a[0], a[1:]), in_specs=(query, key, key, query, key, query, key),
                             out_specs=query, check_vma=False)
      step = jax.checkpoint(lambda x, _: (mapped(x, *places), None), prevent_cse=False)
      return jax.lax.scan(step, q, None, length=2)[0]

    def loss(q, *places):
      o = model(q, *places)
      return (o * o).sum(), o

    with jax.set_mesh(mesh):
      specs = (query, key, key, query, key, query, key)
      args = [jax.device_put(x, jax.sharding.NamedSharding(mesh, s)) for x, s in zip(case.dense, specs)]
      grad, o = jax.jit(jax.grad(loss, has_aux=True))(*args)
    twice = kinds.dense('tiles')(expected, *case.dense[1:])[1][0]
    assert_close(o, twice)
    assert np.isfinite(np.asarray(grad)).all() and np.abs(np.asarray(grad)).sum() > 0


@pytest.mark.parametrize('kind', ['tiles', 'tpu', 'gpu'])
def test_sizes_that_are_no_powers_of_two(kind):
  case = cases.make(9, B=1, T=21, H=9, G=3, K=12, I=3, J=12, layout='packed').cast('float32')
  for got, want in zip(jax.tree.leaves(kinds.dense(kind)(*case.dense)),
                       jax.tree.leaves(kinds.dense('reference')(*case.dense))):
    assert_close(got, want)


@pytest.mark.slow
def test_no_races_on_a_tpu(monkeypatch):
  case = cases.make(8, **SIZE | dict(B=1)).cast('float32')
  for got, want in zip(jax.tree.leaves(kinds.without_races(monkeypatch, kinds.dense.__wrapped__('tpu'), *case.dense)),
                       jax.tree.leaves(kinds.dense('reference')(*case.dense))):
    assert_close(got, want)


def test_heads_must_be_a_multiple_of_kv_heads():
  case = cases.make(0, **SIZE | dict(G=4))
  with pytest.raises(ValueError, match='dense_attention: 3 query heads are not a multiple of 4 KV heads'):
    dense_attention(case.q[:, :, :3], *case.dense[1:])


def test_short_rows_of_a_vision_tower():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((6, 16, 2, 8)), jnp.float32) for _ in range(3))
  frame = jnp.asarray(np.sort(rng.integers(0, 3, (6, 16)), 1), jnp.int32) << 8
  for x in (dense_attention(q, k, v, frame, frame, 0 * frame, 0 * frame, causal=False)[0],):
    want = jax.nn.dot_product_attention(q, k, v, mask=(frame[:, None, :, None] == frame[:, None, None]))
    assert_close(x, want)
