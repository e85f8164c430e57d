"""JAX/Flax system for long-video mixture-of-experts vision-language models."""


def __getattr__(name):
  from keye_jax import api
  return getattr(api, name)
