"""Decoding as its definition: the pages of each sequence laid out one after the other, then sparse attention.

Letters as in __init__.py; S slots of a sequence.
"""
import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dsa_attention import reference
from pallas_kernels.dsa_decode.pages import DecodeOutput, Pages, index_keys, read, slots


def dsa_decode(q_BTHK, pages: Pages, iq_BTIJ, gate_BTI, page_BN, length_B, *, topk, scale) -> DecodeOutput:
  (B, T), S = q_BTHK.shape[:2], page_BN.shape[1] * pages.ik_PAJ.shape[1]
  order_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
  slot_BS = jax.vmap(lambda page_N, order_S: slots(page_N, order_S, pages))(page_BN, order_BS)
  written_BS = order_BS < length_B[:, None]

  def lay_out(read_U):
    x_BS = jax.vmap(read_U)(slot_BS)
    return jnp.where(written_BS.reshape(B, S, *(1,) * (x_BS.ndim - 2)), x_BS, 0)

  k_BSGK, v_BSGK = (lay_out(lambda slot_U, x=x: read(x, slot_U)) for x in pages[:2])
  ik_BSJ = lay_out(lambda slot_U: index_keys(pages, slot_U, iq_BTIJ.dtype))
  q_order_BT = length_B[:, None] - T + jnp.arange(T, dtype=jnp.int32)
  sample = 1 << 8
  q_segment_BT = jnp.where(q_order_BT >= 0, sample, tiles.QUERY_PAD)
  out = reference.dsa_attention(q_BTHK, k_BSGK, v_BSGK, iq_BTIJ, ik_BSJ, gate_BTI, q_segment_BT,
                                jnp.where(written_BS, sample, 0), q_order_BT, order_BS, topk=topk, scale=scale,
                                selection=None, want_kl=False, way='masked_dense')
  return DecodeOutput(out.o_BTHK, out.lse_BTH, out.selection)
