"""Matrix products of rows with the weights of the expert each belongs to.

N rows, D input features, F output features (of `routed_swiglu`: hidden ones), E experts, K experts of a row.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.equation import equation
from pallas_kernels.grouped_matmul import adapted, adapted_parts, gpu, reference, routed, tpu, xla


def grouped_matmul(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array,
                   implementation: Implementation | None = None) -> jax.Array:
  """y[n] = x[n] @ w[expert of n]: [N, F] in x's dtype, accumulated in float32.

  Rows are sorted by expert: `sizes_E[e]` (int32, may be 0) of them belong to expert e. Rows beyond `sum(sizes_E)`
  belong to nobody: they give zeros, pass no gradient and cost no work. Differentiable in x and w. Raises ValueError
  when the shapes do not fit.
  """
  if x_ND.ndim != 2 or w_EDF.ndim != 3 or x_ND.shape[1] != w_EDF.shape[1] or sizes_E.shape != w_EDF.shape[:1]:
    raise ValueError('grouped_matmul: x [N, D], weights [E, D, F] and sizes [E] do not fit: '
                     f'{x_ND.shape}, {w_EDF.shape}, {sizes_E.shape}')
  name = dispatch.choose('grouped_matmul', implementation)
  if name == 'reference':
    return reference.grouped_matmul(x_ND, w_EDF, sizes_E)
  return _matmul(name, x_ND, w_EDF, sizes_E)


def routed_swiglu(x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, gate_up_EDF2: jax.Array,
                  down_EFD: jax.Array, implementation: Implementation | None = None, devices: int = 1) -> jax.Array:
  """y[n] = sum_k weight[n, k] * MLP_e(x[n]), e = expert[n, k], MLP_e(x) = (silu(x W_gate) * (x W_up)) W_down.

  expert_NK: int32; a pick outside 0..E-1 belongs to another device, or to padding, and adds nothing. weight_NK:
  float32. gate_up_EDF2: [E, D, 2 F], the gate in the first half. y has x's dtype, products are accumulated in float32.
  Differentiable in x, weight and both matrices; where the backward pass keeps the hidden pre-activations they are
  [N K, 2 F]. devices: how many share the picks, so that about one in so many is of an expert here; it never changes the
  result. Raises ValueError when the shapes do not fit.
  """
  E, D, F2 = gate_up_EDF2.shape
  if F2 % 2 or down_EFD.shape != (E, F2 // 2, D):
    raise ValueError(f'routed_swiglu: gate_up {gate_up_EDF2.shape} is [E, D, 2 F] and needs down [E, F, D], '
                     f'got {down_EFD.shape}')
  if expert_NK.ndim != 2 or weight_NK.shape != expert_NK.shape or x_ND.shape != (len(expert_NK), D):
    raise ValueError(f'routed_swiglu: x [N, D], experts [N, K] and weights [N, K] with D = {D} do not fit: '
                     f'{x_ND.shape}, {expert_NK.shape}, {weight_NK.shape}')
  name = implementation_of(expert_NK.size, implementation)
  if name == 'reference':
    return reference.routed_swiglu(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD)
  return _routed(name, devices, x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD)


def implementation_of(picks: int, implementation: Implementation | None = None) -> str:
  """Name of the implementation of `routed_swiglu`; None asks for the best one. Few picks each read their weights."""
  name = dispatch.choose('routed_swiglu', implementation)
  return 'xla' if picks <= routed.FEW_PICKS and name != 'reference' else name


def adapted_swiglu(x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, gate_up: tuple[jax.Array, ...],
                   down: tuple[jax.Array, ...], implementation: Implementation | None = None,
                   devices: int = 1) -> jax.Array:
  """`routed_swiglu` with W + A B in place of both matrices; that sum is never formed (LoRA, arXiv 2106.09685 eq. 3).

  gate_up: (W [E, D, 2 F], A [E, D, A], B [E, A, 2 F]); down: (W [E, F, D], A [E, F, A], B [E, A, D]); a matrix without
  an adapter has one of rank 0. A fourth, unless it is None, is a scale, [E, 2 F] or [E, D], float32: then W is int8 and
  W times its scale is meant. Differentiable in x, weight, A and B; W passes no gradient, and none is computed. devices:
  as in `routed_swiglu`. Raises ValueError when the shapes do not fit.
  """
  gate_up, down = ((*each, None)[:4] for each in (gate_up, down))
  for name, (w, a, b, scale) in (('gate_up', gate_up), ('down', down)):
    E, D, F = w.shape
    if (w.dtype == jnp.int8) != (scale is not None) or scale is not None and scale.shape != (E, F):
      raise ValueError(f'adapted_swiglu: {name} is {w.dtype} {w.shape} with '
                       f'{"no scale" if scale is None else f"a scale {scale.shape}"}; int8 alone needs one, [{E}, {F}]')
    if a.shape[:2] != (E, D) or b.shape != (E, a.shape[-1], F):
      raise ValueError(f'adapted_swiglu: {name} {w.shape} needs a pair [{E}, {D}, A] and [{E}, A, {F}], got {a.shape} '
                       f'and {b.shape}')
  (E, D, F2), (_, F, _) = gate_up[0].shape, down[0].shape
  if F2 != 2 * F or down[0].shape != (E, F, D) or x_ND.shape != (len(expert_NK), D) or (
      weight_NK.shape != expert_NK.shape):
    raise ValueError(f'adapted_swiglu: x {x_ND.shape}, experts {expert_NK.shape}, weights {weight_NK.shape}, gate_up '
                     f'{gate_up[0].shape} and down {down[0].shape} do not fit')
  gate_up, down = ((jax.lax.stop_gradient(w), a, b, jax.lax.stop_gradient(s)) for w, a, b, s in (gate_up, down))
  name = dispatch.choose('adapted_swiglu', implementation)
  if name == 'reference':
    return reference.adapted_swiglu(x_ND, expert_NK, weight_NK, gate_up, down)
  return _adapted(name, devices, x_ND, expert_NK, weight_NK, gate_up, down)


MATMUL = {'xla': xla, 'tpu': tpu.KERNELS, 'gpu': gpu.KERNELS}
ROUTED = {'xla': routed, 'tpu': tpu.KERNELS, 'gpu': gpu.KERNELS}
ADAPTED = {'xla': adapted, 'gpu': adapted_parts.Adapted(gpu.KERNELS)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(name, x_ND, w_EDF, sizes_E):
  return MATMUL[name].matmul(x_ND, w_EDF, sizes_E)


def _matmul_fwd(name, x_ND, w_EDF, sizes_E):
  return _matmul(name, x_ND, w_EDF, sizes_E), (x_ND, w_EDF, sizes_E)


def _matmul_bwd(name, saved, dy_NF):
  return *MATMUL[name].matmul_bwd(*saved, dy_NF), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _routed(name, devices, x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD):
  if expert_NK.size <= routed.FEW_PICKS:
    run, picks = routed.few, expert_NK
  else:
    run, picks = functools.partial(ROUTED[name].swiglu, devices), ROUTED[name].sort(expert_NK, len(down_EFD))
  return _named('forward', run, x_ND, weight_NK, down_EFD)(x_ND, picks, weight_NK, gate_up_EDF2, down_EFD)


def _routed_fwd(name, devices, x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD):
  arrays = x_ND, ROUTED[name].sort(expert_NK, len(down_EFD)), weight_NK, gate_up_EDF2, down_EFD
  forward = _named('forward', functools.partial(ROUTED[name].swiglu_fwd, devices), x_ND, weight_NK, down_EFD)
  y_ND, more = forward(*arrays)
  return y_ND, (*arrays, more)


def _routed_bwd(name, devices, saved, dy_ND):
  backward = _named('backward', functools.partial(ROUTED[name].swiglu_bwd, devices), saved[0], saved[2], saved[4])
  dx_ND, dweight_NK, dgate_up_EDF2, ddown_EFD = backward(*saved, dy_ND)
  return dx_ND, None, dweight_NK, dgate_up_EDF2, ddown_EFD


_routed.defvjp(_routed_fwd, _routed_bwd)


def _named(direction, fn, x_ND, weight_NK, down_EFD, op='routed_swiglu', **ranks):
  (N, D), (E, F, _) = x_ND.shape, down_EFD.shape
  return equation(f'{op}_{direction}', fn, N=N, D=D, E=E, F=F, K=weight_NK.shape[1], width=x_ND.dtype.itemsize, **ranks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _adapted(name, devices, x_ND, expert_NK, weight_NK, gate_up, down):
  return _adapted_fwd(name, devices, x_ND, expert_NK, weight_NK, gate_up, down)[0]


def _adapted_fwd(name, devices, x_ND, expert_NK, weight_NK, gate_up, down):
  arrays = x_ND, ADAPTED[name].sort(expert_NK, len(down[0])), weight_NK, gate_up, down
  forward = _adapted_named('forward', functools.partial(ADAPTED[name].swiglu_fwd, devices), arrays)
  y_ND, more = forward(*arrays)
  return y_ND, (*arrays, more)


def _adapted_bwd(name, devices, saved, dy_ND):
  backward = _adapted_named('backward', functools.partial(ADAPTED[name].swiglu_bwd, devices), saved)
  dx_ND, dweight_NK, dgate_up_a, dgate_up_b, ddown_a, ddown_b = backward(*saved, dy_ND)
  return dx_ND, None, dweight_NK, (None, dgate_up_a, dgate_up_b, None), (None, ddown_a, ddown_b, None)


def _adapted_named(direction, fn, arrays):
  x_ND, _, weight_NK, gate_up, down = arrays[:5]
  return _named(direction, fn, x_ND, weight_NK, down[0], 'adapted_swiglu', G=gate_up[1].shape[2], A=down[1].shape[2],
                stored=down[0].dtype.itemsize)


_adapted.defvjp(_adapted_fwd, _adapted_bwd)
