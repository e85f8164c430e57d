"""The specification: every row through every expert, its own kept. O(N E D F).

N rows, D input features, F output or hidden features, E experts, K experts of a row.
"""
import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def owner(N: int, sizes_E: jax.Array) -> jax.Array:
  """float32 one-hot [N, E] of each row's expert; zero for a row that belongs to nobody."""
  end_E = jnp.cumsum(sizes_E)
  n_N1 = jnp.arange(N)[:, None]
  return ((n_N1 < end_E) & (n_N1 >= end_E - sizes_E)).astype(jnp.float32)


def einsum(equation, *arrays):
  return jnp.einsum(equation, *(a.astype(jnp.float32) for a in arrays), precision=HIGHEST)


def grouped_matmul(x_ND, w_EDF, sizes_E):
  y_NEF = einsum('ND,EDF->NEF', x_ND, w_EDF)
  return einsum('NEF,NE->NF', y_NEF, owner(len(x_ND), sizes_E)).astype(x_ND.dtype)


def routed_swiglu(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD):
  gate_NEF, up_NEF = jnp.split(einsum('ND,EDF->NEF', x_ND, gate_up_EDF2), 2, -1)
  y_NED = einsum('NEF,EFD->NED', (jax.nn.silu(gate_NEF) * up_NEF).astype(x_ND.dtype), down_EFD)
  return einsum('NED,NKE,NK->ND', y_NED, jax.nn.one_hot(expert_NK, len(down_EFD)), weight_NK).astype(x_ND.dtype)


def adapted_swiglu(x_ND, expert_NK, weight_NK, gate_up, down):
  def merged(w, a, b, scale):
    w = w.astype(jnp.float32)
    return (w if scale is None else w * scale[:, None]) + einsum('EIA,EAO->EIO', a, b)
  return routed_swiglu(x_ND, expert_NK, weight_NK, merged(*gate_up), merged(*down))
