"""Warm-up loss of the indexer as its definition, on whole T x S matrices. Letters as in the package."""
from pallas_kernels.dsa_attention.reference import kl
from pallas_kernels.index_select.reference import score
from pallas_kernels.mask import visible


def indexer_warmup(q_BTHK, k_BSGK, lse_BTH, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT, k_segment_BS, q_order_BT,
                   k_order_BS, *, scale):
  mask_BTS = visible(q_segment_BT[:, :, None], k_segment_BS[:, None], q_order_BT[:, :, None], k_order_BS[:, None],
                     causal=True)
  return kl(score(iq_BTIJ, ik_BSJ, gate_BTI), q_BTHK, k_BSGK, lse_BTH, mask_BTS, scale)
