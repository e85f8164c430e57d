"""Decoding on a GPU: all sequences at once, by the kernels of index_select and dsa_attention.

Only the scores need a kernel of their own: it reads index keys from the pages, as they are stored, up to the length of
each sequence. A sequence is one group of queries; its list of keys is turned into slots of the pool.

B sequences, T new tokens (padded to a power of two), I indexer heads, J indexer head dim, S tokens of a tile, P tiles,
N pages of a sequence, A slots of a page, G KV heads, K head dim.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import gpu_call, tiles
from pallas_kernels.dsa_attention import gpu as attention
from pallas_kernels.dsa_decode.pages import DecodeOutput, Pages, slots
from pallas_kernels.index_select import gpu as index
from pallas_kernels.index_select import search
from pallas_kernels.index_select.selection import Selection, keep_all


def dsa_decode(q_BTHK, pages: Pages, iq_BTIJ, gate_BTI, page_BN, length_B, *, topk, scale) -> DecodeOutput:
  (B, T, H, K), G = q_BTHK.shape, pages.k_PAGK.shape[2]
  capacity = page_BN.shape[1] * pages.ik_PAJ.shape[1]
  new = gpu_call.ceil_pow2(T)
  front = lambda x, value=0: jnp.pad(x, ((0, 0), (new - T, 0), *((0, 0),) * (x.ndim - 2)), constant_values=value)
  order_PS = jnp.arange(-(-capacity // index.TILE) * index.TILE, dtype=jnp.int32).reshape(-1, index.TILE)
  met = index.Tiles(order_PS, jnp.arange(len(order_PS), dtype=jnp.int32), -(-length_B // index.TILE))

  score = functools.partial(scores, front(iq_BTIJ), front(gate_BTI), pages, page_BN, length_B, T)
  low_T, stride = jnp.full(B * new, index.MASKED + 1), index.sample_stride(order_PS.size)
  if order_PS.size > index.CANDIDATES:
    few_TN, _ = score(stride, low_T)
    low_T = index.bound(few_TN, jnp.repeat(length_B, new), stride, topk)
  key_TN, number_TP = score(1, low_T)
  if topk >= capacity:
    every = keep_all((B * new,))
    key_T, last_T = search.key(every.threshold_BT), every.last_BT
  else:
    key_T, last_T = index.kth(key_TN, number_TP, low_T, met, topk)
  picked = attention.lists(met, *index.words(key_TN, key_T, last_T, met))
  slot_BU = jax.vmap(lambda page_N, index_U: slots(page_N, index_U, pages))(page_BN, picked.index_MU)

  heads = -(-gpu_call.ceil_pow2(H // G) * new // gpu_call.SMALLEST) * gpu_call.SMALLEST // new
  width = max(gpu_call.ceil_pow2(K), gpu_call.SMALLEST)
  q_BGNK = tiles.pad(tiles.pad(tiles.stack_heads(front(q_BTHK), G), 2, heads * new), 3, width)
  flat = lambda x_PAGK: tiles.pad(x_PAGK.reshape(-1, G, K), 2, width)
  o_BGNK, lse_BGN = attention.attention(scale, new, picked._replace(index_MU=slot_BU), q_BGNK, flat(pages.k_PAGK),
                                        flat(pages.v_PAGK))
  unstack = lambda x: tiles.unstack_heads(x[:, :, :H // G * new], new)[:, new - T:]
  own = lambda x: x.reshape(B, new)[:, new - T:]
  return DecodeOutput(unstack(o_BGNK)[..., :K], unstack(lse_BGN), Selection(own(search.value(key_T)), own(last_T)))


def scores(iq_BTIJ, gate_BTI, pages: Pages, page_BN, length_B, T: int, stride: int, low_T):
  """(key_TN, number_TP) as index.scores gives them, of every stride-th token. Of each sequence the last T of the rows
  are tokens."""
  (B, new, I, J), S = iq_BTIJ.shape, index.TILE
  P = -(-page_BN.shape[1] * pages.ik_PAJ.shape[1] // (S * stride))
  heads, wide = (max(gpu_call.ceil_pow2(n), gpu_call.SMALLEST) for n in (I, J))
  iq_BTIJ = tiles.pad(tiles.pad(iq_BTIJ, 2, heads), 3, wide)
  gate_BTI = tiles.pad(gate_BTI.astype(jnp.float32), 2, heads)
  scale = [] if pages.ik_scale_PA is None else [pages.ik_scale_PA]
  return tuple(gpu_call.call(
      functools.partial(_scores, T=T, S=S, stride=stride), (B, P),
      [iq_BTIJ, gate_BTI, page_BN, length_B, low_T, tiles.pad(pages.ik_PAJ, 2, wide), *scale],
      [gpu_call.int32(B * new, index.buffer_width(P * S)), gpu_call.int32(B * new, P)], warps=4, stages=2))


def _scores(iq_ref, gate_ref, page_ref, length_ref, low_ref, ik_ref, *refs, T, S, stride):
  *scale_ref, key_out, number_out = refs
  b, n = pl.program_id(0), pl.program_id(1)
  new, (pages, A), N = iq_ref.shape[1], ik_ref.shape[:2], page_ref.shape[1]
  length = length_ref[b]
  for t in range(new):
    number_out[b * new + t, n] = 0

  @pl.when(n * S * stride < length)
  def _():
    place_S = (n * S + jnp.arange(S, dtype=jnp.int32)) * stride
    written_S = place_S < length
    page_S = triton.load(page_ref.at[b, jnp.minimum(place_S // A, N - 1)], mask=written_S, other=0)
    page_S, slot_S = jnp.clip(page_S, 0, pages - 1), place_S % A
    ik_SJ = ik_ref[page_S, slot_S]
    if scale_ref:
      ik_SJ = (ik_SJ.astype(jnp.float32) * scale_ref[0][page_S, slot_S][:, None]).astype(iq_ref.dtype)
    for t in range(new):
      z_IS = gpu_call.dot(iq_ref[b, t], ik_SJ.T)
      score_S = (jnp.maximum(z_IS, 0) * gate_ref[b, t][:, None]).sum(0)
      order = length - new + t                     # of what is padding, or of a sequence of fewer tokens: negative
      seen_S = (place_S <= order) & written_S & (t >= new - T)
      key_S = jnp.where(seen_S, search.key(jnp.where(score_S == 0, 0.0, score_S)), index.MASKED)
      key_out[b * new + t, pl.ds(n * S, S)] = key_S
      number_out[b * new + t, n] = index.count(key_S >= low_ref[b * new + t])
