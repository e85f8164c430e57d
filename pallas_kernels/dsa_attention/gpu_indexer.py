"""The indexer's loss of sparse attention on a GPU, over the keys that groups of 16 neighbouring queries selected.

The target of a query is the mean of the attention probabilities of all its heads, so the loss is a pass of its own once
lse is known. The backward pass gets the probabilities from that of attention (gpu_backward.py). A list is gone over in
PARTS parts at the same time, whose sums are joined afterwards in a fixed order.

T queries of a group, S keys, G KV heads, N stacked queries R * T of a group (pallas_kernels/tiles.py), K head dim,
I indexer heads, J indexer head dim, L stacked index queries I * T of a group, heads major, M groups of a chunk, U keys
of a step, C rows of the buffer of a batch, P parts.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu_call
from pallas_kernels.dsa_attention.gpu_lists import TOGETHER, Batch, form, own_steps, places, selected
from pallas_kernels.gpu_call import LOG2E, dot, float32
from pallas_kernels.indexer_warmup.xla import kl_end
from pallas_kernels.mask import NEG_INF

PARTS = 4
ROWS = 128             # index queries that are at work together


class Queries(NamedTuple):
  """What the gradients of the indexer need of the queries of a chunk."""
  iq_MLJ: jax.Array
  gate_ML: jax.Array
  index_lse_MT: jax.Array
  dkl_MT: jax.Array


def stack(iq_MITJ, gate_MTI) -> tuple[jax.Array, jax.Array]:
  M, I, T, J = iq_MITJ.shape
  return iq_MITJ.reshape(M, I * T, J), gate_MTI.astype(jnp.float32).swapaxes(1, 2).reshape(M, I * T)


def indexer_loss(scale: float, heads: int, lists, q_MGNK, lse_MGN, iq_MITJ, gate_MTI, k_SGK,
                 ik_SJ) -> tuple[jax.Array, jax.Array]:
  """(KL(p || softmax of the scores) over the selected keys, log-sum-exp of their scores), both [M, T].

  lists: (index_MU, word_MU, count_M), the keys that a group selected, the queries that did as bits, how many keys. What
  is beyond count_M is 0, as far as the next multiple of 2 * STEP.
  """
  M, T, _ = gate_MTI.shape
  state = float32(M, PARTS, T)
  step, stages = form(k_SGK.dtype)
  step = 2 * step                    # the queries of all heads are read again for each
  parts = gpu_call.call(
      functools.partial(_loss, scale=scale, heads=heads, T=T, step=step), (M, PARTS),
      [*lists, q_MGNK, lse_MGN, *stack(iq_MITJ, gate_MTI), k_SGK, ik_SJ], [state] * 4, warps=8, stages=min(stages, 3))
  m_MPT, l_MPT, part_MPT, mass_MPT = parts
  m_MT = m_MPT.max(1)
  l_MT = (l_MPT * jnp.exp(m_MPT - m_MT[:, None])).sum(1)
  kl, lse = kl_end([x.reshape(-1, 1) for x in (m_MT, l_MT, part_MPT.sum(1), mass_MPT.sum(1))])
  return kl.reshape(M, T), lse.reshape(M, T)


def own_part(begin, end):
  """The steps of this part of those from `begin` to `end`."""
  steps, p, P = end - begin, pl.program_id(1), pl.num_programs(1)
  return begin + steps * p // P, begin + steps * (p + 1) // P


def head_sum(x_UN, T: int) -> jax.Array:
  U, N = x_UN.shape
  return x_UN.reshape(U, N // T, T).sum(1)


def blocks_of(L: int, most: int, T: int) -> list[pl.Slice]:
  """Stacked index queries in blocks of `most`, but of whole heads."""
  size = min(L, max(most, T))
  return [pl.ds(l, size) for l in range(0, L, size)]


def scores(z_UL, gate_L, T: int) -> jax.Array:
  score_UT = head_sum(jnp.maximum(z_UL, 0) * gate_L[None], T)
  return jnp.where(score_UT == 0, 0.0, score_UT)


def _loss(index_ref, word_ref, count_ref, q_ref, lse_ref, iq_ref, gate_ref, k_ref, ik_ref, m_out, l_out, part_out,
          mass_out, *, scale, heads, T, step):
  m, part = pl.program_id(0), pl.program_id(1)
  G = q_ref.shape[1]
  bit_T, L = jnp.arange(T, dtype=jnp.int32), iq_ref.shape[1]
  queries = [(b, iq_ref[m, b]) for b in blocks_of(L, ROWS // 2, T)]

  def one(i, state):
    m_T, l_T, part_T, mass_T = state
    here = pl.ds(i * step, step)
    index_U = index_ref[m, here]
    on_UT = selected(bit_T, word_ref[m, here]).T

    def add(g, p_UT):
      x_UN = dot(k_ref[index_U, g], q_ref[m, g].T) * (scale * LOG2E)
      return p_UT + head_sum(jnp.exp2(x_UN - lse_ref[m, g][None] * LOG2E), T)

    p_UT = jax.lax.fori_loop(0, G, add, jnp.zeros((step, T), jnp.float32))
    p_UT = jnp.where(on_UT, p_UT / heads, 0)
    ik_UJ = ik_ref[index_U]
    score_UT = sum(scores(dot(ik_UJ, iq_LJ.T), gate_ref[m, b], T) for b, iq_LJ in queries)
    x_UT = jnp.where(on_UT, score_UT, NEG_INF)
    new_T = jnp.maximum(m_T, x_UT.max(0))
    l_T = l_T * jnp.exp(m_T - new_T) + jnp.where(on_UT, jnp.exp(x_UT - new_T[None]), 0).sum(0)
    cross_UT = jnp.where(p_UT > 0, p_UT * (jnp.log(jnp.where(p_UT > 0, p_UT, 1)) - score_UT), 0)
    return new_T, l_T, part_T + cross_UT.sum(0), mass_T + p_UT.sum(0)

  zeros_T = jnp.zeros(T, jnp.float32)
  init = jnp.full(T, NEG_INF, jnp.float32), zeros_T, zeros_T, zeros_T
  state = jax.lax.fori_loop(*own_part(0, pl.cdiv(count_ref[m], step)), one, init)
  for out, x_T in zip((m_out, l_out, part_out, mass_out), state):
    out[m, part] = x_T


def zeros(queries: Queries) -> jax.Array:
  """Sums [M, P, L, J] of the parts to begin with."""
  M, L, J = queries.iq_MLJ.shape
  return jnp.zeros((M, PARTS, L, J))


def of_queries(sum_MPLJ: jax.Array, queries: Queries, T: int) -> tuple[jax.Array, jax.Array]:
  """(diq_MITJ, dgate_MTI) from the sums of the parts.

  A sum is that of dscore * ik over the keys with iq . ik > 0, dscore being the gradient of a score: times the gate it
  is diq, and its product with iq is dgate, as relu(iq . ik) is iq . ik on those keys.
  """
  sum_MLJ = sum_MPLJ.sum(1)
  M, L, J = sum_MLJ.shape
  dgate_ML = (sum_MLJ * queries.iq_MLJ.astype(jnp.float32)).sum(2)
  diq_MLJ = sum_MLJ * queries.gate_ML[..., None]
  return diq_MLJ.reshape(M, L // T, T, J), dgate_ML.reshape(M, L // T, T).swapaxes(1, 2)


def gradients(heads: int, lists, span: Batch, queries: Queries, p_GTC, ik_SJ, sum_MPLJ):
  """(sums with those of a batch added, what its entries give to dik [C + TOGETHER, J] in the order of its buffer).

  p: attention probabilities summed over the heads of a KV head, in the order of the line of lists; there are `heads`
  of all. The gradient of a score is (softmax of the scores - p) * dkl.
  """
  iq_MLJ, gate_ML, *rows = queries
  step, stages = form(ik_SJ.dtype)
  gated_MLJ = (iq_MLJ * gate_ML[..., None]).astype(iq_MLJ.dtype)
  arrays = [*lists, *span[:-1], iq_MLJ, gated_MLJ, gate_ML, *rows, p_GTC, ik_SJ, sum_MPLJ]
  return gpu_call.call(
      functools.partial(_gradients, heads=heads, step=step), (len(iq_MLJ), PARTS), arrays,
      [float32(*sum_MPLJ.shape), float32(p_GTC.shape[2] + TOGETHER, ik_SJ.shape[1])], warps=8, stages=stages,
      aliases={len(arrays) - 1: 0})


def _gradients(index_ref, word_ref, count_ref, first_ref, start_ref, before_ref, offset_ref, iq_ref, gated_ref,
               gate_ref, index_lse_ref, dkl_ref, p_ref, ik_ref, sum_before_ref, sum_out, dik_out, *, heads, step):
  m, part = pl.program_id(0), pl.program_id(1)
  G, T, room = p_ref.shape
  _, L, J = iq_ref.shape
  blocks = blocks_of(L, ROWS, T)
  size = blocks[0].size
  line, count = start_ref[m] - first_ref[0], count_ref[m]
  begin, end = own_part(*own_steps(first_ref[0], room, start_ref[m], count, step))

  @pl.when(begin < end)
  def _():
    bit_T, index_lse_T, dkl_T = jnp.arange(T, dtype=jnp.int32), index_lse_ref[m], dkl_ref[m]
    queries = [(iq_ref[m, b], gated_ref[m, b]) for b in blocks]

    def one(i, sums):
      here = pl.ds(i * step, step)
      index_U = index_ref[m, here]
      place_U = places(index_U, i, m, count, offset_ref, before_ref, room)
      ik_UJ, on_UT = ik_ref[index_U], selected(bit_T, word_ref[m, here]).T
      score_UT = sum(scores(dot(ik_UJ, iq_LJ.T), gate_ref[m, b], T) for b, (iq_LJ, _) in zip(blocks, queries))
      p_TU = sum(p_ref[g, :, pl.ds(line + i * step, step)] for g in range(G)) / heads
      x_UT = jnp.where(on_UT, score_UT - index_lse_T[None], NEG_INF)
      dscore_UT = jnp.where(on_UT, jnp.exp(x_UT) - p_TU.T, 0) * dkl_T[None]
      dscore_TU = dscore_UT.astype(ik_UJ.dtype).T
      dscore_LU = jnp.broadcast_to(dscore_TU[None], (size // T, T, step)).reshape(size, step)
      dik_JU, new = jnp.zeros((J, step), jnp.float32), []
      for (iq_LJ, gated_LJ), sum_LJ in zip(queries, sums):
        above_LU = jnp.where(dot(iq_LJ, ik_UJ.T) > 0, dscore_LU, 0)
        dik_JU += dot(gated_LJ.T, above_LU)
        new.append(sum_LJ + dot(above_LU, ik_UJ))
      dik_out[place_U] = dik_JU.T
      return tuple(new)

    sums = jax.lax.fori_loop(begin, end, one, tuple(jnp.zeros((size, J), jnp.float32) for _ in blocks))
    for b, sum_LJ in zip(blocks, sums):
      sum_out[m, part, b] = sum_before_ref[m, part, b] + sum_LJ
