"""Cost of the passes of the ops, for one device: the rules that `keye_jax/jaxpr_costs.py` asks for.

A row is taken to hold one sample: its queries see, on average over the row, half of its keys. Rows of several packed
samples cost less. Experts are taken to get equal shares.

B batch, T query time, S key time, H query heads, G KV heads, K head dim, N stacked queries of a KV head, I indexer
heads, J indexer head dim; of experts: N rows, D embed, F ffn, E experts of this device, K picks of a row among all,
G and A ranks of the adapters beside gate_up and down.
"""
import math
from collections.abc import Callable

from keye_jax.config import ModelConfig
from keye_jax.jaxpr_costs import Cost, Rule
from pallas_kernels import dense_attention, dispatch, grouped_matmul, indexer_warmup
from pallas_kernels.dsa_attention import implementation_of
from pallas_kernels.index_select import gpu, tpu

FLOAT = 4
WORD_QUERIES = 32            # queries whose bits of a selection make one int32 a key


def rules(config: ModelConfig, seen: Callable[[int, int], float] | None = None) -> dict[str, Rule]:
  """Rules by the name of a pass, as the devices of the mesh do it. seen: (T, S) -> mean keys that a query of the
  language model sees; default causal."""
  seen = seen or causal
  topk, experts = config.text.indexer.topk, config.text.experts
  travels = config.experts_transport in ('padded', 'ragged')

  def attention(backward: bool, full: bool = False):
    """Dense attention: a product of queries and keys each for the logits and o; backward for the logits, p, and the
    gradients of q, k and v, on a GPU by two kernels that both need the first two."""
    def rule(B, T, H, K, S, G, width) -> Cost:
      keys, name = float(S) if full else seen(T, S), dense_attention.implementation_of('dense_attention', T, S)
      products = 2 if not backward else 7 if name == 'gpu' else 5
      met = 2.0 * B * T * K * keys                  # numbers, if each query read the keys and values that it meets
      if name == 'gpu':
        read = met * width * (G / dense_attention.gpu.QUERIES + backward * H / dense_attention.gpu.KEYS)
      else:
        read = met * G / block(name, T, H, K) * (width + backward * 2 * FLOAT)      # backward adds to gradients
      ends = B * K * width * (T * H * products + 2 * S * G)
      return Cost(2.0 * B * H * T * K * keys * products, bytes=read + ends)
    return rule

  def tiled(products: int, index_products: int):
    """products and index_products: on selected keys. Every visible key is scored once more, to select."""
    def rule(B, G, N, K, S, I, T, J, width) -> Cost:
      keys = seen(T, S)
      kept = selected(S, topk, keys)
      flops = lambda n: B * n * (2.0 * G * N * K * products + 2.0 * I * T * J * index_products)
      groups, chunks = math.ceil(T / WORD_QUERIES), math.ceil(T / (WORD_QUERIES * tpu.MANY))
      # a chunk reads the tiles of k and v that it visits, backward adds to their gradients; a group reads all index
      # keys and writes its words, which are read again
      visit = 2 * G * K * (width + 2 * FLOAT) if products == 5 else (products - 1) * G * K * width
      read = B * keys * (chunks * visit + groups * (J * width + 3 * FLOAT))
      ends = B * width * (products * G * N * K + 2 * S * G * K + (1 + index_products) * I * T * J)
      return Cost(flops(kept) + 2.0 * B * I * T * J * keys, flops(keys - kept), read + ends)
    return rule

  def listed(products: int, index_products: int):
    """On a GPU: a group of queries meets the union of what each of them selected, which is masked places at most when
    they have no key in common; `tiled` meets whole tiles."""
    def rule(B, G, N, K, S, I, T, J, width) -> Cost:
      keys = seen(T, S)
      kept = selected(S, topk, keys)
      union = min(kept * min(gpu.GROUP, T), keys)
      flops = lambda n: B * n * (2.0 * G * N * K * products + 2.0 * I * T * J * index_products)
      # each product gathers keys or values; backward gathers them once, and what a group adds to the gradients of a key
      # is written and read again, the probabilities for the indexer too
      backward = products == 5
      visit = G * K * width * (6 if backward else products)
      if index_products:
        visit += J * (width + 2 * FLOAT * backward) + 2 * FLOAT * G * gpu.GROUP * backward
      gathered = lambda n: B * math.ceil(T / gpu.GROUP) * n * visit
      # a visible score is written once and read twice
      scores = B * keys * (math.ceil(T / gpu.ROWS) * J * width + T * 3 * FLOAT)
      ends = B * width * (products * G * N * K + 2 * S * G * K + (1 + index_products) * I * T * J)
      return Cost(flops(kept) + 2.0 * B * I * T * J * keys, flops(union - kept),
                  gathered(kept) + scores + ends, gathered(union - kept))
    return rule

  def sparse(products: int, index_products: int):
    def rule(G, N, T, S, **dims) -> Cost:
      form = listed if implementation_of(G * N // T, T, S) == 'gpu' else tiled
      return form(products, index_products)(G=G, N=N, T=T, S=S, **dims)
    return rule

  def warmup(backward: bool):
    """Dense attention's logits, and products of the indexer: one forward; backward three, on a GPU five and the
    gradients of all scores, written once and read twice."""
    def rule(B, G, N, K, S, I, T, J, width) -> Cost:
      name, keys = dense_attention.implementation_of('indexer_warmup', T, S), seen(T, S)
      on_gpu = name == 'gpu'
      queries = indexer_warmup.gpu.TILE if on_gpu else block(name, T, G * N // T, K)
      products = 1 if not backward else 5 if on_gpu else 3
      read = B * math.ceil(T / queries) * keys * (G * K * width + J * (width + 2 * FLOAT * (backward and not on_gpu)))
      scores = 3 * FLOAT * B * T * keys * (backward and on_gpu)
      ends = B * width * (G * N * K + S * G * K + products * I * T * J)
      return Cost(2.0 * B * keys * (G * N * K + I * T * J * products), bytes=read + scores + ends)
    return rule

  def recall(B, N, S, H, G, K, I, J, width) -> Cost:
    """A few queries, one after another, against all keys."""
    return Cost(2.0 * B * N * S * (H * K + I * J), bytes=B * N * S * (G * K + J) * width)

  def computed(N, E, K) -> float:
    """Picks: of rows with one each, mine and room for more; else of rows of all devices."""
    return N * K / config.experts_capacity if travels else N * K * E / experts

  def by_kernels(name: str, forward: bool, N, D, E, F, K, width) -> Cost:
    """`grouped_matmul/parts.py`: the backward pass forms hidden values again. Rows are gathered, and results put back
    for every pick, also those of other devices; a product reads weights once, and its rows once a tile of its results,
    which on a GPU is once from memory."""
    picks, weights = computed(N, E, K), 3 * D * F
    most = {'tpu': grouped_matmul.tpu.FEATURES[1] // width}.get(name, max(D, 2 * F))
    reads = lambda rows, results: rows * math.ceil(results / most)
    first = 2 * D + reads(D, 2 * F) + 5 * F
    if forward:
      return Cost(2.0 * picks * weights, bytes=width * (N * K * D + picks * (first + reads(F, D) + D) + E * weights))
    rest = 4 * D + reads(D, F) + 7 * F + reads(F, D) + reads(D, F) + reads(D, 2 * F) + 2 * reads(2 * F, D) + D
    return Cost((4.0 + 4.0 / 3.0) * picks * weights,
                bytes=width * (N * K * D + picks * (first + rest) + 3 * E * weights))

  def routed(forward: bool):
    def rule(N, D, E, F, K, width) -> Cost:
      if (name := grouped_matmul.implementation_of(N * K)) != 'xla':
        return by_kernels(name, forward, N, D, E, F, K, width)
      picks = computed(N, E, K)
      tiles, weights = picks / grouped_matmul.xla.MAX_TILE + E, 3 * D * F
      rows = picks * width * (4 * D + 2 * F)               # rows in, hidden values out or in, results out and in
      if forward:
        return Cost(2.0 * picks * weights, bytes=rows + tiles * weights * width)
      return Cost(4.0 * picks * weights, bytes=2 * rows + tiles * weights * (width + 2 * FLOAT))
    return rule

  def adapted(forward: bool):
    """G, A: ranks beside gate_up and down; stored: bytes of a weight. Backward has no gradient of the matrices, and
    forms x A again."""
    def rule(N, D, E, F, K, G, A, width, stored) -> Cost:
      picks = computed(N, E, K)
      tiles, weights, pairs = picks / grouped_matmul.xla.MAX_TILE + E, 3 * D * F, G * (D + 2 * F) + A * (F + D)
      rows = picks * width * (4 * D + 2 * F)
      if forward:
        return Cost(2.0 * picks * (weights + pairs), bytes=rows + tiles * (weights * stored + pairs * width))
      again = 2 * (D + G) * F + G * D if dispatch.choose('adapted_swiglu', None) == 'gpu' else 0    # hidden values
      return Cost(2.0 * picks * (weights + 2 * pairs + G * D + A * F + again),
                  bytes=2 * rows + tiles * (weights * stored + pairs * (width + 2 * FLOAT)))
    return rule

  return {
      'dense_attention_forward': attention(False), 'dense_attention_backward': attention(True),
      'dense_attention_forward_full': attention(False, True), 'dense_attention_backward_full': attention(True, True),
      'dsa_attention_forward': sparse(2, 0), 'dsa_attention_backward': sparse(5, 0),
      'dsa_attention_forward_kl': sparse(3, 1), 'dsa_attention_backward_kl': sparse(5, 3),
      'indexer_warmup_forward': warmup(False), 'indexer_warmup_backward': warmup(True),
      'indexer_recall': recall,
      'routed_swiglu_forward': routed(True), 'routed_swiglu_backward': routed(False),
      'adapted_swiglu_forward': adapted(True), 'adapted_swiglu_backward': adapted(False)}


def block(name: str, T: int, H: int, K: int) -> int:
  """Queries of dense attention that meet a key tile together."""
  return dense_attention.tpu.block(T, H, K) if name == 'tpu' else dense_attention.xla.query_tile(T, H)


def causal(T: int, S: int) -> float:
  """Mean over a causal row of S keys; the T queries of a device are any part of it."""
  return (S + 1) / 2


def every(T: int, S: int) -> float:
  """Decoding into a full cache."""
  return float(S)


def selected(S: int, topk: int, keys: float) -> float:
  """Mean keys that a query attends to, of the `keys` that it sees: min(t, k) averaged over a causal row."""
  if keys == S:
    return float(min(S, topk))
  return keys if S <= topk else (topk * (topk + 1) / 2 + (S - topk) * topk) / S
