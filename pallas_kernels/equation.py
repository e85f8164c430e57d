"""One pass of an op as one equation of the program that holds it, and what of it rematerialisation may keep."""
import re
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = 'attention'      # name of what attention's forward pass leaves to its backward pass, for jax.checkpoint


def kept(results):
  """`results` of a forward pass of attention, under the name by which `jax.checkpoint` can be told to keep them."""
  return jax.tree.map(lambda x: checkpoint_name(x, ATTENTION), results)


def equation(name: str, fn: Callable, **dims: int) -> Callable:
  """`fn` under a name with its dimensions, as 'dense_attention_forward.B1.T512': a profile shows it, and a walk of the
  jaxpr meets one equation where the trip counts of loops inside would depend on data (`keye_jax/jaxpr_costs.py`).

  The dimensions are in the name since jax may cut the equation in two (what a scan over layers need not repeat) and
  change its arguments. Made at each call: tile sizes are read while tracing.
  """
  def call(*arrays):
    return fn(*arrays)

  call.__name__ = call.__qualname__ = '.'.join([name, *(f'{letter}{n}' for letter, n in dims.items())])
  return jax.jit(call)


def parse(name: str) -> tuple[str, dict[str, int]]:
  """(name, dimensions) of an equation."""
  name, *dims = name.split('.')
  return name, {m[1]: int(m[2]) for m in (re.fullmatch(r'([A-Za-z]+)([0-9]+)', d) for d in dims) if m}
