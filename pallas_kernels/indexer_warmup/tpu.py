"""The indexer's loss on a TPU under any mask, and the warm-up loss by it: a scan over blocks of queries, each a kernel
over the key tiles that the block meets, which forms attention's probabilities and the scores of a tile and keeps
neither.

T query time, S key time (of a tile where a P is in front), G KV heads, N stacked queries R * T
(pallas_kernels/tiles.py), R query heads of a KV head, K head dim, I indexer heads, J indexer head dim, P key tiles, Q
blocks of queries. Kernels see the rows of one block, and of per-query numbers columns (..., 1); index queries are
stacked too, N of iq_NJ being I * T.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tiles, tpu_call
from pallas_kernels.dense_attention.tpu import VMEM, Mask, cut, head_sum, places, probabilities, sizes
from pallas_kernels.dense_attention.xla import cut_queries
from pallas_kernels.index_select.xla import score, stacked_products
from pallas_kernels.indexer_warmup.gradient import Row, by_row, warm
from pallas_kernels.indexer_warmup.xla import kl_add, kl_end, kl_start
from pallas_kernels.mask import NEG_INF
from pallas_kernels.tpu_call import float32, tiled, whole


def loss(scale: float, mask: Mask, q_GNK, lse_GN1, iq_NJ, gate_TI, k_PGSK, ik_PSJ):
  """(kl_T, log-sum-exp of the scores under the mask [T]) of a block of queries."""
  queries, keys, state = [q_GNK, lse_GN1, iq_NJ, gate_TI], [k_PGSK, ik_PSJ], float32(4, len(gate_TI), 1)
  state, = tpu_call.call(
      functools.partial(_loss, read=mask.read, scale=scale), (mask.steps,), [mask.tile_P],
      [*queries, *keys, *mask.arrays], [*map(whole, queries), *map(tiled, keys), *mask.specs],
      [(state, whole(state))], [], parallel=(False,), vmem=VMEM)
  return kl_end(state)


def _loss(tile_ref, q_ref, lse_ref, iq_ref, gate_ref, k_ref, ik_ref, *refs, read, scale):
  *mask_refs, state_ref = refs

  @pl.when(pl.program_id(0) == 0)
  def _():
    for i, x_T1 in enumerate(kl_start(len(gate_ref))):
      state_ref[i] = x_T1

  mask_TS = read(*mask_refs)
  p_TS = head_mean(scale, mask_TS, q_ref, lse_ref, k_ref)
  z_ITS = stacked_products(iq_ref[...], ik_ref[0]).reshape(-1, *mask_TS.shape)
  state = kl_add([state_ref[i] for i in range(4)], score(z_ITS, gate_ref[...]), p_TS, mask_TS)
  for i, x_T1 in enumerate(state):
    state_ref[i] = x_T1


def head_mean(scale: float, mask_TS, q_ref, lse_ref, k_ref) -> jax.Array:
  """Attention probabilities averaged over all heads, [T, S]."""
  (G, N, _), T = q_ref.shape, len(mask_TS)
  p_TS = sum(head_sum(probabilities(q_ref[g], k_ref[0, g], lse_ref[g], mask_TS, scale), T) for g in range(G))
  return p_TS * (T / (G * N))


def gradients(scale: float, mask: Mask, q_GNK, lse_GN1, iq_NJ, gate_TI, index_lse_T1, dkl_T1, k_PGSK, ik_PSJ,
              dik_PSJ):
  """(dik_PSJ with the block's part added, (diq_NJ, dgate_TI)), float32."""
  queries, keys = [q_GNK, lse_GN1, iq_NJ, gate_TI, index_lse_T1, dkl_T1], [k_PGSK, ik_PSJ, dik_PSJ]
  own = [float32(*x.shape) for x in (iq_NJ, gate_TI)]
  *dqueries, dik_PSJ = tpu_call.call(
      functools.partial(_gradients, read=mask.read, scale=scale), (mask.steps,), [mask.tile_P],
      [*queries, *keys, *mask.arrays], [*map(whole, queries), *map(tiled, keys), *mask.specs],
      [*((x, whole(x)) for x in own), (float32(*dik_PSJ.shape), tiled(dik_PSJ))], [], parallel=(False,), vmem=VMEM,
      aliases={len(queries) + 2: len(own)})
  return dik_PSJ, tuple(dqueries)


def _gradients(tile_ref, q_ref, lse_ref, iq_ref, gate_ref, index_lse_ref, dkl_ref, k_ref, ik_ref, dik_before_ref,
               *refs, read, scale):
  *mask_refs, diq_ref, dgate_ref, dik_ref = refs

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in (diq_ref, dgate_ref):
      ref[...] = jnp.zeros_like(ref)

  mask_TS = read(*mask_refs)
  dik_ref[...] = dik_before_ref[...]
  add_index_gradients(head_mean(scale, mask_TS, q_ref, lse_ref, k_ref), mask_TS,
                      (iq_ref, gate_ref, index_lse_ref, dkl_ref), ik_ref, (diq_ref, dgate_ref, dik_ref))


def add_index_gradients(p_TS, mask_TS, queries, ik_ref, out) -> None:
  """Adds the gradients of sum(dkl * KL): that of a score is (softmax(score) - p) * dkl.

  References: queries iq, gate, log-sum-exp of the scores, dkl; out diq, dgate, dik.
  """
  (iq_ref, gate_ref, index_lse_ref, dkl_ref), (diq_ref, dgate_ref, dik_ref) = queries, out
  T, S = mask_TS.shape
  gate_TI = gate_ref[...].astype(jnp.float32)
  z_ITS = stacked_products(iq_ref[...], ik_ref[0]).reshape(-1, T, S)
  x_TS = jnp.where(mask_TS, score(z_ITS, gate_TI) - index_lse_ref[...], NEG_INF)
  dscore_TS = (jnp.exp(x_TS) - p_TS) * dkl_ref[...]
  for i, z_TS in enumerate(z_ITS):
    head = pl.ds(i * T, T)
    dgate_ref[:, i:i + 1] += (jax.nn.relu(z_TS) * dscore_TS).sum(1, keepdims=True)
    dz_TS = jnp.where(z_TS > 0, dscore_TS * gate_TI[:, i:i + 1], 0)
    diq_ref[head] += tiles.dot('TS,SJ->TJ', dz_TS, ik_ref[0])
    dik_ref[0] += tiles.dot('TS,TJ->SJ', dz_TS, iq_ref[head])


def cut_row(row: Row):
  """(queries of a block, who meets whom, queries of all blocks, key tiles)."""
  T = len(row.q_order_T)
  size, keys = sizes(row.q_GNK, T)
  met = places(size, keys, row.q_segment_T, row.k_segment_S, row.q_order_T, row.k_order_S, causal=True)
  iq_QITJ = cut(row.iq_ITJ, 1, size)
  queries = (cut_queries(row.q_GNK, T, size), cut_queries(row.lse_GN[..., None], T, size),
             iq_QITJ.reshape(len(iq_QITJ), -1, iq_QITJ.shape[-1]), cut(row.gate_TI, 0, size))
  return size, met, queries, (cut(row.k_GSK, 1, keys), cut(row.ik_SJ, 0, keys))


def forward_row(scale, row: Row):
  """(kl_T, log-sum-exp of the scores [T]) of a row."""
  T = len(row.q_order_T)
  _, met, queries, keys = cut_row(row)
  one = lambda inputs: loss(scale, met.mask(inputs[1], causal=True), *inputs[0], *keys)
  return jax.tree.map(lambda x_QT: x_QT.reshape(-1)[:T], jax.lax.map(one, (queries, met.queries)))


def backward_row(scale, row: Row, index_lse_T, dkl_T):
  """Gradients (diq_ITJ, dik_SJ, dgate_TI) of a row, float32."""
  (I, T, J), S = row.iq_ITJ.shape, len(row.k_order_S)
  size, met, queries, keys = cut_row(row)
  columns = [cut(x, 0, size)[..., None] for x in (index_lse_T, dkl_T)]

  def one(dik_PSJ, inputs):
    queries, of_block = inputs
    return gradients(scale, met.mask(of_block, causal=True), *queries, *keys, dik_PSJ)

  dik, (diq_QNJ, dgate) = jax.lax.scan(one, jnp.zeros(keys[1].shape), ((*queries, *columns), met.queries))
  diq = tiles.join(diq_QNJ.reshape(-1, I, size, J), 1)[:, :T]
  return diq, tiles.join(dik, 0)[:S], tiles.join(dgate, 0)[:T]


indexer_warmup = functools.partial(warm, by_row(forward_row, backward_row))
