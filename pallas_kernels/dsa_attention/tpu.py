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
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles, tpu_call
from pallas_kernels.dense_attention.xla import cut_queries, join_queries
from pallas_kernels.dsa_attention import chunks
from pallas_kernels.dsa_attention.gradient import Passes, attend
from pallas_kernels.dsa_attention.output import DSAOutput
from pallas_kernels.dsa_attention.row import Options, Row
from pallas_kernels.index_select import tpu as index
from pallas_kernels.index_select.selection import Selection
from pallas_kernels.index_select.xla import score, stacked_products
from pallas_kernels.indexer_warmup.xla import kl_add, kl_end, kl_start
from pallas_kernels.mask import NEG_INF

VMEM = 56 * 2**20        # bytes that a kernel may take, of the 64 MiB a core of v5p and tpu7x has


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


def select(row: chunks.Plan, chunk: chunks.Chunk, topk: int | None):
  """(selection of the chunk's groups [M, T], its words by key tile [P, M, S], tiles with a selected key in front, how
  many tiles to visit: at least one, whose mask may be empty)."""
  chosen, word_MPS = index.select(chunk.group, row.keys, chunk.selection, topk)
  word_PMS = tiles.cut(word_MPS.reshape(len(word_MPS), -1), 1, tiles.KEYS)
  tile_P, count = tiles.front((word_PMS != 0).any((1, 2)))
  return chosen, word_PMS, tile_P, jnp.maximum(count, 1)


def whole(x: jax.Array) -> pl.BlockSpec:
  """A block that stays on the chip for all tiles."""
  return pl.BlockSpec(x.shape, lambda n, tile: (0,) * x.ndim)


def tiled(x: jax.Array) -> pl.BlockSpec:
  """The tile, of an array that leads with the key tile."""
  return pl.BlockSpec((1, *x.shape[1:]), lambda n, tile: (tile[n], *[0] * (x.ndim - 1)))


def float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def forward_row(options: Options, arrays: Row, selection: Selection | None):
  """(o_GNK, lse_GN, kl_T or None, log-sum-exp of the selected scores [T] or None, Selection) of a row."""
  row, T = plan(options, arrays, selection), len(arrays.q_order_T)
  topk = None if row.every or selection is not None else options.topk

  def one(_, chunk):
    chosen, *visit = select(row, chunk, topk)
    o_GNK, lse_GN = attention(options, row, chunk, *visit)
    kl = indexer_loss(options, row, chunk, lse_GN, *visit) if options.want_kl else (None, None)
    return None, (o_GNK, lse_GN, *kl, chosen)

  _, (o_CGNK, lse_CGN, kl_CT, index_lse_CT, selection) = jax.lax.scan(one, None, row.chunks)
  kl_T, index_lse_T, selection = jax.tree.map(lambda x: x.reshape(-1)[:T], (kl_CT, index_lse_CT, selection))
  return join_queries(o_CGNK, T, row.size), join_queries(lse_CGN, T, row.size), kl_T, index_lse_T, selection


def attention(options: Options, row: chunks.Plan, chunk: chunks.Chunk, word_PMS, tile_P, steps):
  """(o_GNK in the dtype of q, lse_GN) of a chunk."""
  G, N, K = chunk.q_GNK.shape
  o_GNK, lse_GN1 = jax.ShapeDtypeStruct((G, N, K), chunk.q_GNK.dtype), float32(G, N, 1)
  o_GNK, lse_GN1 = tpu_call.call(
      functools.partial(_attention, T=row.size, scale=options.scale), (steps,), [tile_P],
      [chunk.q_GNK, row.k_PGSK, row.v_PGSK, word_PMS],
      [whole(chunk.q_GNK), tiled(row.k_PGSK), tiled(row.v_PGSK), tiled(word_PMS)],
      [(o_GNK, whole(o_GNK)), (lse_GN1, whole(lse_GN1))],
      [pltpu.VMEM((G, N, 1), jnp.float32), pltpu.VMEM((G, N, 1), jnp.float32), pltpu.VMEM((G, N, K), jnp.float32)],
      parallel=(False,), vmem=VMEM)
  return o_GNK, lse_GN1[..., 0]


def _attention(tile_ref, q_ref, k_ref, v_ref, word_ref, o_ref, lse_ref, *state, T, scale):
  n = pl.program_id(0)

  @pl.when(n == 0)
  def _():
    begin(*state)

  mask_TS = unpack(word_ref[0], T)
  for g in range(q_ref.shape[0]):
    add(logits(q_ref[g], k_ref[0, g], mask_TS, scale), v_ref[0, g], *(ref.at[g] for ref in state))

  @pl.when(n == pl.num_programs(0) - 1)
  def _():
    for g in range(q_ref.shape[0]):
      end(o_ref.at[g], lse_ref.at[g], *(ref.at[g] for ref in state))


def begin(m_ref, l_ref, acc_ref) -> None:
  """An online softmax in scratch memory: the running maximum and sum (..., N, 1), and the weighted values."""
  m_ref[...] = jnp.full_like(m_ref, NEG_INF)
  l_ref[...] = jnp.zeros_like(l_ref)
  acc_ref[...] = jnp.zeros_like(acc_ref)


def add(x_NS, v_SK, m_ref, l_ref, acc_ref) -> None:
  """Takes in a tile of logits, NEG_INF where masked, and its values."""
  m_N1 = m_ref[...]
  new_N1 = jnp.maximum(m_N1, x_NS.max(1, keepdims=True))
  w_NS, fade_N1 = jnp.exp(x_NS - new_N1), jnp.exp(m_N1 - new_N1)
  m_ref[...], l_ref[...] = new_N1, l_ref[...] * fade_N1 + w_NS.sum(1, keepdims=True)
  acc_ref[...] = acc_ref[...] * fade_N1 + tiles.dot('NS,SK->NK', w_NS, v_SK)


def end(o_ref, lse_ref, m_ref, l_ref, acc_ref) -> None:
  """Writes the output [N, K] and its log-sum-exp [N, 1]; 0 and NEG_INF of a query that saw nothing."""
  m_N1 = m_ref[...]
  seen_N1 = m_N1 > NEG_INF
  l_N1 = jnp.where(seen_N1, l_ref[...], 1)
  o_ref[...] = jnp.where(seen_N1, acc_ref[...] / l_N1, 0).astype(o_ref.dtype)
  lse_ref[...] = jnp.where(seen_N1, m_N1 + jnp.log(l_N1), NEG_INF)


def unpack(word_MS, T: int) -> jax.Array:
  """The mask of a chunk, bool [T, S], from words of which bit t is query t of the group."""
  M, S = word_MS.shape
  bit = jax.lax.broadcasted_iota(jnp.int32, (T // M, S), 0)
  return jnp.concatenate([(word_MS[m:m + 1] >> bit) & 1 for m in range(M)]) > 0


def logits(q_NK, k_SK, mask_TS, scale) -> jax.Array:
  """Masked attention logits [N, S] of the heads of one KV head."""
  x_NS = tiles.dot('NK,SK->NS', q_NK, k_SK) * scale
  (N, S), T = x_NS.shape, len(mask_TS)
  return jnp.where(mask_TS, x_NS.reshape(N // T, T, S), NEG_INF).reshape(N, S)


def probabilities(q_NK, k_SK, lse_N1, mask_TS, scale) -> jax.Array:
  safe_N1 = jnp.where(lse_N1 > NEG_INF, lse_N1, 0)     # a query that sees nothing has probabilities 0, not exp(0)
  return jnp.exp(logits(q_NK, k_SK, mask_TS, scale) - safe_N1)


def head_sum(p_NS, T: int) -> jax.Array:
  return p_NS.reshape(-1, T, p_NS.shape[1]).sum(0)


def indexer_loss(options: Options, row: chunks.Plan, chunk: chunks.Chunk, lse_GN, word_PMS, tile_P, steps):
  """(kl_T, log-sum-exp of the selected scores [T]) of a chunk: a second pass over its tiles, once lse is known."""
  iq_ITJ, gate_TI = chunks.index_queries(chunk)
  iq_NJ, lse_GN1, state = iq_ITJ.reshape(-1, iq_ITJ.shape[2]), lse_GN[..., None], float32(4, row.size, 1)
  state, = tpu_call.call(
      functools.partial(_indexer_loss, T=row.size, scale=options.scale), (steps,), [tile_P],
      [chunk.q_GNK, lse_GN1, iq_NJ, gate_TI, row.k_PGSK, row.ik_PSJ, word_PMS],
      [*map(whole, (chunk.q_GNK, lse_GN1, iq_NJ, gate_TI)), *map(tiled, (row.k_PGSK, row.ik_PSJ, word_PMS))],
      [(state, whole(state))], [], parallel=(False,), vmem=VMEM)
  return kl_end(state)


def _indexer_loss(tile_ref, q_ref, lse_ref, iq_ref, gate_ref, k_ref, ik_ref, word_ref, state_ref, *, T, scale):
  @pl.when(pl.program_id(0) == 0)
  def _():
    for i, x_T1 in enumerate(kl_start(T)):
      state_ref[i] = x_T1

  mask_TS = unpack(word_ref[0], T)
  G, N, _ = q_ref.shape
  p_TS = sum(head_sum(probabilities(q_ref[g], k_ref[0, g], lse_ref[g], mask_TS, scale), T) for g in range(G))
  z_ITS = stacked_products(iq_ref[...], ik_ref[0]).reshape(-1, T, mask_TS.shape[1])
  state = kl_add([state_ref[i] for i in range(4)], score(z_ITS, gate_ref[...]), p_TS * (T / (G * N)), mask_TS)
  for i, x_T1 in enumerate(state):
    state_ref[i] = x_T1


def backward_row(options: Options, arrays: Row, selection: Selection, index_lse_T, lse_GN, delta_GN, do_GNK, dkl_T):
  """Gradients (dq_GNK, dk_GSK, dv_GSK, diq_ITJ, dik_SJ, dgate_TI) of a row, float32."""
  row, T, S = plan(options, arrays, selection), len(arrays.q_order_T), len(arrays.k_order_S)
  stacked = [cut_queries(x, T, row.size) for x in (lse_GN[..., None], delta_GN[..., None], do_GNK)]
  zeros_T = jnp.zeros(T)
  cut = lambda x_T: tiles.cut(tiles.pad(x_T, 0, row.size), 0, row.size)[..., None]
  index_rows = [cut(x_T if options.want_kl else zeros_T) for x_T in (index_lse_T, dkl_T)]

  def one(carry, inputs):
    chunk, stacked, index_rows = inputs
    _, *visit = select(row, chunk, None)
    return gradients(options, row, chunk, stacked, index_rows, carry, *visit)

  init = tuple(jnp.zeros(x.shape) for x in (row.k_PGSK, row.v_PGSK, row.ik_PSJ))
  (dk, dv, dik), (dq, diq, dgate) = jax.lax.scan(one, init, (row.chunks, stacked, index_rows))
  return (join_queries(dq, T, row.size), tiles.join(dk, 1)[:, :S], tiles.join(dv, 1)[:, :S],
          tiles.join(diq, 1)[:, :T], tiles.join(dik, 0)[:S], tiles.join(dgate, 0)[:T])


def gradients(options: Options, row: chunks.Plan, chunk: chunks.Chunk, stacked, index_rows, carry, word_PMS, tile_P,
              steps):
  """(carry (dk_PGSK, dv_PGSK, dik_PSJ) with this chunk's part added, (dq_GNK, diq_ITJ, dgate_TI))."""
  iq_ITJ, gate_TI = chunks.index_queries(chunk)
  iq_NJ = iq_ITJ.reshape(-1, iq_ITJ.shape[2])
  queries = [chunk.q_GNK, *stacked, iq_NJ, gate_TI, *index_rows]
  keys = [row.k_PGSK, row.v_PGSK, row.ik_PSJ, word_PMS, *carry]
  own = [float32(*x.shape) for x in (chunk.q_GNK, iq_NJ, gate_TI)]
  dq_GNK, diq_NJ, dgate_TI, *carry = tpu_call.call(
      functools.partial(_gradients, T=row.size, scale=options.scale, want_kl=options.want_kl), (steps,), [tile_P],
      [*queries, *keys], [*map(whole, queries), *map(tiled, keys)],
      [*((x, whole(x)) for x in own), *((float32(*x.shape), tiled(x)) for x in carry)], [], parallel=(False,),
      vmem=VMEM, aliases={len(queries) + len(keys) - 3 + i: len(own) + i for i in range(3)})
  return tuple(carry), (dq_GNK, diq_NJ.reshape(iq_ITJ.shape), dgate_TI)


def _gradients(tile_ref, q_ref, lse_ref, delta_ref, do_ref, iq_ref, gate_ref, index_lse_ref, dkl_ref, k_ref, v_ref,
               ik_ref, word_ref, dk_before_ref, dv_before_ref, dik_before_ref, dq_ref, diq_ref, dgate_ref, dk_ref,
               dv_ref, dik_ref, *, T, scale, want_kl):
  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in (dq_ref, diq_ref, dgate_ref):
      ref[...] = jnp.zeros_like(ref)

  mask_TS = unpack(word_ref[0], T)
  G, N, _ = q_ref.shape
  p_TS = jnp.zeros(mask_TS.shape)
  for g in range(G):
    q_NK, k_SK, v_SK, do_NK = q_ref[g], k_ref[0, g], v_ref[0, g], do_ref[g]
    p_NS = probabilities(q_NK, k_SK, lse_ref[g], mask_TS, scale)
    p_TS += head_sum(p_NS, T)
    dx_NS = p_NS * (tiles.dot('NK,SK->NS', do_NK, v_SK) - delta_ref[g]) * scale
    dq_ref[g] += tiles.dot('NS,SK->NK', dx_NS, k_SK)
    dk_ref[0, g] = dk_before_ref[0, g] + tiles.dot('NS,NK->SK', dx_NS, q_NK)
    dv_ref[0, g] = dv_before_ref[0, g] + tiles.dot('NS,NK->SK', p_NS, do_NK)

  dik_ref[...] = dik_before_ref[...]
  if want_kl:
    index_gradients(p_TS * (T / (G * N)), mask_TS, iq_ref, ik_ref, gate_ref, index_lse_ref, dkl_ref, diq_ref,
                    dgate_ref, dik_ref)


def index_gradients(p_TS, mask_TS, iq_ref, ik_ref, gate_ref, index_lse_ref, dkl_ref, diq_ref, dgate_ref, dik_ref):
  """Adds the gradients of sum(dkl * KL): that of a score is (softmax(score) - p) * dkl."""
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
