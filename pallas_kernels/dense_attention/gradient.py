"""Dense attention with a hand-written backward pass, around the two passes of an implementation.

B batch, T query time, S key time, H query heads, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.equation import equation, kept


class Row(NamedTuple):
  """The arrays of one row, or with a leading B of all rows."""
  q_GNK: jax.Array
  k_GSK: jax.Array
  v_GSK: jax.Array
  q_segment_T: jax.Array
  k_segment_S: jax.Array
  q_order_T: jax.Array
  k_order_S: jax.Array


class Options(NamedTuple):
  causal: bool
  scale: float


class Passes(NamedTuple):
  """Of an implementation, over all rows of a batch.

  forward(options, rows) -> (o_BGNK in any float dtype, lse_BGN); backward(options, rows, lse_BGN, delta_BGN, do_BGNK)
  -> gradients of q, k, v in any float dtype. delta is the sum of do * o over K.
  """
  forward: Callable
  backward: Callable


def by_row(forward: Callable, backward: Callable) -> Passes:
  """Passes of functions of one row: forward(options, *row), backward(options, *row, lse_GN, delta_GN, do_GNK)."""
  def over(fn):
    return lambda options, rows, *more: tiles.over_rows(functools.partial(fn, options), (*rows, *more), loop=True)
  return Passes(over(forward), over(backward))


def attend(passes: Passes, *arrays, causal, scale):
  return _attention(passes, Options(causal, scale), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(passes, options, *arrays):
  return _forward(passes, options, *arrays)[0]


def _forward(passes, options, *arrays):
  run = functools.partial(_forward_pass, passes, options)
  o_BTHK, lse_BTH = kept(named('forward', options, run, arrays)(*arrays))
  return (o_BTHK, lse_BTH), (*arrays, o_BTHK, lse_BTH)


def _backward(passes, options, saved, cotangents):
  run = functools.partial(_backward_pass, passes, options)
  return *named('backward', options, run, saved)(*saved, cotangents[0]), None, None, None, None


def named(direction: str, options: Options, fn, arrays):
  (B, T, H, K), (_, S, G, _) = arrays[0].shape, arrays[1].shape
  name = f'dense_attention_{direction}' + ('' if options.causal else '_full')
  return equation(name, fn, B=B, T=T, H=H, K=K, S=S, G=G, width=arrays[0].dtype.itemsize)


def stacked(q_BTHK, k_BSGK, v_BSGK, *places) -> Row:
  return Row(tiles.stack_heads(q_BTHK, k_BSGK.shape[2]), k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), *places)


def _forward_pass(passes, options, *arrays):
  (_, T, _, _), dtype = arrays[0].shape, arrays[0].dtype
  o_BGNK, lse_BGN = passes.forward(options, stacked(*arrays))
  return tiles.unstack_heads(o_BGNK.astype(dtype), T), tiles.unstack_heads(lse_BGN, T)


def _backward_pass(passes, options, *saved):
  *arrays, o_BTHK, lse_BTH, do_BTHK = saved
  q_BTHK, k_BSGK, v_BSGK = arrays[:3]
  delta_BTH = (do_BTHK.astype(jnp.float32) * o_BTHK.astype(jnp.float32)).sum(-1)
  stack = functools.partial(tiles.stack_heads, G=k_BSGK.shape[2])
  dq, dk, dv = passes.backward(options, stacked(*arrays), stack(lse_BTH), stack(delta_BTH), stack(do_BTHK))
  return (tiles.unstack_heads(dq, q_BTHK.shape[1]).astype(q_BTHK.dtype), dk.swapaxes(1, 2).astype(k_BSGK.dtype),
          dv.swapaxes(1, 2).astype(v_BSGK.dtype))


_attention.defvjp(_forward, _backward)
