"""A stand-in with the parameter paths of the real model and a millisecond's work: what the steps are tested with.

B rows, T tokens, D embed, H heads, K head dim, E experts, F ffn, V vocabulary, L layers, I indexer heads, J their dim.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.objectives.sft import sft

L, D, H, K, E, F, V, I, J, W = 2, 8, 2, 4, 4, 6, 11, 2, 3, 5


class Rows(NamedTuple):
  token_BT: Any
  target_BT: Any
  weight_BT: Any
  segment_BT: Any
  patch_BP: Any


class Aux(NamedTuple):
  balance_LB: Any
  load_LE: Any
  kl_LBT: Any
  dropped_L: Any = None
  recall: Any = None


class Output(NamedTuple):
  hidden_BTD: Any
  head_DV: Any
  aux: Aux
  stayed: Any = None


def init(seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape, scale=0.5 * shape[-2] ** -0.5), jnp.float32)
  return {
      'embed': normal(V, D), 'norm': jnp.ones(D), 'head': normal(D, V),
      'layers': {'attn_norm': jnp.ones((L, D)),
                 'attn': {'q': normal(L, D, H, K), 'k': normal(L, D, H, K), 'v': normal(L, D, H, K),
                          'o': normal(L, H, K, D),
                          'indexer': {'q': normal(L, D, I, J), 'k': normal(L, D, J), 'gate': normal(L, D, I),
                                      'k_norm_bias': jnp.zeros((L, J))}},
                 'mlp': {'router': normal(L, D, E), 'gate_up': normal(L, E, D, 2 * F), 'down': normal(L, E, F, D)}},
      'vision': {'patch': normal(W, D), 'patch_bias': jnp.zeros(D), 'packing_position': normal(4, D)}}


def apply(params: dict, batch: Rows) -> Output:
  x_BTD = params['embed'][batch.token_BT]
  seen_BD = batch.patch_BP @ params['vision']['patch'] + params['vision']['patch_bias']
  x_BTD = x_BTD + seen_BD[:, None]

  def block(x_BTD, p):
    a = p['attn']
    h_BTD = x_BTD * p['attn_norm']
    heads = lambda w: jnp.einsum('BTD,DHK->BTHK', h_BTD, w)
    mixed = jnp.tanh(heads(a['q']) * heads(a['k'])) + heads(a['v'])
    x = x_BTD + jnp.einsum('BTHK,HKD->BTD', mixed, a['o'])
    prob_BTE = jax.nn.softmax(x @ p['mlp']['router'])
    gate, up = jnp.split(jnp.einsum('BTD,EDF->BTEF', x, p['mlp']['gate_up']), 2, -1)
    x = x + jnp.einsum('BTEF,EFD,BTE->BTD', jax.nn.silu(gate) * up, p['mlp']['down'], prob_BTE)
    s, i = jax.lax.stop_gradient(h_BTD), a['indexer']
    score = (jnp.einsum('BTD,DIJ,BTJ->BTI', s, i['q'], s @ i['k'] + i['k_norm_bias']) * (s @ i['gate'])).sum(-1)
    target_BT = jax.lax.stop_gradient(mixed.sum((2, 3)))
    return x, Aux(E * jnp.square(prob_BTE.mean(1)).sum(-1), prob_BTE.sum((0, 1)), jnp.square(score - target_BT))

  x_BTD, aux = jax.lax.scan(block, x_BTD, params['layers'])
  return Output(x_BTD * params['norm'], params['head'], aux)


def batch(rows: int = 8, tokens: int = 6, seed: int = 0) -> Rows:
  """Random tokens; row r has r % 3 padding tokens at its end and uneven loss weights."""
  rng = np.random.default_rng(seed)
  token = rng.integers(0, V, (rows, tokens + 1)).astype(np.int32)
  real = np.arange(tokens) < tokens - np.arange(rows)[:, None] % 3
  weight = np.where(real, rng.integers(0, 3, (rows, tokens)), 0).astype(np.float32)
  return Rows(token[:, :-1], token[:, 1:], weight, np.where(real, 256, 0).astype(np.int32),
              rng.normal(size=(rows, W)).astype(np.float32))


def objective(balance_weight: float = 0.0, indexer_weight: float = 1.0):
  return sft('train', balance_weight, indexer_weight)
