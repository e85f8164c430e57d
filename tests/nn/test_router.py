"""Routing against loops in numpy."""
import jax.numpy as jnp
import numpy as np

from keye_jax.nn import router
from tests.tolerances import assert_close


def test_route_and_balance_against_numpy():
  rng = np.random.default_rng(0)
  B, T, D, E, K = 2, 5, 8, 6, 3
  x, w = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, E)).astype(np.float32)
  valid = np.ones((B, T), bool)
  valid[1, 3:] = False
  got = router.route(jnp.asarray(x), jnp.asarray(w), K, jnp.asarray(valid))
  z = x.astype(np.float64) @ w
  p = np.exp(z - z.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  top = np.argsort(-p, -1, kind='stable')[..., :K]
  for b in range(B):
    f = np.zeros(E)
    for t in np.flatnonzero(valid[b]):
      np.testing.assert_array_equal(got.expert_BTK[b, t], top[b, t])
      assert_close(got.weight_BTK[b, t], p[b, t, top[b, t]] / p[b, t, top[b, t]].sum())
      f[top[b, t]] += 1 / valid[b].sum()
    assert_close(got.balance_B[b], E * (f * p[b][valid[b]].mean(0)).sum())
  assert (np.asarray(got.expert_BTK)[~valid] == E).all()
  assert float(got.load_E.sum()) == valid.sum() * K


def test_ties_go_to_the_lowest_expert():
  got = router.top_indices(jnp.asarray([[.2, .4, .2, .2], [.25, .25, .25, .25]]), 3)
  np.testing.assert_array_equal(got, [[1, 0, 2], [0, 1, 2]])


def test_uniform_router_balances_to_k():
  """With equal probabilities f sums to K and P is 1/E: the loss is K whatever is picked."""
  r = router.route(jnp.ones((1, 4, 2)), jnp.zeros((2, 8)), 2, jnp.ones((1, 4), bool))
  assert_close(r.balance_B, [2.0])
