"""JAX/Flax system for long-video mixture-of-experts vision-language models."""
import importlib

_PUBLIC = ('load_pretrained', 'logits', 'generate', 'stream_generate', 'encode')


def __getattr__(name):
  if name not in _PUBLIC:       # `from keye_jax import sharding` asks here first, and must not load the whole API
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module('keye_jax.api'), name)


def __dir__():
  return sorted([*globals(), *_PUBLIC])
