"""Token statistics against a full softmax in float64."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.nn import head
from tests.tolerances import assert_close


@pytest.mark.parametrize('chunk', (4, 5, 100))
def test_stats_and_gradient(chunk):
  rng = np.random.default_rng(0)
  B, T, D, V = 2, 7, 8, 11
  h, w = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
  target = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  got = head.token_stats('train', h, w, target, ('logp', 'entropy', 'correct', 'top'), top=3, chunk=chunk)
  z = h.astype(np.float64) @ w
  logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
  assert_close(got.logp_BT, np.take_along_axis(logp, np.asarray(target)[..., None], -1)[..., 0])
  assert_close(got.entropy_BT, -(np.exp(logp) * logp).sum(-1))
  np.testing.assert_array_equal(got.correct_BT, logp.argmax(-1) == target)
  np.testing.assert_array_equal(got.top_id_BTK, np.argsort(-logp, -1)[..., :3])
  assert_close(got.top_logp_BTK, -np.sort(-logp, -1)[..., :3])

  def chunked(h, w):
    s = head.token_stats('train', h, w, target, ('logp', 'entropy'), chunk=chunk)
    return (s.logp_BT * jnp.arange(T) + s.entropy_BT).sum()

  def whole(h, w):
    lp = jax.nn.log_softmax(h @ w)
    return (jnp.take_along_axis(lp, target[..., None], -1)[..., 0] * jnp.arange(T) - (jnp.exp(lp) * lp).sum(-1)).sum()

  for a, b in zip(jax.grad(chunked, (0, 1))(h, w), jax.grad(whole, (0, 1))(jnp.asarray(h), jnp.asarray(w))):
    assert_close(a, b)
