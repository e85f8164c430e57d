"""DeepSeek Sparse Attention on grouped queries: index scores, exact top-k, attention on the selected keys, indexer KL.

B batch, T query time, S key time, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim.
"""
import jax

from pallas_kernels import dispatch, tiles
from pallas_kernels.dsa_attention import gpu, reference, tpu, xla
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.dsa_attention.way import Way, choose
from pallas_kernels.index_select import Selection

__all__ = ['DSAOutput', 'Selection', 'Way', 'dsa_attention']

IMPLEMENTATIONS = {'reference': reference.dsa_attention, 'xla': xla.dsa_attention, 'tpu': tpu.dsa_attention,
                   'gpu': gpu.dsa_attention}


def dsa_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, iq_BTIJ: jax.Array, ik_BSJ: jax.Array,
                  gate_BTI: jax.Array, q_segment_BT: jax.Array, k_segment_BS: jax.Array, q_order_BT: jax.Array,
                  k_order_BS: jax.Array, *, topk: int, scale: float | None = None, selection: Selection | None = None,
                  want_kl: bool = True, implementation: dispatch.Implementation | None = None,
                  way: Way | None = None) -> DSAOutput:
  """Causal attention of each query over its topk best-scoring visible keys, the same keys for all heads.

  The selection is that of `pallas_kernels.index_select.index_select`; one that is passed in is used as it is (replay).
  `scale` multiplies the attention logits, K**-0.5 by default. T may differ from S: in decoding a few queries meet a
  cache whose unwritten slots have segment 0.

  `way` is how the selected keys are met (way.py): 'masked_dense', all key tiles under the mask of the selection, or
  'gathered'; both are the same function, and None takes the one that is faster at these lengths.

  Returns o_BTHK in the dtype of q; lse_BTH float32 over the selected keys (NEG_INF and o = 0 when there are none);
  kl_BT float32, KL(p || softmax(score)) over the selected keys with p the attention probabilities averaged over heads
  (arXiv 2606.10651 §2: `L_sparse` is the number of KV heads times this, up to a constant), None when `want_kl` is
  False; and the selection. o differentiates q, k and v only; kl differentiates iq, ik and gate only, with the closed
  form (softmax(score) - p) * cotangent, p held constant; lse and the selection are not differentiated.
  Raises ValueError for topk < 1, an unknown implementation or way, or H not a multiple of G.
  """
  H, G = q_BTHK.shape[2], k_BSGK.shape[2]
  if H % G:
    raise ValueError(f'dsa_attention: {H} query heads are not a multiple of {G} KV heads')
  if topk < 1:
    raise ValueError(f'dsa_attention: topk is {topk}, it must be at least 1')
  name = implementation_of(H, q_BTHK.shape[1], k_BSGK.shape[1], implementation)
  way = choose(name, H, q_BTHK.shape[1], k_BSGK.shape[1], topk, want_kl, way)
  return IMPLEMENTATIONS[name](
      q_BTHK, k_BSGK, v_BSGK, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT, k_order_BS, topk=topk,
      scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale, selection=selection, want_kl=want_kl, way=way)


def implementation_of(H: int, T: int, S: int, implementation: dispatch.Implementation | None = None) -> str:
  """Name of the implementation for rows of H query heads; None asks for the best one. The kernels of a GPU are for rows
  of more than one tile."""
  name = dispatch.choose('dsa_attention', implementation)
  return 'xla' if implementation is None and name == 'gpu' and tiles.one_tile(H, T, S) else name
