"""Sparse attention on a TPU: a scan over chunks of queries, each a few kernels over the key tiles that it selected.

In a chunk the kernel of index_select finds the threshold and gives the selection as words of bits. Attention, the
indexer's loss and the backward pass then go over the key tiles that hold a selected key, and take the mask from the
words. Keys are read as whole tiles and not gathered one by one: at 262,144 tokens the rows of all tiles would be some
1e8 copies of 2 KB a layer, and a TensorCore issues each of them, while a masked tile keeps the matrix unit busy and
serves every length and any layout with the same results. So what is saved over dense attention is the tiles in which
nobody of a chunk selected a key, many when picks lie together, few when they are scattered.

The backward pass is one kernel a chunk: dq stays in VMEM over the tiles, and each key tile is visited once, so that
its gradients are added to the float32 carry in place, in a fixed order.

T query time, S key time (of a tile where a P is in front), G KV heads, N stacked queries R * T
(pallas_kernels/tiles.py), R query heads of a KV head, K head dim, I indexer heads, J indexer head dim, M groups of a
chunk, P key tiles. Kernels see the rows of one chunk, and of per-query numbers columns (..., 1).
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tiles, tpu_call
from pallas_kernels.dense_attention.tpu import VMEM, Mask, add_gradients, attention
from pallas_kernels.dense_attention.xla import cut_queries, join_queries
from pallas_kernels.dsa_attention import chunks
from pallas_kernels.dsa_attention.gradient import Passes, attend
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.dsa_attention.row import Options, Row
from pallas_kernels.index_select import tpu as index
from pallas_kernels.index_select.selection import Selection
from pallas_kernels.indexer_warmup.tpu import add_index_gradients, loss
from pallas_kernels.tpu_call import float32, tiled, whole


def dsa_attention(*arrays, **options) -> DSAOutput:
  return attend(Passes(forward, backward), *arrays, **options)


def forward(options: Options, rows: Row, selection):
  return tiles.over_rows(functools.partial(forward_row, options), (rows, selection), loop=True)


def backward(options: Options, rows: Row, *saved):
  return tiles.over_rows(functools.partial(backward_row, options), (rows, *saved), loop=True)


def plan(options: Options, row: Row, selection: Selection | None) -> chunks.Plan:
  T = len(row.q_order_T)
  group = index.group_size(T, len(row.k_order_S))
  return chunks.plan(options, row, selection, group, min(index.MANY, -(-T // group)), index.WIDE)


def select(row: chunks.Plan, chunk: chunks.Chunk, topk: int | None) -> tuple[Selection, Mask]:
  """The selection of the chunk's groups [M, T], and as the mask of attention."""
  chosen, word_MPS = index.select(chunk.group, row.keys, chunk.selection, topk)
  word_PMS = tiles.cut(word_MPS.reshape(len(word_MPS), -1), 1, tiles.KEYS)
  tile_P, count = tiles.front((word_PMS != 0).any((1, 2)))
  return chosen, Mask([], [word_PMS], functools.partial(unpack, row.size), tile_P, jnp.maximum(count, 1))


def unpack(T: int, word_ref) -> jax.Array:
  """The mask of a chunk, bool [T, S], from words of which bit t is query t of the group."""
  word_MS = word_ref[0]
  M, S = word_MS.shape
  bit = jax.lax.broadcasted_iota(jnp.int32, (T // M, S), 0)
  return jnp.concatenate([(word_MS[m:m + 1] >> bit) & 1 for m in range(M)]) > 0


def forward_row(options: Options, arrays: Row, selection: Selection | None):
  """(o_GNK, lse_GN, kl_T or None, log-sum-exp of the selected scores [T] or None, Selection) of a row."""
  row, T = plan(options, arrays, selection), len(arrays.q_order_T)
  topk = None if row.every or selection is not None else options.topk

  def one(_, chunk):
    chosen, mask = select(row, chunk, topk)
    o_GNK, lse_GN = attention(options.scale, mask, chunk.q_GNK, row.k_PGSK, row.v_PGSK)
    kl = (None, None)
    if options.want_kl:
      queries = chunk.q_GNK, lse_GN[..., None], *index_queries(chunk)
      kl = loss(options.scale, mask, *queries, row.k_PGSK, row.ik_PSJ)
    return None, (o_GNK, lse_GN, *kl, chosen)

  _, (o_CGNK, lse_CGN, kl_CT, index_lse_CT, selection) = jax.lax.scan(one, None, row.chunks)
  kl_T, index_lse_T, selection = jax.tree.map(lambda x: x.reshape(-1)[:T], (kl_CT, index_lse_CT, selection))
  return join_queries(o_CGNK, T, row.size), join_queries(lse_CGN, T, row.size), kl_T, index_lse_T, selection


def index_queries(chunk: chunks.Chunk) -> tuple[jax.Array, jax.Array]:
  """(iq_NJ, gate_TI) of a chunk."""
  iq_ITJ, gate_TI = chunks.index_queries(chunk)
  return iq_ITJ.reshape(-1, iq_ITJ.shape[2]), gate_TI


def backward_row(options: Options, arrays: Row, selection: Selection, index_lse_T, lse_GN, delta_GN, do_GNK, dkl_T):
  """Gradients (dq_GNK, dk_GSK, dv_GSK, diq_ITJ, dik_SJ, dgate_TI) of a row, float32."""
  row, T, S = plan(options, arrays, selection), len(arrays.q_order_T), len(arrays.k_order_S)
  stacked = [cut_queries(x, T, row.size) for x in (lse_GN[..., None], delta_GN[..., None], do_GNK)]
  zeros_T = jnp.zeros(T)
  cut = lambda x_T: tiles.cut(tiles.pad(x_T, 0, row.size), 0, row.size)[..., None]
  index_rows = [cut(x_T if options.want_kl else zeros_T) for x_T in (index_lse_T, dkl_T)]

  def one(carry, inputs):
    chunk, stacked, index_rows = inputs
    _, mask = select(row, chunk, None)
    return gradients(options, mask, row, chunk, stacked, index_rows, carry)

  init = tuple(jnp.zeros(x.shape) for x in (row.k_PGSK, row.v_PGSK, row.ik_PSJ))
  (dk, dv, dik), (dq, diq, dgate) = jax.lax.scan(one, init, (row.chunks, stacked, index_rows))
  return (join_queries(dq, T, row.size), tiles.join(dk, 1)[:, :S], tiles.join(dv, 1)[:, :S],
          tiles.join(diq, 1)[:, :T], tiles.join(dik, 0)[:S], tiles.join(dgate, 0)[:T])


def gradients(options: Options, mask: Mask, row: chunks.Plan, chunk: chunks.Chunk, stacked, index_rows, carry):
  """(carry (dk_PGSK, dv_PGSK, dik_PSJ) with this chunk's part added, (dq_GNK, diq_ITJ, dgate_TI))."""
  iq_NJ, gate_TI = index_queries(chunk)
  queries = [chunk.q_GNK, *stacked, iq_NJ, gate_TI, *index_rows]
  keys = [row.k_PGSK, row.v_PGSK, row.ik_PSJ, *carry]
  own = [float32(*x.shape) for x in (chunk.q_GNK, iq_NJ, gate_TI)]
  dq_GNK, diq_NJ, dgate_TI, *carry = tpu_call.call(
      functools.partial(_gradients, read=mask.read, scale=options.scale, want_kl=options.want_kl), (mask.steps,),
      [mask.tile_P], [*queries, *keys, *mask.arrays], [*map(whole, queries), *map(tiled, keys), *mask.specs],
      [*((x, whole(x)) for x in own), *((float32(*x.shape), tiled(x)) for x in carry)], [], parallel=(False,),
      vmem=VMEM, aliases={len(queries) + 3 + i: len(own) + i for i in range(3)})
  return tuple(carry), (dq_GNK, diq_NJ.reshape(-1, row.size, iq_NJ.shape[1]), dgate_TI)


def _gradients(tile_ref, q_ref, lse_ref, delta_ref, do_ref, iq_ref, gate_ref, index_lse_ref, dkl_ref, k_ref, v_ref,
               ik_ref, dk_before_ref, dv_before_ref, dik_before_ref, *refs, read, scale, want_kl):
  *mask_refs, dq_ref, diq_ref, dgate_ref, dk_ref, dv_ref, dik_ref = refs

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in (dq_ref, diq_ref, dgate_ref):
      ref[...] = jnp.zeros_like(ref)

  mask_TS = read(*mask_refs)
  p_TS = add_gradients(scale, mask_TS, (q_ref, lse_ref, delta_ref, do_ref), (k_ref, v_ref),
                       (dk_before_ref, dv_before_ref), (dq_ref, dk_ref, dv_ref))
  dik_ref[...] = dik_before_ref[...]
  if want_kl:
    add_index_gradients(p_TS * (len(mask_TS) / (q_ref.shape[0] * q_ref.shape[1])), mask_TS,
                        (iq_ref, gate_ref, index_lse_ref, dkl_ref), ik_ref, (diq_ref, dgate_ref, dik_ref))
