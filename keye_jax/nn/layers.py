"""Normalisations and the gated MLP, as functions.

B batch, T time, D features, F ffn width.
"""
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax.ad_checkpoint import checkpoint_name

from keye_jax.sharding import Adapted
from pallas_kernels import dispatch, tiles
from pallas_kernels.equation import ATTENTION

BLOCK = 'block'              # name of a block's input, for jax.checkpoint


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis; statistics in float32, result in x's dtype."""
  x32 = x.astype(jnp.float32)
  y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
  """LayerNorm over the last axis; statistics in float32, result in x's dtype."""
  x32 = x.astype(jnp.float32)
  x32 = x32 - jnp.mean(x32, -1, keepdims=True)
  y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
  return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def project(x: jax.Array, w: jax.Array | Adapted, axes: int = 1) -> jax.Array:
  """Contracts the last `axes` dimensions of x with the first of w; with an adapter x W + (x A) B. Of a weight in 8 bits
  the result has the rounding of its dtype twice, before and after the scale.

  One row, as in decoding, is a multiply and a sum: XLA for CPUs inlines the reshaped weight into a one-row dot and then
  walks it by columns, 7 times slower. Under a mesh it stays a dot, whose sharding jax knows.
  """
  if isinstance(w, Adapted):
    y = project(x, w.w, axes) if w.scale is None else project_int8(x, w.w, w.scale, axes)
    return y if w.a is None else y + project(project(x, w.a, axes), w.b)
  rows, width = x.shape[:x.ndim - axes], math.prod(w.shape[:axes])
  if math.prod(rows) != 1 or not jax.typeof(x).sharding.mesh.empty:
    return product(x, w, axes)
  y = (x.reshape(width, 1).astype(jnp.float32) * w.reshape(width, -1).astype(jnp.float32)).sum(0)
  return y.astype(x.dtype).reshape(rows + w.shape[axes:])


def product(x: jax.Array, w: jax.Array, axes: int = 1, dtype: str | None = None) -> jax.Array:
  """tensordot of x and a weight, in `dtype` or that of both.

  In float32 on a CPU the weight's gradient, a sum over rows, is `tiles.inner`, from a gradient of the product that is
  computed once and not in every loop that reads it. Under a mesh jax knows the sharding of a plain product's gradient.
  """
  alone = dispatch.platform() == 'cpu' and jax.typeof(x).sharding.mesh.empty
  if alone and x.dtype == w.dtype == jnp.float32 and dtype in (None, 'float32'):
    return _product(x, w, axes)
  return jnp.tensordot(x, w, axes, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, w, axes):
  return jnp.tensordot(x, w, axes)


def _product_fwd(x, w, axes):
  """Keeps what the gradients that somebody asks for read: a frozen weight's is not computed."""
  saved = x.value if w.perturbed else None, w.value if x.perturbed else None, w.value.shape
  return _product(x.value, w.value, axes), saved


def _product_bwd(axes, saved, dy):
  x, w, shape = saved
  dy, width = jax.lax.optimization_barrier(dy), math.prod(shape[:axes])
  dx = None if w is None else _back(dy, w, axes)
  dw = None if x is None else tiles.inner(x.reshape(-1, width), dy.reshape(-1, math.prod(shape[axes:])))
  return dx, dw if dw is None else dw.reshape(shape)


def _back(dy: jax.Array, w: jax.Array, axes: int) -> jax.Array:
  """The gradient of x in tensordot(x, w, axes)."""
  made = w.ndim - axes
  return jnp.tensordot(dy, w, (tuple(range(dy.ndim - made, dy.ndim)), tuple(range(axes, w.ndim))))


_product.defvjp(_product_fwd, _product_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def project_int8(x: jax.Array, q: jax.Array, scale: jax.Array, axes: int) -> jax.Array:
  """x (q * scale). Its gradient is written out so that q is kept for it in 8 bits, not as what the product took."""
  return _scaled(project(x, q.astype(x.dtype), axes), scale)


def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
  return (y.astype(jnp.float32) * scale).astype(y.dtype)


def _project_int8_bwd(axes, saved, dy):
  q, scale = saved
  return _back(_scaled(dy, scale), q.astype(dy.dtype), axes), None, None


project_int8.defvjp(lambda x, q, scale, axes: (project_int8(x, q, scale, axes), (q, scale)), _project_int8_bwd)


def swiglu(x_BTD: jax.Array, gate_up_DF2: jax.Array | Adapted, down_FD: jax.Array | Adapted) -> jax.Array:
  """silu(x W_gate) * (x W_up) W_down; the gate is the first half of gate_up's columns."""
  gate, up = jnp.split(project(x_BTD, gate_up_DF2), 2, -1)
  return project(jax.nn.silu(gate) * up, down_FD)


def remat(policy: str, block: Callable) -> Callable:
  """`block(x, inputs)` of a scan over layers, whose backward pass computes again what the policy does not keep.

  none: keeps everything. block: keeps a block's input. attention: also what attention leaves to its backward pass, its
  output above all, so that the longest part of a long row is not done twice. offload: the same as attention, but in the
  memory of the host, where it goes while the next layers run; the backward pass fetches it layer by layer.
  """
  keep = None
  match policy:
    case 'none':
      return block
    case 'attention':
      keep = jax.checkpoint_policies.save_only_these_names(ATTENTION)
    case 'offload':
      keep = jax.checkpoint_policies.save_and_offload_only_these_names(
          names_which_can_be_saved=[], names_which_can_be_offloaded=[ATTENTION, BLOCK], offload_src='device',
          offload_dst='pinned_host')
      inner, block = block, lambda x, inputs: inner(checkpoint_name(x, BLOCK), inputs)
  return jax.checkpoint(block, prevent_cse=False, policy=keep)


def residual_init(fan_in: int, layers: int):
  """For the 2 * layers matrices that write into the residual stream: together they add about what one would, so that
  a deep stack starts near the identity and a token is not drowned in its first layers."""
  return initializers.normal((2 * layers * fan_in) ** -0.5)
