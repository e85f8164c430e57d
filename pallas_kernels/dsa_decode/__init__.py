"""DeepSeek Sparse Attention of a few new tokens of each sequence against caches in pages.

B sequences, T new tokens, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim, P pages of the
pool, A slots of a page, N pages of a sequence.
"""
import jax

from pallas_kernels import dispatch
from pallas_kernels.dsa_decode import gpu, reference, tpu, xla
from pallas_kernels.dsa_decode.pages import PAGE, DecodeOutput, Pages, eight_bits, newest, write
from pallas_kernels.index_select.selection import Selection

__all__ = ['PAGE', 'DecodeOutput', 'Pages', 'Selection', 'dsa_decode', 'eight_bits', 'newest', 'write']

IMPLEMENTATIONS = {'reference': reference.dsa_decode, 'xla': xla.dsa_decode, 'tpu': tpu.dsa_decode,
                   'gpu': gpu.dsa_decode}
MOST = 32              # new tokens of a sequence: one bit each of a word


def dsa_decode(q_BTHK: jax.Array, pages: Pages, iq_BTIJ: jax.Array, gate_BTI: jax.Array, page_BN: jax.Array,
               length_B: jax.Array, *, topk: int, scale: float | None = None,
               implementation: dispatch.Implementation | None = None) -> DecodeOutput:
  """Attention of the last T tokens of each sequence over its topk best-scoring earlier tokens, itself included.

  page_BN int32: tokens A * n to A * (n + 1) - 1 of a sequence lie in page page_BN[b, n] of the pool; entries that no
  token needs may be anything, and so may slots beyond the length. length_B int32: tokens of a sequence, the T new ones,
  whose keys are in the pages already, included. When it is below T, the first T - length queries are no tokens: they
  see nothing, as do all of a sequence of length 0. `gate` is final; `scale` multiplies the attention logits, K**-0.5 by
  default.

  The selection is that of `pallas_kernels.index_select.index_select` over a token's place in its sequence: exact, equal
  scores lowest place first. Index keys of 8 bits are multiplied by their scale before the product.
  Returns o_BTHK in the dtype of q, lse_BTH float32 (0 and NEG_INF for a query that sees nothing) and the selection.
  Not differentiable. Raises ValueError for topk < 1, more than 32 new tokens, H not a multiple of G, 8-bit index keys
  without a scale, or an unknown implementation.
  """
  T, H, G = q_BTHK.shape[1], q_BTHK.shape[2], pages.k_PAGK.shape[2]
  if H % G:
    raise ValueError(f'dsa_decode: {H} query heads are not a multiple of {G} KV heads')
  if topk < 1:
    raise ValueError(f'dsa_decode: topk is {topk}, it must be at least 1')
  if T > MOST:
    raise ValueError(f'dsa_decode: {T} new tokens a sequence, at most {MOST} are supported; use dsa_attention')
  if pages.ik_PAJ.dtype.itemsize == 1 and pages.ik_scale_PA is None:
    raise ValueError(f'dsa_decode: index keys of {pages.ik_PAJ.dtype} need ik_scale_PA')
  run = IMPLEMENTATIONS[dispatch.choose('dsa_decode', implementation)]
  arrays = jax.lax.stop_gradient((q_BTHK, pages, iq_BTIJ, gate_BTI))
  return run(*arrays, page_BN, length_B, topk=topk, scale=q_BTHK.shape[-1] ** -0.5 if scale is None else scale)
