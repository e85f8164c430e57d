"""Matrix products of rows that are sorted by expert, each with its own expert's weights.

Rows `sum(sizes_E[:e]) .. sum(sizes_E[:e+1])` belong to expert e; an expert may have none. Rows beyond `sum(sizes_E)`
belong to nobody: they give zeros, pass no gradient and cost no work.

N rows, D input features, F output features (of `grouped_swiglu`: hidden ones), E experts.
"""
import jax

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation
from pallas_kernels.grouped_matmul import reference, xla


def grouped_matmul(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array,
                   implementation: Implementation | None = None) -> jax.Array:
  """y[n] = x[n] @ w[expert of n]: [N, F] in x's dtype, accumulated in float32.

  sizes_E: int32, rows of each expert. Differentiable in x and w. Raises ValueError when the shapes do not fit.
  """
  _check('grouped_matmul', x_ND, w_EDF, sizes_E)
  if dispatch.choose('grouped_matmul', implementation) == 'reference':
    return reference.grouped_matmul(x_ND, w_EDF, sizes_E)
  return _matmul(x_ND, w_EDF, sizes_E)


def grouped_swiglu(x_ND: jax.Array, gate_up_EDF2: jax.Array, down_EFD: jax.Array, sizes_E: jax.Array,
                   implementation: Implementation | None = None) -> jax.Array:
  """The whole expert, silu(x W_gate) * (x W_up) W_down: [N, D] in x's dtype, accumulated in float32.

  gate_up_EDF2: [E, D, 2 F], the gate in the first half. Differentiable in x and both weights; the hidden
  pre-activations [N, 2 F] are what the backward pass keeps. Raises ValueError when the shapes do not fit.
  """
  _check('grouped_swiglu', x_ND, gate_up_EDF2, sizes_E)
  E, D, F2 = gate_up_EDF2.shape
  if F2 % 2 or down_EFD.shape != (E, F2 // 2, D):
    raise ValueError(f'grouped_swiglu: gate_up {gate_up_EDF2.shape} is [E, D, 2 F] and needs down [E, F, D], '
                     f'got {down_EFD.shape}')
  if dispatch.choose('grouped_swiglu', implementation) == 'reference':
    return reference.grouped_swiglu(x_ND, gate_up_EDF2, down_EFD, sizes_E)
  return _swiglu(x_ND, gate_up_EDF2, down_EFD, sizes_E)


def _check(op, x_ND, w_EDF, sizes_E):
  if x_ND.ndim != 2 or w_EDF.ndim != 3 or x_ND.shape[1] != w_EDF.shape[1] or sizes_E.shape != w_EDF.shape[:1]:
    raise ValueError(f'{op}: x [N, D], weights [E, D, F] and sizes [E] do not fit: '
                     f'{x_ND.shape}, {w_EDF.shape}, {sizes_E.shape}')


@jax.custom_vjp
def _matmul(x_ND, w_EDF, sizes_E):
  return xla.matmul(x_ND, w_EDF, sizes_E)


def _matmul_fwd(x_ND, w_EDF, sizes_E):
  return xla.matmul(x_ND, w_EDF, sizes_E), (x_ND, w_EDF, sizes_E)


def _matmul_bwd(saved, dy_NF):
  return *xla.matmul_bwd(*saved, dy_NF), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@jax.custom_vjp
def _swiglu(x_ND, gate_up_EDF2, down_EFD, sizes_E):
  return xla.swiglu(x_ND, gate_up_EDF2, down_EFD, sizes_E)


def _swiglu_fwd(x_ND, gate_up_EDF2, down_EFD, sizes_E):
  y_ND, h_NF2 = xla.swiglu_fwd(x_ND, gate_up_EDF2, down_EFD, sizes_E)
  return y_ND, (x_ND, gate_up_EDF2, down_EFD, sizes_E, h_NF2)


def _swiglu_bwd(saved, dy_ND):
  return *xla.swiglu_bwd(*saved, dy_ND), None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
