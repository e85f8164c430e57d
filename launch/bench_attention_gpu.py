"""The scores of the GPU kernels alone: what `index_select` does before it looks for a threshold, for `keye bench
attention`.

T query time, I indexer heads, J indexer head dim, S key time.
"""
import jax
import jax.numpy as jnp

from pallas_kernels.index_select import gpu


def score(iq_TIJ, ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S) -> jax.Array:
  """Key of the first score of each query of a row, [T]. All scores are written; nothing reads the others again."""
  chunks, keys = gpu.cut(iq_TIJ.swapaxes(0, 1), ik_SJ, gate_TI, q_segment_T, k_segment_S, q_order_T, k_order_S)
  low_T = jnp.full(chunks.order_T.shape[1], gpu.MASKED + 1, jnp.int32)       # a bound that all visible keys are above
  return jax.lax.map(lambda chunk: gpu.scores(chunk, keys, low_T)[0][:, 0], chunks).reshape(-1)[:len(q_order_T)]
