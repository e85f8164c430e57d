"""Decoding on a TPU: three kernels over all sequences, two of which read the pages where they lie.

The first scores the index keys of each sequence, page by page through its table, and leaves integers in the order of
the scores. The second finds the thresholds of eight rows at a time by the search of index_select. The third attends to
the pages that hold a selected key, taken from a list, so that others are not even read; the words of a sequence's
selection stay on the chip. A page is one block of rows, key heads side by side, and all query heads meet it in one
product: in a masked logit a query meets another head's key. That costs no time, since so few queries leave the matrix
unit waiting for keys.

B sequences, T new tokens, N pages of a sequence, A slots of a page, S tokens of a tile, P tiles, M groups of rows,
Q stacked query heads G * R * T, G KV heads, K head dim, X rows of a page A * G, Y rows of a step, I indexer heads,
J indexer head dim.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tiles, tpu_call
from pallas_kernels.dense_attention import tpu as attention
from pallas_kernels.dsa_decode.pages import DecodeOutput, Pages
from pallas_kernels.index_select import search
from pallas_kernels.index_select import tpu as index
from pallas_kernels.index_select.selection import Selection
from pallas_kernels.index_select.xla import score, stacked_products
from pallas_kernels.mask import NEG_INF

SCORED = 1024            # tokens of a step that scores
ATTENDED = 512           # tokens of a step that attends, fewer where so many logits of all heads do not fit:
LOGITS = 2**20
ROWS = 8                 # queries whose thresholds are searched together
ENTRIES = 2**16          # of the page tables of one call, which lie in scalar memory, 1 MiB


def dsa_decode(q_BTHK, pages: Pages, iq_BTIJ, gate_BTI, page_BN, length_B, *, topk, scale) -> DecodeOutput:
  B, N = page_BN.shape
  if ROWS * N * pages.ik_PAJ.shape[1] * 4 > index.ROOM // 2:           # the next rows arrive during a search
    raise ValueError(f'dsa_decode: the scores of {ROWS} queries against {N} pages need more than '
                     f"{index.ROOM >> 21} MiB of VMEM; use implementation='xla' or fewer pages")
  size = max(n for n in range(1, B + 1) if B % n == 0 and (n == 1 or n * N <= ENTRIES))
  some = tuple(x.reshape(-1, size, *x.shape[1:]) for x in (q_BTHK, iq_BTIJ, gate_BTI, page_BN, length_B))
  out = tiles.over_rows(functools.partial(decode, pages, topk, scale), some, loop=True)
  return jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), out)


def decode(pages: Pages, topk, scale, q_BTHK, iq_BTIJ, gate_BTI, page_BN, length_B) -> DecodeOutput:
  (B, T), A = q_BTHK.shape[:2], pages.ik_PAJ.shape[1]
  page_BN = jnp.clip(page_BN, 0, len(pages.ik_PAJ) - 1)
  key_PBTS = scores(iq_BTIJ, gate_BTI, pages, page_BN, length_B)
  key_BT1, last_BT1 = thresholds(key_PBTS, length_B, topk)

  key_BTN = key_PBTS.transpose(1, 2, 0, 3).reshape(B, T, -1)[..., :page_BN.shape[1] * A]
  order_N = jnp.arange(key_BTN.shape[2], dtype=jnp.int32)
  kept_BTN = (key_BTN > key_BT1) | ((key_BTN == key_BT1) & (order_N <= last_BT1))
  kept_BTN &= order_N < length_B[:, None, None]                        # tiles that no sequence has were never written
  bit_T1 = jnp.left_shift(jnp.int32(1), jnp.arange(T, dtype=jnp.int32))[:, None]
  word_BNA = jnp.where(kept_BTN, bit_T1, 0).sum(1).reshape(*page_BN.shape, A)
  o_BTHK, lse_BTH = attend(q_BTHK, pages, scale, word_BNA, page_BN, length_B)
  return DecodeOutput(o_BTHK, lse_BTH, Selection(search.value(key_BT1[..., 0]), last_BT1[..., 0]))


def scores(iq_BTIJ, gate_BTI, pages: Pages, page_BN, length_B) -> jax.Array:
  """int32 [P, B, T, S]: keys of the scores, MASKED where a query sees nothing; what lies in tiles that no sequence has
  may be anything."""
  (B, T, I, J), A = iq_BTIJ.shape, pages.ik_PAJ.shape[1]
  many = max(min(SCORED // A, page_BN.shape[1]), 1)
  page_BN = tiles.pad(page_BN, 1, many)
  S, P = many * A, page_BN.shape[1] // many
  most = jnp.maximum(-(-length_B.max() // S), 1)

  def place(b, n, page, length, i):
    """Page i of a tile. Behind its last tile a sequence stays at that, and nothing is read."""
    last = jnp.maximum((length[b] + (S - 1)) // S - 1, 0)
    return page[b, jnp.minimum(n, last) * many + i]

  per_sequence = lambda *shape: pl.BlockSpec((1, *shape), lambda b, n, *_: (b, *[0] * len(shape)))
  per_page = lambda i, *shape: pl.BlockSpec((1, *shape), lambda b, n, *lists: (place(b, n, *lists, i), 0, 0))
  paged, specs = [pages.ik_PAJ] * many, [per_page(i, A, J) for i in range(many)]
  if pages.ik_scale_PA is not None:
    paged += [pages.ik_scale_PA[:, None]] * many
    specs += [per_page(i, 1, A) for i in range(many)]
  key_PBTS, = tpu_call.call(
      functools.partial(_scores, many=many), (B, most), [page_BN, length_B],
      [iq_BTIJ.swapaxes(1, 2).reshape(B, I * T, J), gate_BTI, *paged],
      [per_sequence(I * T, J), per_sequence(T, I), *specs],
      [(jax.ShapeDtypeStruct((P, B, T, S), jnp.int32), pl.BlockSpec((1, 1, T, S), lambda b, n, *_: (n, b, 0, 0)))], [],
      parallel=(True, False), vmem=attention.VMEM)
  return key_PBTS


def _scores(page_ref, length_ref, iq_ref, gate_ref, *refs, many):
  *refs, key_ref = refs
  b, n, (T, S) = pl.program_id(0), pl.program_id(1), key_ref.shape[2:]
  length = length_ref[b]
  key_ref[...] = jnp.full_like(key_ref, index.MASKED)

  @pl.when(n * S < length)
  def _():
    parts = [ref[0] for ref in refs[:many]]
    if len(refs) > many:
      scaled = lambda ik_AJ, scale_1A: (ik_AJ.astype(jnp.float32) * tpu_call.column(scale_1A)).astype(iq_ref.dtype)
      parts = [scaled(ik_AJ, ref[0]) for ik_AJ, ref in zip(parts, refs[many:])]
    z_NS = stacked_products(iq_ref[0], jnp.concatenate(parts))
    score_TS = score([z_NS[i:i + T] for i in range(0, len(z_NS), T)], gate_ref[0])
    place_TS = n * S + jax.lax.broadcasted_iota(jnp.int32, (T, S), 1)
    order_TS = length - T + jax.lax.broadcasted_iota(jnp.int32, (T, S), 0)       # negative of what is no token
    key_ref[0, 0] = jnp.where(place_TS <= order_TS, search.key(score_TS), index.MASKED)


def thresholds(key_PBTS, length_B, topk: int) -> tuple[jax.Array, jax.Array]:
  """(key, last) [B, T, 1] of a `Selection`."""
  P, B, T, S = key_PBTS.shape
  key_PNS = tiles.pad(key_PBTS.reshape(P, B * T, S), 1, ROWS, index.MASKED)
  count_N = tiles.pad(jnp.repeat(-(-length_B // S), T), 0, ROWS)
  count_M, M = count_N.reshape(-1, ROWS).max(1), len(count_N) // ROWS
  order_P1S = jnp.arange(P * S, dtype=jnp.int32).reshape(P, 1, S)
  out = jax.ShapeDtypeStruct((M, 1, ROWS), jnp.int32), pl.BlockSpec((1, 1, ROWS), lambda m, count: (m, 0, 0))
  found = tpu_call.call(
      functools.partial(_thresholds, topk=topk), (M,), [count_M], [key_PNS, order_P1S],
      [pl.BlockSpec((P, ROWS, S), lambda m, count: (0, m, 0)), tpu_call.whole(order_P1S)], [out, out], [],
      parallel=(True,), vmem=index.ROOM + index.BESIDE)
  return tuple(x.reshape(-1)[:B * T].reshape(B, T, 1) for x in found)


def _thresholds(count_ref, score_ref, order_ref, key_ref, last_ref, *, topk):
  key_T1, last_T1 = index.kth(score_ref, order_ref, count_ref[pl.program_id(0)], topk)
  key_ref[0], last_ref[0] = tpu_call.row(key_T1), tpu_call.row(last_T1)


def attend(q_BTHK, pages: Pages, scale, word_BNA, page_BN, length_B) -> tuple[jax.Array, jax.Array]:
  """(o_BTHK, lse_BTH). Bit t of a word: token t of the sequence selected that slot."""
  (B, T, H, K), (_, A, G) = q_BTHK.shape, pages.k_PAGK.shape[:3]
  N, Q, X = page_BN.shape[1], H * T, A * G
  many = max(min(ATTENDED // A, LOGITS // (Q * X), N), 1)
  list_BN, count_B = tiles.front((word_BNA != 0).any(2))

  def place(b, n, page, order, count, length, i):
    """Page i of a step; behind the last, that one again."""
    return page[b, order[b, jnp.minimum(n * many + i, jnp.maximum(count[b] - 1, 0))]]

  per_sequence = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda b, n, *_: (b, *[0] * (x.ndim - 1)))
  per_page = lambda i: pl.BlockSpec((1, X, K), lambda b, n, *lists: (place(b, n, *lists, i), 0, 0))
  constant = lambda x: pl.BlockSpec(x.shape, lambda b, n, *_: (0, 0))
  q_BQK = tiles.stack_heads(q_BTHK, G).reshape(B, Q, K)
  row_Q, head_X = jnp.arange(Q, dtype=jnp.int32), jnp.arange(X, dtype=jnp.int32) % G
  own = [(row_Q % T)[:, None], (row_Q // (Q // G))[:, None], jnp.tile(head_X, many)[None]]
  word_BN1X = jnp.repeat(word_BNA, G, axis=2)[:, :, None]
  pool = [x.reshape(len(x), X, K) for x in pages[:2]]
  outputs = [jax.ShapeDtypeStruct(q_BQK.shape, q_BTHK.dtype), jax.ShapeDtypeStruct((B, Q, 1), jnp.float32)]
  o_BQK, lse_BQ1 = tpu_call.call(
      functools.partial(_attend, many=many, G=G, scale=scale), (B, jnp.maximum(-(-count_B.max() // many), 1)),
      [page_BN, list_BN, count_B, length_B], [q_BQK, *own, word_BN1X, *(x for x in pool for _ in range(many))],
      [per_sequence(q_BQK), *map(constant, own), per_sequence(word_BN1X), *[per_page(i) for i in range(many)] * 2],
      [(x, per_sequence(x)) for x in outputs],
      [pltpu.VMEM((Q, 1), jnp.float32), pltpu.VMEM((Q, 1), jnp.float32), pltpu.VMEM((Q, K), jnp.float32)],
      parallel=(True, False), vmem=attention.VMEM)
  unstack = lambda x_BQ: tiles.unstack_heads(x_BQ.reshape(B, G, Q // G, *x_BQ.shape[2:]), T)
  return unstack(o_BQK), unstack(lse_BQ1[..., 0])


def _attend(page_ref, list_ref, count_ref, length_ref, q_ref, bit_ref, head_ref, key_head_ref, word_ref, *refs, many, G,
            scale):
  k_refs, v_refs, (o_ref, lse_ref, *state) = refs[:many], refs[many:2 * many], refs[2 * many:]
  b, n = pl.program_id(0), pl.program_id(1)
  count, X = count_ref[b], k_refs[0].shape[1]

  @pl.when(n == 0)
  def _():
    attention.begin(*state)

  @pl.when(n * many < count)
  def _():
    words, values = [], []
    for i, v_ref in enumerate(v_refs):
      page = list_ref[b, jnp.minimum(n * many + i, count - 1)]
      words.append(jnp.where(n * many + i < count, word_ref[0, page], 0))
      written = (length_ref[b] - page * (X // G)) * G                  # rows of the page
      row_X1 = jax.lax.broadcasted_iota(jnp.int32, (X, 1), 0)
      values.append(jnp.where(row_X1 < written, v_ref[0], 0))          # what lies behind may be no number
    on_QY = ((jnp.concatenate(words, 1) >> bit_ref[...]) & 1) > 0
    x_QY = tiles.dot('QK,YK->QY', q_ref[0], jnp.concatenate([k_ref[0] for k_ref in k_refs])) * scale
    x_QY = jnp.where(on_QY & (head_ref[...] == key_head_ref[...]), x_QY, NEG_INF)
    attention.add(x_QY, jnp.concatenate(values), *state)

  @pl.when(n == pl.num_programs(1) - 1)
  def _():
    attention.end(o_ref.at[0], lse_ref.at[0], *state)
