"""The lightning indexer's scores and the exact, deterministic top-k of DeepSeek Sparse Attention.

Score of key s for query t: sum_i gate[t, i] * relu(iq[t, i] . ik[s]) in float32 (arXiv 2512.02556 eq. 1). All
attention heads share one set per query.

B batch, T query time, S key time, I indexer heads, J indexer head dim.
"""
import jax

from pallas_kernels import dispatch
from pallas_kernels.index_select import gpu, reference, tpu, xla
from pallas_kernels.index_select.selection import Selection, keep_all, selected
from pallas_kernels.mask import visible

__all__ = ['Selection', 'index_select', 'keep_all', 'select_mask', 'selected']

IMPLEMENTATIONS = {'reference': reference.index_select, 'xla': xla.index_select, 'tpu': tpu.index_select,
                   'gpu': gpu.index_select}


def index_select(iq_BTIJ: jax.Array, ik_BSJ: jax.Array, gate_BTI: jax.Array, q_segment_BT: jax.Array,
                 k_segment_BS: jax.Array, q_order_BT: jax.Array, k_order_BS: jax.Array, *, topk: int,
                 implementation: dispatch.Implementation | None = None) -> Selection:
  """The topk best-scoring visible keys of each query, as a Selection. Not differentiable.

  `gate` is final: any scale (J**-0.5) is already in it. Scores are float32 with -0.0 counted as +0.0. The causal and
  segment mask comes before the top-k; equal scores are taken lowest order first, and never more than topk.
  Raises ValueError for topk < 1 or an unknown implementation.
  """
  if topk < 1:
    raise ValueError(f'index_select: topk is {topk}, it must be at least 1')
  run = IMPLEMENTATIONS[dispatch.choose('index_select', implementation)]
  arrays = jax.lax.stop_gradient((iq_BTIJ, ik_BSJ, gate_BTI))
  return run(*arrays, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, topk=topk)


def select_mask(selection: Selection, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT,
                k_order_BS) -> jax.Array:
  """The selection as bool [B, T, S]: for tests, analysis and plots, where T x S fits."""
  score_BTS = reference.score(iq_BTIJ, ik_BSJ, gate_BTI)
  chosen_BTS = selected(score_BTS, k_order_BS[:, None], selection.threshold_BT[..., None],
                        selection.last_BT[..., None])
  return chosen_BTS & visible(q_segment_BT[:, :, None], k_segment_BS[:, None], q_order_BT[:, :, None],
                              k_order_BS[:, None], causal=True)
