"""The backward pass of sparse attention on a GPU, over the keys that groups of 16 neighbouring queries selected.

One kernel goes over the list of a group, gathers keys a step at a time and keeps dq in registers. What a group gives to
dk and dv of a key can not be added to them there, since groups run at the same time and the order of atomic additions
is not fixed. It goes into a buffer, one row for each entry of a list, sorted by key and then by group (gpu_lists.py); a
second kernel adds the rows of a key, in that order, to the float32 carry, and touches no other key. The buffer has room
for a few lists, so a chunk goes through it in batches, which may end within a list. Its rows have the dtype of the
keys: a sum over 16 queries and their heads is rounded once, while to write and read twice the bytes would take longer
than the products.

T queries of a group, S keys, G KV heads, N stacked queries R * T of a group (pallas_kernels/tiles.py), R query heads of
a KV head, K head dim, I indexer heads, J indexer head dim, M groups of a chunk, U room for the keys of a group (in a
kernel: keys of a step), C rows of the buffer.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpu_call
from pallas_kernels.dsa_attention import gpu_indexer, gpu_lists
from pallas_kernels.dsa_attention.gpu_lists import STEP, TOGETHER, form, own_steps, places, selected
from pallas_kernels.gpu_call import LOG2E, dot, float32

FOLD = 64              # rows of the product that sums over heads, the fewest that a warp group multiplies
BUFFER = 2**30         # bytes: at 4 KV heads of 128 in bfloat16 those of 64 lists of 8192 keys


def gradients(scale: float, heads: int, want_kl: bool, lists, q_MGNK, do_MGNK, lse_MGN, delta_MGN, iq_MITJ, gate_MTI,
              index_lse_MT, dkl_MT, k_SGK, v_SGK, ik_SJ, carry):
  """(carry (dk_SGK, dv_SGK, dik_SJ) with this chunk's part added, (dq_MGNK, diq_MITJ, dgate_MTI)), float32.

  lists: (index_MU, word_MU, count_M), the keys that a group selected, the queries that did as bits, how many keys; U is
  a multiple of STEP, and what is beyond count_M is 0. Without want_kl the gradients of the indexer are 0.
  """
  index_MU, _, count_M = lists
  (M, G, N, K), S, T = q_MGNK.shape, len(k_SGK), gate_MTI.shape[1]
  room = min(max(BUFFER // (2 * G * K * k_SGK.dtype.itemsize) // STEP, 1) * STEP, index_MU.size)
  row = jax.ShapeDtypeStruct((room + TOGETHER, G, K), k_SGK.dtype)
  step, stages = form(k_SGK.dtype)
  inverse = gpu_lists.invert(index_MU, count_M, S)
  queries = gpu_indexer.Queries(*gpu_indexer.stack(iq_MITJ, gate_MTI), index_lse_MT, dkl_MT)
  fold_FN = (jnp.arange(FOLD)[:, None] == jnp.arange(N) % T).astype(q_MGNK.dtype)

  def one(state):
    first, dq_MGNK, sums, dkeys = *state[:3], list(state[3])
    span = gpu_lists.batch(inverse, first, room)
    arrays = [*lists, *span[:-1], q_MGNK, do_MGNK, lse_MGN, delta_MGN, k_SGK, v_SGK, fold_FN, dq_MGNK]
    dq_MGNK, dk_CGK, dv_CGK, p_GTC = gpu_call.call(
        functools.partial(_gradients, scale=scale, T=T, want_kl=want_kl, step=step), (M, G), arrays,
        [float32(M, G, N, K), row, row, float32(G, T, room)], warps=8, stages=stages, aliases={len(arrays) - 1: 0})
    dkeys[:2] = add(span, [dk_CGK, dv_CGK], dkeys[:2])
    if want_kl:
      sums, dik_CJ = gpu_indexer.gradients(heads, lists, span, queries, p_GTC, ik_SJ, sums)
      dkeys[2:] = add(span, [dik_CJ[:, None]], dkeys[2:])
    return first + room, dq_MGNK, sums, dkeys

  start = jnp.int32(0), jnp.zeros((M, G, N, K)), gpu_indexer.zeros(queries), [*carry[:2], carry[2][:, None]]
  _, dq_MGNK, sums, dkeys = jax.lax.while_loop(lambda state: state[0] < inverse.length, one, start)
  return (*dkeys[:2], dkeys[2][:, 0]), (dq_MGNK, *gpu_indexer.of_queries(sums, queries, T))


def _gradients(index_ref, word_ref, count_ref, first_ref, start_ref, before_ref, offset_ref, q_ref, do_ref, lse_ref,
               delta_ref, k_ref, v_ref, fold_ref, dq_before_ref, dq_out, dk_out, dv_out, p_out, *, scale, T, want_kl,
               step):
  m, g = pl.program_id(0), pl.program_id(1)
  line, count, room = start_ref[m] - first_ref[0], count_ref[m], p_out.shape[2]
  begin, end = own_steps(first_ref[0], room, start_ref[m], count, step)

  @pl.when(begin < end)
  def _():
    q_NK, do_NK, lse_N1, delta_N1 = q_ref[m, g], do_ref[m, g], lse_ref[m, g][:, None], delta_ref[m, g][:, None]
    bit_N = jnp.arange(len(q_NK), dtype=jnp.int32) % T
    row_F1 = jnp.arange(FOLD, dtype=jnp.int32)[:, None]
    fold_FN = fold_ref[...]

    def places_of(i):
      return places(index_ref[m, pl.ds(i * step, step)], i, m, count, offset_ref, before_ref, room)

    def one(i, state):
      dq_NK, place_U = state
      next_U = places_of(jnp.minimum(i + 1, end - 1))
      here = pl.ds(i * step, step)
      index_U = index_ref[m, here]
      on_NU = selected(bit_N, word_ref[m, here])
      k_UK, v_UK = k_ref[index_U, g], v_ref[index_U, g]
      x_NU = dot(q_NK, k_UK.T) * (scale * LOG2E)
      p_NU = jnp.where(on_NU, jnp.exp2(x_NU - lse_N1 * LOG2E), 0)
      few_NU = p_NU.astype(v_UK.dtype)
      dv_out[place_U, g] = dot(do_NK.T, few_NU).astype(dv_out.dtype).T
      if want_kl:
        line_1U = line + i * step + jnp.arange(step, dtype=jnp.int32)[None]
        gpu_call.store(p_out, (g, row_F1, line_1U), dot(fold_FN, few_NU), row_F1 < T)
      dx_NU = (p_NU * (dot(do_NK, v_UK.T) - delta_N1)).astype(k_UK.dtype)
      dk_out[place_U, g] = (dot(q_NK.T, dx_NU) * scale).astype(dk_out.dtype).T
      return dq_NK + dot(dx_NU, k_UK), next_U

    dq_NK, _ = jax.lax.fori_loop(begin, end, one, (jnp.zeros(q_NK.shape, jnp.float32), places_of(begin)))
    dq_out[m, g] = dq_before_ref[m, g] + dq_NK * scale


def add(span: gpu_lists.Batch, rows_CGK, sums_SGK) -> list[jax.Array]:
  """Sums with the rows of a batch added, for each of some buffers."""
  n = len(rows_CGK)
  return gpu_call.call(_add, (len(sums_SGK[0]),), [span.offset_S, span.total_S, *rows_CGK, *sums_SGK],
                       [float32(*x.shape) for x in sums_SGK], warps=1, stages=1,
                       aliases={2 + n + i: i for i in range(n)})


def _add(offset_ref, total_ref, *refs):
  """Adds the rows of a key: refs are buffers, sums before and, the same memory, sums."""
  s, n = pl.program_id(0), len(refs) // 3
  offset, total = offset_ref[s], total_ref[s]
  parts = [(i, g) for i in range(n) for g in range(refs[i].shape[1])]

  @pl.when(total > 0)
  def _():
    def one(c, sums):
      here = c * TOGETHER + jnp.arange(TOGETHER, dtype=jnp.int32)
      rows = [refs[i][pl.ds(offset + c * TOGETHER, TOGETHER), g].astype(jnp.float32) for i, g in parts]
      return tuple(x + jnp.where((here < total)[:, None], row, 0).sum(0) for x, row in zip(sums, rows))

    sums = jax.lax.fori_loop(0, pl.cdiv(total, TOGETHER), one, tuple(refs[n + i][s, g] for i, g in parts))
    for x, (i, g) in zip(sums, parts):
      refs[2 * n + i][s, g] = x
