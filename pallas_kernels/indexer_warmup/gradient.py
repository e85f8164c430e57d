"""The warm-up loss with a hand-written backward pass, around the two passes of an implementation.

B batch, T query time, S key time, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim, I indexer
heads, J indexer head dim.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels import tiles
from pallas_kernels.equation import equation, kept


class Row(NamedTuple):
  """The arrays of one row, or with a leading B of all rows."""
  q_GNK: jax.Array
  k_GSK: jax.Array
  lse_GN: jax.Array
  iq_ITJ: jax.Array
  ik_SJ: jax.Array
  gate_TI: jax.Array
  q_segment_T: jax.Array
  k_segment_S: jax.Array
  q_order_T: jax.Array
  k_order_S: jax.Array


class Passes(NamedTuple):
  """Of an implementation, over all rows of a batch.

  forward(scale, rows) -> (kl_BT, log-sum-exp of the scores [B, T]); backward(scale, rows, that, dkl_BT) -> float32
  gradients of iq, ik, gate.
  """
  forward: Callable
  backward: Callable


def by_row(forward: Callable, backward: Callable) -> Passes:
  """Passes of functions of one row: forward(scale, row), backward(scale, row, lse_T, dkl_T)."""
  def over(fn):
    return lambda scale, rows, *more: tiles.over_rows(functools.partial(fn, scale), (rows, *more), loop=True)
  return Passes(over(forward), over(backward))


def warm(passes: Passes, q_BTHK, k_BSGK, lse_BTH, iq_BTIJ, ik_BSJ, gate_BTI, *places, scale) -> jax.Array:
  G = k_BSGK.shape[2]
  rows = Row(tiles.stack_heads(q_BTHK, G), k_BSGK.swapaxes(1, 2), tiles.stack_heads(lse_BTH, G),
             iq_BTIJ.swapaxes(1, 2), ik_BSJ, gate_BTI, *places)
  return _warmup(passes, scale, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _warmup(passes, scale, rows: Row):
  return _forward(passes, scale, rows)[0]


def _forward(passes, scale, rows: Row):
  kl_BT, lse_BT = kept(named('forward', functools.partial(passes.forward, scale), rows)(rows))
  return kl_BT, (rows, lse_BT)


def _backward(passes, scale, saved, dkl_BT):
  rows, lse_BT = saved
  grads = named('backward', functools.partial(passes.backward, scale), rows)(rows, lse_BT, dkl_BT)
  diq, dik, dgate = (g.astype(x.dtype) for g, x in zip(grads, (rows.iq_ITJ, rows.ik_SJ, rows.gate_TI)))
  return Row(None, None, None, diq, dik, dgate, None, None, None, None),


def named(direction: str, fn, rows: Row):
  (B, G, N, K), (_, I, T, J) = rows.q_GNK.shape, rows.iq_ITJ.shape
  return equation(f'indexer_warmup_{direction}', fn, B=B, G=G, N=N, K=K, S=rows.k_GSK.shape[2], I=I, T=T, J=J,
                  width=rows.q_GNK.dtype.itemsize)


_warmup.defvjp(_forward, _backward)
