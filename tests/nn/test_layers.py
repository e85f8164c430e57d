"""Products with weights, whose gradients are written out on a CPU, against plain ones.

B batch, T time.
"""
import jax
import jax.numpy as jnp
import pytest

from keye_jax.nn.layers import product
from tests.tolerances import assert_close


def arrays(dtypes: tuple[str, str], axes: int):
  """x [B, T, ...] and w that share `axes` dimensions, and a weight of the results."""
  keys = jax.random.split(jax.random.key(0), 3)
  shared = (4, 6)[:axes]
  x, w = jax.random.normal(keys[0], (2, 5, *shared)), jax.random.normal(keys[1], (*shared, 3, 7))
  return x.astype(dtypes[0]), w.astype(dtypes[1]), jax.random.normal(keys[2], (2, 5, 3, 7))


def equations(jaxpr) -> list[str]:
  return [e.primitive.name for e in jaxpr.eqns]


@pytest.mark.parametrize('x_dtype, w_dtype, made', [
    ('float32', 'float32', None), ('bfloat16', 'bfloat16', None), ('bfloat16', 'bfloat16', 'float32'),
    ('bfloat16', 'float32', None), ('float32', 'bfloat16', None)])
@pytest.mark.parametrize('axes', [1, 2])
def test_product_and_its_gradients(axes, x_dtype, w_dtype, made):
  x, w, weight = arrays((x_dtype, w_dtype), axes)

  def run(fn):
    return jax.jit(jax.value_and_grad(lambda x, w: (weight * jnp.sin(fn(x, w))).sum(), (0, 1)))(x, w)

  value, grads = run(lambda x, w: product(x, w, axes, made))
  plain = lambda x, w: jnp.tensordot(x, w, axes, preferred_element_type=made)
  expected, wanted = run(plain)
  dtype = 'float32' if x_dtype == w_dtype == 'float32' else 'bfloat16'
  assert product(x, w, axes, made).dtype == plain(x, w).dtype
  assert_close(value, expected, dtype)
  for got, want, of in zip(grads, wanted, (x, w)):
    assert got.dtype == of.dtype
    assert_close(got, want, dtype)


@pytest.mark.parametrize('argument, products', [(0, 1), (1, 1), ((0, 1), 2)])
def test_only_the_gradients_that_are_asked_for_are_computed(argument, products):
  """Not those of a frozen weight, nor of a constant input. The product itself is inside an equation of its own."""
  x, w, _ = arrays(('float32', 'float32'), 1)
  run = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sin(product(x, w)).sum(), argument))(x, w)
  assert equations(run.jaxpr).count('dot_general') == products
