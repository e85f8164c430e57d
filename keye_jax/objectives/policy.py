"""Policy gradients on responses that an earlier policy sampled: GSPO, which Keye-VL-2.0 uses throughout, and GRPO.

B rows, T tokens, M responses of a row at most, P prompts, G responses to a prompt.

Rows are packed: responses to several prompts, or several responses as branches behind one prompt, lie in a row, and
each token says which of the row's M responses its target belongs to (`PolicyBatch.sequence_BT`). A sum over a response
is then a masked sum over the row, [B, T, M] -> [B, M], elementwise before the reduction, so that nothing of that size
needs to be kept: no scatter and no sort, and where devices share the tokens of a row each sums its own and M numbers a
row are added up between them. A response lies in one row whole.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keye_jax.nn import head
from keye_jax.objectives import auxiliary
from keye_jax.objectives.common import Metrics, Objective, over

# arXiv 2507.18071 section 5.1, for this family of models; arXiv 2606.10651 gives no range. GRPO's is PPO's usual one.
GSPO_CLIP = (3e-4, 4e-4)
GRPO_CLIP = (0.2, 0.2)


class Surrogate(NamedTuple):
  """Of each response, float32 [B, M]; what stands at an absent one does not count."""
  value_BM: jax.Array         # to be maximised
  ratio_BM: jax.Array         # mean importance ratio of what is clipped as one
  lowest_BM: jax.Array
  highest_BM: jax.Array
  clipped_BM: jax.Array       # share of it whose gradient the clip took


def group_advantage(reward_PG: jax.Array, delta: float = 1e-6) -> jax.Array:
  """A_i = (R_i - mean R) / (std R + delta) over the G responses to a prompt: arXiv 2606.10651 section 4.3.

  std is that of the G rewards themselves (divided by G). Exactly 0 where all rewards of a group are equal: such groups
  teach nothing, and who samples drops them. The paper gives no delta.
  """
  apart_PG = reward_PG - reward_PG[:, :1]         # of equal rewards no rounding is left to be scaled up
  apart_PG -= jnp.mean(apart_PG, 1, keepdims=True)
  return apart_PG / (jnp.sqrt(jnp.mean(jnp.square(apart_PG), 1, keepdims=True)) + delta)


def gspo(layout: str, balance_weight: float, indexer_weight: float, clip: tuple[float, float] = GSPO_CLIP,
         token_stats=head.token_stats) -> Objective:
  """Group sequence policy optimization, arXiv 2507.18071 eq. 5 and 7, as in arXiv 2606.10651 section 4.3.

      J = mean_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i),  s_i = exp(1/|y_i| sum_t log pi(y_it) / pi_old(y_it))

  The loss is -J plus `auxiliary.terms`; there is no KL to a reference, the paper writes none. The mean is over all
  responses of the batch, those with A = 0 too, whatever their length and however they are packed. A response is clipped
  as a whole.

  Args:
    layout: sharding layout of the model.
    balance_weight, indexer_weight: of `auxiliary.terms`.
    clip: (low, high).
    token_stats: `nn.head.token_stats`, the one function that forms logits.
  The batch is a `PolicyBatch`. Metrics: `loss`; `ratio`, of a response, and its least and greatest value in a
  micro-batch; `clipped`, the share of responses without a gradient; and those of `policy`.
  """
  def surrogate(apart_BT, mine_BTM, length_BM, advantage_BM) -> Surrogate:
    ratio_BM = jnp.exp(_mean(apart_BT, mine_BTM, length_BM))
    value_BM, clipped_BM = _clipped(ratio_BM, advantage_BM, clip)
    return Surrogate(value_BM, ratio_BM, ratio_BM, ratio_BM, clipped_BM)
  return policy(layout, surrogate, balance_weight, indexer_weight, token_stats)


def grpo(layout: str, balance_weight: float, indexer_weight: float, clip: tuple[float, float] = GRPO_CLIP,
         token_stats=head.token_stats) -> Objective:
  """Group relative policy optimization, arXiv 2402.03300 eq. 3 without its KL to a reference.

      J = mean_i 1/|o_i| sum_t min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i),  r_it = pi(o_it) / pi_old(o_it)

  As `gspo`, but each token has a ratio and is clipped by itself: `ratio` and `clipped` are means over the tokens of a
  response, the least and greatest ratio those of tokens.
  """
  def surrogate(apart_BT, mine_BTM, length_BM, advantage_BM) -> Surrogate:
    advantage_BT = jnp.sum(jnp.where(mine_BTM, advantage_BM[:, None], 0.0), -1)
    ratio_BT = jnp.exp(apart_BT)
    value_BT, clipped_BT = _clipped(ratio_BT, advantage_BT, clip)
    ratio_BTM = ratio_BT[..., None]
    return Surrogate(_mean(value_BT, mine_BTM, length_BM), _mean(ratio_BT, mine_BTM, length_BM),
                     jnp.min(jnp.where(mine_BTM, ratio_BTM, jnp.inf), 1),
                     jnp.max(jnp.where(mine_BTM, ratio_BTM, 0.0), 1), _mean(clipped_BT, mine_BTM, length_BM))
  return policy(layout, surrogate, balance_weight, indexer_weight, token_stats)


def policy(layout: str, surrogate: Callable[..., Surrogate], balance_weight: float, indexer_weight: float,
           token_stats) -> Objective:
  """What `gspo` and `grpo` share: `surrogate(log pi / pi_old [B, T], whose token [B, T, M], lengths [B, M],
  advantages [B, M]) -> Surrogate`, averaged over the responses of a batch.

  Further metrics: `entropy` of the policy and `kl`, r - 1 - log r with r = pi / pi_old, which estimates
  KL(pi_old || pi) without bias and is never negative (k3 of http://joschu.net/blog/kl-approx.html), over tokens of
  responses; `advantage` and `response_tokens` over responses. What stands outside of responses, infinities too, does
  not count.
  """
  def totals(rows) -> dict[str, jax.Array]:
    return {'responses': jnp.sum(_lengths(_mine(rows)) > 0, dtype=jnp.float32), **auxiliary.totals(rows.batch)}

  def loss(output, rows, totals) -> tuple[jax.Array, Metrics]:
    stats = token_stats(layout, output.hidden_BTD, output.head_DV, rows.batch.target_BT, want=('logp', 'entropy'))
    mine_BTM = _mine(rows)
    real_BT, length_BM = jnp.any(mine_BTM, -1), _lengths(mine_BTM)
    there_BM = length_BM > 0
    apart_BT = jnp.where(real_BT, stats.logp_BT - rows.old_logp_BT, 0.0)
    got = surrogate(apart_BT, mine_BTM, length_BM, rows.advantage_BM)
    total = lambda x_BM: jnp.sum(jnp.where(there_BM, x_BM, 0.0))
    responses, tokens, one = total(jnp.ones_like(length_BM)), jnp.sum(length_BM), jnp.float32(1)
    nothing = responses == 0
    lost = -total(got.value_BM)
    metrics = {
        'loss': (lost, responses), 'ratio': (total(got.ratio_BM), responses),
        'ratio_min': (jnp.where(nothing, 1.0, jnp.min(jnp.where(there_BM, got.lowest_BM, jnp.inf))), one),
        'ratio_max': (jnp.where(nothing, 1.0, jnp.max(jnp.where(there_BM, got.highest_BM, 0.0))), one),
        'clipped': (total(got.clipped_BM), responses),
        'kl': (jnp.sum(jnp.expm1(apart_BT) - apart_BT), tokens),
        'entropy': (jnp.sum(jnp.where(real_BT, stats.entropy_BT, 0.0)), tokens),
        'advantage': (total(rows.advantage_BM), responses), 'response_tokens': (tokens, responses)}
    beside, more = auxiliary.terms(output, rows.batch, totals, balance_weight, indexer_weight)
    return over(totals['responses'], lost) + beside, metrics | more

  return Objective(totals, loss)


def _clipped(ratio: jax.Array, advantage: jax.Array, clip: tuple[float, float]) -> tuple[jax.Array, jax.Array]:
  """(min(r A, clip(r) A), 1 where the second is the smaller: there r has no gradient)."""
  free, held = ratio * advantage, jnp.clip(ratio, 1 - clip[0], 1 + clip[1]) * advantage
  return jnp.minimum(free, held), (held < free).astype(jnp.float32)


def _mine(rows) -> jax.Array:
  """bool [B, T, M]: the token's target belongs to the response."""
  return rows.sequence_BT[..., None] == jnp.arange(rows.advantage_BM.shape[1], dtype=rows.sequence_BT.dtype)


def _lengths(mine_BTM: jax.Array) -> jax.Array:
  """Tokens of each response; 0: absent."""
  return jnp.sum(mine_BTM, 1, dtype=jnp.float32)


def _mean(x_BT: jax.Array, mine_BTM: jax.Array, length_BM: jax.Array) -> jax.Array:
  """[B, M]: over the tokens of each response, 0 for an absent one."""
  return jnp.sum(jnp.where(mine_BTM, x_BT[..., None], 0.0), 1) / jnp.maximum(length_BM, 1.0)
