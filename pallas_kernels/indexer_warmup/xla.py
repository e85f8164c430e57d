"""The warm-up loss of the indexer without the T x S matrix: attention probabilities and scores tile by tile.

Given lse, one pass over the key tiles a query meets collects the KL and the log-sum-exp of the scores; the backward
pass goes over the same tiles once more. Rows of few tokens are one tile.

B batch, T query time, S key time, G KV heads, N stacked queries (pallas_kernels/tiles.py), K head dim, I indexer
heads, J indexer head dim, Q query tiles, P key tiles.
"""
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tiles
from pallas_kernels.dense_attention.xla import cut_queries, cut_row, is_small, key_tile, mask_bias, masks_first
from pallas_kernels.index_select.xla import products, score
from pallas_kernels.indexer_warmup.gradient import Passes, Row, warm
from pallas_kernels.mask import NEG_INF


def run(one, in_tiles, scale, rows: Row, *saved):
  """A pass over all rows, each in one tile or in tiles."""
  (_, G, N, _), (B, T), S = rows.q_GNK.shape, rows.q_order_T.shape, rows.k_order_S.shape[1]
  small = is_small(T, S)
  loop = not small or G * N * S >= tiles.MANY
  if not small:
    return tiles.over_rows(functools.partial(in_tiles, scale), (rows, *saved), loop)
  bias = lambda row: mask_bias(row.q_segment_T, row.k_segment_S, row.q_order_T, row.k_order_S, causal=True)
  if masks_first(B, T, S):
    return tiles.over_rows(functools.partial(one, scale), (rows, bias(rows), *saved), loop)
  return tiles.over_rows(lambda row, *saved: one(scale, row, bias(row), *saved), (rows, *saved), loop)


def forward_one(scale, row: Row, bias_TS):
  """(kl_T, lse_T of the scores) of a row in one tile."""
  p_TS, z_ITS = target_one(scale, row, bias_TS)
  return kl_one(score(z_ITS, row.gate_TI), p_TS, bias_TS == 0)


def backward_one(scale, row: Row, bias_TS, lse_T, dkl_T):
  p_TS, z_ITS = target_one(scale, row, bias_TS)
  return kl_gradient_one(z_ITS, p_TS, bias_TS, row.iq_ITJ, row.ik_SJ, row.gate_TI, lse_T, dkl_T)


def target_one(scale, row: Row, bias_TS):
  p_GNS = tiles.probabilities(row.q_GNK, row.k_GSK, row.lse_GN, bias_TS, scale)
  return head_mean(p_GNS, len(row.q_order_T)), products(row.iq_ITJ, row.ik_SJ)


def cut_index(row: Row, block: int):
  """Index queries and gates in query tiles [Q, I, T, J], [Q, T, I], index keys in key tiles [P, S, J]."""
  iq_QITJ = tiles.cut(tiles.pad(row.iq_ITJ, 1, block), 1, block)
  gate_QTI = tiles.cut(tiles.pad(row.gate_TI, 0, block), 0, block)
  return iq_QITJ, gate_QTI, tiles.cut(tiles.pad(row.ik_SJ, 0, key_tile()), 0, key_tile())


def cut_all(row: Row):
  """(query tile size, [arrays of the query tiles], key tiles, target of a tile pair)."""
  block, (k_PGSK, _), mask, (tile_QP, _, count_Q) = cut_row(
      row.q_GNK, row.k_GSK, row.k_GSK, row.q_segment_T, row.k_segment_S, row.q_order_T, row.k_order_S, True, key_tile())
  iq_QITJ, gate_QTI, ik_PSJ = cut_index(row, block)
  T = len(row.q_order_T)
  queries = (jnp.arange(len(tile_QP)), tile_QP, count_Q, cut_queries(row.q_GNK, T, block),
             cut_queries(row.lse_GN, T, block), iq_QITJ, gate_QTI)
  return block, queries, k_PGSK, ik_PSJ, mask


def forward_tiles(scale, row: Row):
  T = len(row.q_order_T)
  block, queries, k_PGSK, ik_PSJ, mask = cut_all(row)

  def one(query):
    i, tile_P, count, q_GNK, lse_GN, iq_ITJ, gate_TI = query

    def step(n, state):
      p = tile_P[n]
      mask_TS = mask(i, p)
      p_TS = head_mean(tiles.probabilities(q_GNK, k_PGSK[p], lse_GN, tiles.bias(mask_TS), scale), block)
      return kl_add(state, score(products(iq_ITJ, ik_PSJ[p]), gate_TI), p_TS, mask_TS)

    return kl_end(jax.lax.fori_loop(0, count, step, kl_start(block)))

  kl_QT, lse_QT = jax.lax.map(one, queries)
  return kl_QT.reshape(-1)[:T], lse_QT.reshape(-1)[:T]


def backward_tiles(scale, row: Row, lse_T, dkl_T):
  T, S = len(row.q_order_T), len(row.k_order_S)
  block, queries, k_PGSK, ik_PSJ, mask = cut_all(row)
  rows_T = [tiles.cut(tiles.pad(x, 0, block), 0, block) for x in (lse_T, dkl_T)]

  def one(dik_PSJ, query):
    i, tile_P, count, q_GNK, lse_GN, iq_ITJ, gate_TI, index_lse_T, dkl_T = query

    def step(n, carry):
      diq_ITJ, dgate_TI, dik_PSJ = carry
      p = tile_P[n]
      bias_TS = tiles.bias(mask(i, p))
      p_TS = head_mean(tiles.probabilities(q_GNK, k_PGSK[p], lse_GN, bias_TS, scale), block)
      diq, dik, dgate = kl_gradient_one(products(iq_ITJ, ik_PSJ[p]), p_TS, bias_TS, iq_ITJ, ik_PSJ[p], gate_TI,
                                        index_lse_T, dkl_T)
      return diq_ITJ + diq, dgate_TI + dgate, dik_PSJ.at[p].add(dik)

    diq_ITJ, dgate_TI, dik_PSJ = jax.lax.fori_loop(
        0, count, step, (jnp.zeros(iq_ITJ.shape), jnp.zeros(gate_TI.shape), dik_PSJ))
    return dik_PSJ, (diq_ITJ, dgate_TI)

  dik_PSJ, (diq_QITJ, dgate_QTI) = jax.lax.scan(one, jnp.zeros(ik_PSJ.shape), (*queries, *rows_T))
  return tiles.join(diq_QITJ, 1)[:, :T], tiles.join(dik_PSJ, 0)[:S], tiles.join(dgate_QTI, 0)[:T]


PASSES = Passes(functools.partial(run, forward_one, forward_tiles),
                functools.partial(run, backward_one, backward_tiles))


def indexer_warmup(*arrays, scale) -> jax.Array:
  return warm(PASSES, *arrays, scale=scale)


def head_mean(p_GNS, T: int) -> jax.Array:
  """Attention probabilities averaged over all heads, [T, S]."""
  G, N, S = p_GNS.shape
  return p_GNS.reshape(G * N // T, T, S).mean(0)


def kl_start(T: int):
  """Running (maximum, sum of exp) of the scores, sum of p * (log p - score), sum of p: columns [T, 1]."""
  return jnp.full((T, 1), NEG_INF), jnp.zeros((T, 1)), jnp.zeros((T, 1)), jnp.zeros((T, 1))


def kl_add(state, score_TS, p_TS, mask_TS):
  m_T1, l_T1, part_T1, mass_T1 = state
  total = lambda x_TS: x_TS.sum(-1, keepdims=True)
  x_TS = jnp.where(mask_TS, score_TS, NEG_INF)
  new_T1 = jnp.maximum(m_T1, x_TS.max(-1, keepdims=True))
  l_T1 = l_T1 * jnp.exp(m_T1 - new_T1) + total(jnp.where(mask_TS, jnp.exp(x_TS - new_T1), 0))
  log_p_TS = jnp.log(jnp.where(p_TS > 0, p_TS, 1))
  return new_T1, l_T1, part_T1 + total(p_TS * jnp.where(mask_TS, log_p_TS - score_TS, 0)), mass_T1 + total(p_TS)


def kl_end(state):
  """(kl_T, lse_T of the scores)."""
  m_T, l_T, part_T, mass_T = (x_T1[:, 0] for x_T1 in state)
  lse_T = m_T + jnp.log(jnp.maximum(l_T, 1e-30))
  return part_T + mass_T * lse_T, lse_T


def kl_one(score_TS, p_TS, mask_TS):
  """KL(p || softmax of the scores under the mask) of rows in one tile: (kl_T, lse_T of the scores)."""
  return kl_end(kl_add(kl_start(len(p_TS)), score_TS, p_TS, mask_TS))


def kl_gradient_one(z_ITS, p_TS, bias_TS, iq_ITJ, ik_SJ, gate_TI, lse_T, dkl_T):
  """Gradients (diq_ITJ, dik_SJ, dgate_TI) of sum(dkl * KL), float32, from one tile.

  That of a score is (softmax(score) - p) * dkl; lse is that of the scores over all keys, bias that of `tiles.bias`.
  """
  safe_T = jnp.where(lse_T > NEG_INF, lse_T, 0)         # of a query that sees nothing
  x_TS = score(z_ITS, gate_TI) - safe_T[:, None] + bias_TS
  dscore_TS = (jnp.exp(x_TS) - p_TS) * dkl_T[:, None]
  I, T, J = iq_ITJ.shape
  dgate_TI = (jax.nn.relu(z_ITS) * dscore_TS).sum(-1).T
  dz_ITS = jnp.where(z_ITS > 0, dscore_TS * gate_TI.T.astype(jnp.float32)[:, :, None], 0)
  diq_ITJ = tiles.dot('ITS,SJ->ITJ', dz_ITS, ik_SJ)
  return diq_ITJ, tiles.dot('NS,NJ->SJ', dz_ITS.reshape(I * T, -1), iq_ITJ.reshape(I * T, J)), dgate_TI
