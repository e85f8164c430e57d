"""The search for the threshold on a GPU, interpreted, where its shortcut does not serve.

T queries, S keys of a tile, P key tiles, N keys.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.index_select import gpu, search
from pallas_kernels.index_select.selection import MAX_ORDER
from tests.pallas_kernels import kinds

T, P, TOPK = 8, 8, 5


def expected(key_N, order_N) -> tuple[int, int]:
  """(key, order) of the TOPK-th by (key descending, order ascending); what keeps all when no more are visible."""
  seen = np.flatnonzero(key_N > gpu.MASKED)
  if len(seen) <= TOPK:
    return gpu.KEEP_ALL, MAX_ORDER
  last = seen[np.lexsort((order_N[seen], -key_N[seen].astype(np.int64)))][TOPK - 1]
  return int(key_N[last]), int(order_N[last])


@pytest.mark.parametrize('values', ['distinct', 'few', 'equal', 'hidden'])
@pytest.mark.parametrize('bound', ['good', 'too high', 'too low'])
def test_a_bad_bound_changes_nothing(values, bound):
  """A bound that leaves too short or too long a list sends the search over the whole row."""
  rng = np.random.default_rng(0)
  with kinds.small('gpu'):
    S = gpu.TILE
    score_TN = {'distinct': rng.standard_normal((T, P * S)), 'few': rng.integers(-2, 3, (T, P * S)),
                'equal': np.zeros((T, P * S)), 'hidden': rng.standard_normal((T, P * S))}[values].astype(np.float32)
    key_TN = np.array(search.key(jnp.asarray(score_TN)))
    if values == 'hidden':
      key_TN = np.where(rng.random(key_TN.shape) < 0.9, gpu.MASKED, key_TN)
    count = 6                                                 # of P tiles; behind them lies what was not written
    length, tile_P = count * S, rng.permutation(P).astype(np.int32)
    order_PS = rng.permutation(P * S).astype(np.int32).reshape(P, S)
    kept = np.sort(key_TN[:, :length], 1)
    low_T = {'good': kept[:, -2 * TOPK], 'too high': kept[:, -2], 'too low': np.full(T, gpu.MASKED + 1)}[bound]
    number_TP = (key_TN >= low_T[:, None]).reshape(T, P, S).sum(2) * (np.arange(P) < count)
    met = gpu.Tiles(jnp.asarray(order_PS), jnp.asarray(tile_P), jnp.full(T // gpu.GROUP, count))
    run = jax.jit(lambda *arrays: gpu.kth(*arrays, met, TOPK))
    found = run(*(jnp.asarray(x, jnp.int32) for x in (key_TN, number_TP, low_T)))
  order_N = order_PS[tile_P].reshape(-1)[:length]
  want = [expected(key_TN[t, :length], order_N) for t in range(T)]
  assert list(zip(*(np.asarray(x).tolist() for x in found))) == want


def test_a_row_too_long_to_sample_is_refused():
  with pytest.raises(ValueError, match="implementation='xla'"):
    gpu.sample_stride(gpu.SAMPLE * gpu.TILE + 1)
