import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tiles
from pallas_kernels.dsa_attention import Selection, chunks, dsa_attention, union, way
from pallas_kernels.mask import NEG_INF
from tests.pallas_kernels import cases, independent, kinds
from tests.tolerances import assert_close

SIZE = dict(B=2, T=24, H=4, G=2, K=8, I=2, J=8)
TOPK = 5


def equal_bits(a, b):
  return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(scope='module')
def torch_case(fixtures):
  return fixtures('dsa_torch.npz')


@pytest.mark.parametrize('kind', [*kinds.KINDS, 'tpu', kinds.GPU, pytest.param('gathered', marks=pytest.mark.slow)])
class TestEveryImplementation:

  @pytest.mark.parametrize('layout, shuffle', [('one', False), ('branches', False), ('packed', True)])
  def test_equals_plain_loops(self, kind, layout, shuffle):
    case = cases.make(1, **SIZE, layout=layout, shuffle=shuffle)
    keys = lambda b, t: independent.chosen(case, b, t, TOPK)
    o, lse, mean = independent.attention(case, keys)
    _, out = kinds.sparse(kind, TOPK)(case.cast('float32'))
    assert_close(out.o_BTHK, o)
    assert_close(out.lse_BTH, lse)
    assert_close(out.kl_BT, independent.kl(case, mean, keys))

  def test_equals_torch_with_gradients(self, kind, torch_case):
    """An additive top-k mask in eager attention, and torch's own autograd of the KL with a detached target."""
    n = torch_case
    grads, out = kinds.sparse(kind, TOPK)(n['case'])
    assert_close(out.o_BTHK, n['sparse_o'], what='o')
    assert_close(out.kl_BT, n['sparse_kl'], what='kl')
    for name, got in zip(('dq', 'dk', 'dv', 'diq', 'dik', 'dgate'), grads):
      assert_close(got, n[f'sparse_{name}'], what=name)

  @pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
  def test_equals_the_reference_with_gradients(self, kind, dtype):
    case = cases.make(2, **SIZE).cast(dtype)
    expected = jax.tree.leaves(kinds.sparse('reference', TOPK)(case.cast('float32')))
    for got, want in zip(jax.tree.leaves(kinds.sparse(kind, TOPK)(case)), expected):
      finite = np.isfinite(np.asarray(want, np.float32))
      assert_close(np.where(finite, got, 0), np.where(finite, want, 0), dtype)

  def test_more_places_than_keys_is_dense_attention(self, kind):
    case = cases.make(3, **SIZE).cast('float32')
    grads, out = kinds.sparse(kind, 24)(case)
    plain = kind if kind in kinds.KINDS else 'tiles'
    dense_grads, (o, lse) = kinds.dense(plain)(*case.dense)
    index_grads, kl = kinds.warmup(plain)(case, lse)
    for got, want in zip((out.o_BTHK, out.lse_BTH, out.kl_BT, *grads),
                         (o, lse, kl, *dense_grads, *index_grads[3:])):
      assert_close(got, want)
    assert (np.asarray(out.selection.threshold_BT) == -np.inf).all()

  def test_replay_is_exact(self, kind):
    case = cases.make(4, **SIZE, index='normal').cast('float32')
    first = kinds.sparse(kind, TOPK)(case)[1]
    again = kinds.sparse_values(kind, TOPK, want_kl=True)(case, first.selection)
    assert equal_bits(first.selection, again.selection)
    for got, want in zip(again[:3], first[:3]):
      assert_close(got, want)

  def test_a_replayed_selection_is_used_as_it_is(self, kind):
    case = cases.make(5, **SIZE, layout='one').cast('float32')
    everything = Selection(jnp.full((2, 24), -jnp.inf), jnp.full((2, 24), 2 ** 31 - 1, jnp.int32))
    out = kinds.sparse_values(kind, TOPK, want_kl=True)(case, everything)
    assert_close(out.o_BTHK, kinds.dense('reference')(*case.dense)[1][0])

  def test_decoding_equals_the_full_row(self, kind):
    case = cases.make(6, **SIZE, layout='one').cast('float32')
    whole = kinds.sparse(kind, TOPK)(case)[1]
    k_segment = jnp.where(jnp.arange(24) < 20, case.k_segment, 0)
    now = slice(18, 20)
    part = case._replace(q=case.q[:, now], iq=case.iq[:, now], gate=case.gate[:, now],
                         q_segment=case.q_segment[:, now], q_order=case.q_order[:, now], k_segment=k_segment,
                         k_order=jnp.where(k_segment > 0, case.k_order, 0))
    out = kinds.sparse_values(kind, TOPK)(part, None)
    assert out.kl_BT is None
    assert_close(out.o_BTHK, whole.o_BTHK[:, now])
    assert equal_bits(out.selection, jax.tree.map(lambda x: x[:, now], whole.selection))

  def test_a_query_that_sees_nothing(self, kind):
    case = cases.make(7, **SIZE).cast('float32')
    case = case._replace(q_segment=case.q_segment.at[:, 5].set(77 << 8))
    grads, out = kinds.sparse(kind, TOPK)(case)
    assert (np.asarray(out.o_BTHK)[:, 5] == 0).all() and (np.asarray(out.kl_BT)[:, 5] == 0).all()
    assert (np.asarray(out.lse_BTH)[:, 5] == np.float32(NEG_INF)).all()
    for i in (0, 3, 5):                                        # q, iq and gate of that query
      assert (np.asarray(grads[i])[:, 5] == 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, out[:3])))

  def test_outputs_reach_their_own_inputs_only(self, kind):
    """o moves q, k and v; kl moves iq, ik and gate: the indexer never learns from the language model or back."""
    case = cases.make(8, **SIZE, index='normal').cast('float32')
    size = lambda grads: [float(jnp.abs(g).sum()) for g in grads]
    of_o, of_kl = (size(kinds.sparse(kind, TOPK)(case, *w)[0]) for w in ((1.0, 0.0), (0.0, 1.0)))
    assert min(of_o[:3]) > 0 and max(of_o[3:]) == 0
    assert max(of_kl[:3]) == 0 and min(of_kl[3:]) > 0


class TestGathering:

  @pytest.mark.parametrize('share, size', [(0.0, {}), (2.0, dict(T=3)), (2.0, dict(B=1))])  # masked after all; gathered
  def test_gathered_keys_give_the_answer_of_masked_ones(self, monkeypatch, share, size):
    monkeypatch.setattr(chunks, 'GATHERED', share)
    monkeypatch.setattr(union, 'GATHER', 8)
    case = cases.make(12, **SIZE | dict(S=24) | size, layout='packed', shuffle=True).cast('float32')
    case = case._replace(q_segment=case.q_segment.at[:, 1].set(77 << 8))
    run = kinds.named('tiles', lambda *a, implementation: dsa_attention(*a, topk=TOPK, want_kl=False, way='gathered',
                                                                        implementation=implementation))
    out, want = jax.jit(run)(*case), kinds.sparse_values('reference', TOPK)(case, None)
    assert equal_bits(out.selection, want.selection)
    assert_close(out.o_BTHK, want.o_BTHK)
    assert_close(out.lse_BTH, want.lse_BTH)

  def test_the_nth_member_of_a_set(self):
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 1.0):
      flag = rng.random(100) < share
      flag[99] = True
      members = union.picks(jnp.asarray(flag))
      assert int(members.end_W[-1]) == flag.sum()
      found = np.asarray(union.nth(members, jnp.arange(120)))
      assert (found[:flag.sum()] == np.flatnonzero(flag)).all()


class TestWays:

  def test_the_choice_is_one_of_lengths(self):
    k = 2048
    edge = int(way.CROSSOVER['cpu'] * k)
    for T, S, want_kl, implementation, expected in (
        (edge, edge, False, 'xla', 'masked_dense'), (edge + 1, edge + 1, False, 'xla', 'gathered'),
        (1, edge + 1, False, 'xla', 'gathered'), (edge + 1, edge + 1, True, 'xla', 'masked_dense'),
        (edge + 1, edge + 1, False, 'tpu', 'masked_dense'), (edge + 1, edge + 1, False, 'reference', 'masked_dense')):
      assert way.choose(implementation, 2, T, S, k, want_kl, None) == expected, (T, S, want_kl, implementation)
    assert way.choose('xla', 2, 256, 256, 8, False, None) == 'masked_dense'         # a row in one tile
    assert way.choose('xla', 2, 2048, 2048, 256, False, None) == 'masked_dense'     # a gather takes no fewer than 1024
    assert way.choose('xla', 2, 8, 8, k, True, 'gathered') == 'gathered'
    with pytest.raises(ValueError, match="dsa_attention: tpu has no way 'gathered'; use masked_dense"):
      way.choose('tpu', 2, 8, 8, k, False, 'gathered')

  def test_a_long_row_is_one_tile_where_a_platform_says_so(self, monkeypatch):
    """As on a GPU: no loop over tiles is left, and values and gradients are those of the tiles."""
    case = cases.make(6, T=40).cast('float32')
    def loss(q, ik):
      out = dsa_attention(q, case.k, case.v, case.iq, ik, *case[5:], topk=6)
      return out.o_BTHK.sum() + out.kl_BT.sum()
    gradient = lambda: jax.grad(lambda *x: loss(*x), (0, 1))
    loops = lambda: 'argsort' in str(jax.make_jaxpr(gradient())(case.q, case.ik))
    with kinds.small('tiles'):
      expected = jax.jit(gradient())(case.q, case.ik)
      monkeypatch.setattr(tiles, 'ONE_TILE', {'cpu': 4 * 40 * 40 - 1})
      assert loops()
      monkeypatch.setattr(tiles, 'ONE_TILE', {'cpu': 4 * 40 * 40})
      assert not loops()
      for got, want in zip(jax.jit(gradient())(case.q, case.ik), expected):
        assert_close(got, want)

  def test_kernels_of_a_gpu_are_for_rows_of_more_than_one_tile(self, monkeypatch):
    case = cases.make(6, T=64).cast('float32')
    monkeypatch.setattr(dispatch, 'platform', lambda: 'gpu')
    kernels = lambda: 'pallas_call' in str(jax.make_jaxpr(lambda *x: dsa_attention(*x, topk=6).o_BTHK)(*case))
    assert not kernels()
    monkeypatch.setattr(tiles, 'ONE_TILE', {'gpu': 4 * 64 * 64 - 1})
    assert kernels()

  # Prefill is just below it, or above; decoding above.
  @pytest.mark.parametrize('crossover', [pytest.param(3.0, marks=pytest.mark.slow), 0.0])
  def test_forward_remat_and_decode_see_the_same_set(self, monkeypatch, crossover):
    """As lengths choose: gradients, made again from a checkpoint, and a decoding step on a longer cache. A set that
    differed would show in o and in the gradients."""
    gathers, attend = [], union.attend
    monkeypatch.setattr(union, 'attend', lambda *a: gathers.append(a) or attend(*a))
    monkeypatch.setitem(way.CROSSOVER, 'cpu', crossover)
    monkeypatch.setattr(kinds, 'SMALL', (*kinds.SMALL, *kinds.GATHER))
    sparse = kinds.named('tiles', functools.partial(dsa_attention, topk=TOPK, want_kl=False))
    case = cases.make(16, **SIZE, layout='one').cast('float32')
    expected, out = kinds.sparse('reference', TOPK)(case, 1.0, 0.0)

    def loss(*qkv):
      o = jax.checkpoint(sparse)(*qkv, *case[3:]).o_BTHK
      return (o * kinds.weights(o, case.q_order)).sum(), o

    def decode(case):
      room = lambda x: jnp.pad(x, ((0, 0), (0, 8), *((0, 0),) * (x.ndim - 2)))     # slots that nothing is written to
      queries = {n: getattr(case, n)[:, 22:] for n in ('q', 'iq', 'gate', 'q_segment', 'q_order')}
      return sparse(*case._replace(**{n: room(getattr(case, n)) for n in ('k', 'v', 'ik', 'k_segment', 'k_order')},
                                   **queries))

    grads, o = jax.jit(kinds.gradient('tiles', loss, (0, 1, 2)))(*case[:3])
    assert bool(gathers) == (not crossover)
    step = jax.jit(decode)(case)
    assert gathers
    assert equal_bits(step.selection, jax.tree.map(lambda x: x[:, 22:], out.selection))
    for got, want in zip((*grads, o, step.o_BTHK), (*expected[:3], out.o_BTHK, out.o_BTHK[:, 22:])):
      assert_close(got, want)


class TestTiledForm:

  def test_any_layout_of_the_row_gives_the_same_answer(self):
    case = cases.make(9, **SIZE, layout='packed').cast('float32')
    place = np.random.default_rng(0).permutation(24)
    grads, out = kinds.sparse('tiles', TOPK)(case)
    moved_grads, moved = kinds.sparse('tiles', TOPK)(cases.Case(*(x[:, place] for x in case)))
    assert equal_bits(moved.selection, jax.tree.map(lambda x: x[:, place], out.selection))
    for got, want in zip((*moved_grads, *moved[:3]), (*grads, *out[:3])):
      assert_close(got, want[:, place])

  def test_two_runs_give_the_same_bits(self):
    case = cases.make(10, **SIZE, index='normal').cast('float32')
    assert equal_bits(*(kinds.sparse('tiles', TOPK)(case) for _ in range(2)))

  def test_inside_shard_map_scan_and_remat(self):
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    case = cases.make(11, **SIZE).cast('float32')
    grads, out = kinds.sparse('tiles', TOPK)(case)
    mesh = jax.make_mesh((2, 2), ('data', 'context'), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    query, key = P('data', 'context'), P('data')
    specs = cases.Case(query, key, key, query, key, query, query, key, query, key)

    def local(case):
      r = kinds.named('tiles', lambda *a, implementation: dsa_attention(*a, topk=TOPK, implementation=implementation))(
          *case)
      return r.o_BTHK, r.kl_BT

    def loss(arrays, case):
      case = case._replace(**arrays)
      mapped = jax.shard_map(local, in_specs=(specs,), out_specs=(query, query), check_vma=False)
      step = jax.checkpoint(lambda total, _: (jax.tree.map(jnp.add, total, mapped(case)), None), prevent_cse=False)
      zero = jax.tree.map(jnp.zeros_like, (case.q, case.gate[..., 0]))
      o, kl = jax.lax.scan(step, zero, None, length=2)[0]
      return ((o * kinds.weights(o, case.q_order)).sum() + (kl * kinds.weights(kl, case.q_order)).sum()) / 2

    with jax.set_mesh(mesh):
      case = cases.Case(*(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(case, specs)))
      got = jax.jit(jax.grad(loss))({n: getattr(case, n) for n in cases.Case._fields[:6]}, case)
    for name, want in zip(cases.Case._fields[:6], grads):
      assert_close(got[name], want, what=name)


class TestTPU:

  def test_fewer_queries_than_keys_with_gradients(self):
    case = cases.make(13, **SIZE | dict(B=1, T=9, S=24), layout='packed').cast('float32')
    expected = jax.tree.leaves(kinds.sparse('reference', TOPK)(case))
    for got, want in zip(jax.tree.leaves(kinds.sparse('tpu', TOPK)(case)), expected):
      finite = np.isfinite(np.asarray(want, np.float32))
      assert_close(np.where(finite, got, 0), np.where(finite, want, 0))

  def test_two_runs_give_the_same_bits(self):
    case = cases.make(10, **SIZE, index='normal').cast('float32')
    assert equal_bits(*(kinds.sparse('tpu', TOPK)(case) for _ in range(2)))

  def test_without_the_loss_its_inputs_get_no_gradient(self):
    case = cases.make(14, **SIZE | dict(B=1)).cast('float32')

    def loss(*arrays):
      out = dsa_attention(*arrays, *case[6:], topk=TOPK, want_kl=False, implementation='tpu')
      return (out.o_BTHK * kinds.weights(out.o_BTHK, case.q_order)).sum(), ()

    grads, _ = jax.jit(kinds.gradient('tpu', loss, range(6)))(*case[:6])
    expected, _ = kinds.sparse('reference', TOPK)(case, 1.0, 0.0)
    for got, want in zip(grads, expected):
      assert_close(got, want)

  @pytest.mark.slow
  def test_no_races(self, monkeypatch):
    case = cases.make(15, **SIZE | dict(B=1)).cast('float32')

    def loss(*arrays):
      out = dsa_attention(*arrays, *case[6:], topk=TOPK, implementation='tpu')
      return out.o_BTHK.sum() + out.kl_BT.sum(), out

    _, out = kinds.without_races(monkeypatch, kinds.gradient('tpu', loss, range(6)), *case[:6])
    assert equal_bits(out.selection, kinds.sparse_values('reference', TOPK)(case, None).selection)


def test_bad_arguments():
  case = cases.make(0, **SIZE)
  with pytest.raises(ValueError, match='dsa_attention: topk is 0, it must be at least 1'):
    dsa_attention(*case, topk=0)
  with pytest.raises(ValueError, match='dsa_attention: 3 query heads are not a multiple of 2 KV heads'):
    dsa_attention(case.q[:, :, :3], *case[1:], topk=1)
