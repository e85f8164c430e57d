"""Adding small changes to bfloat16 parameters.

bfloat16 keeps 8 bits: a change below 1/512 of a weight, which is what fine-tuning at a rate of 1e-5 makes, is lost when
the sum is rounded to the nearest value. Rounded up or down at random, with the chances that make the mean right,
changes add up over steps (arXiv 2010.06192). float32 parameters with bfloat16 computation (`model.param_dtype`,
`model.dtype`) lose nothing and need two bytes more each.
"""
import jax
import jax.numpy as jnp
import optax


def apply_updates(params, changes, key: jax.Array):
  """params + changes in the dtypes of params: float32 exactly as optax does, bfloat16 with stochastic rounding.

  key: typed key, another one at every step. A mesh does not change the result.
  """
  leaves, tree = jax.tree.flatten(params)
  summed = [optax.apply_updates(p, c) if p.dtype != jnp.bfloat16 else
            stochastic_bfloat16(p.astype(jnp.float32) + c, jax.random.fold_in(key, i))
            for i, (p, c) in enumerate(zip(leaves, jax.tree.leaves(changes), strict=True))]
  return jax.tree.unflatten(tree, summed)


def stochastic_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
  """float32 -> bfloat16: one of the two values around x, the nearer one the more likely, so that the mean is x.

  What bfloat16 holds stays, and so do infinities and NaN.
  """
  sharding = jax.typeof(x).sharding
  noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=None if sharding.mesh.empty else sharding.spec)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise.astype(jnp.uint32)
  rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def float32(tree):
  """The tree in float32: what the optimizer works on and keeps."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
