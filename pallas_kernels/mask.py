"""Who sees whom: the one rule that every attention and selection op applies.

A segment id is `sample << BRANCH_BITS | branch`; 0 is padding and also the id of a cache slot not written yet. A key
is visible to a query of the same sample when it lies in the trunk (branch 0) or in the query's own branch and, under
causal masking, its order is not larger. Order is the token's place in its sequence before any re-ordering of the row,
so the rule does not depend on the layout. Padding sees padding only; a query may see nothing at all.
"""
import jax

BRANCH_BITS = 8
NEG_INF = -1e30      # a masked logit, and the log-sum-exp of a query that sees nothing: finite, so nothing turns NaN


def visible(q_segment: jax.Array, k_segment: jax.Array, q_order: jax.Array, k_order: jax.Array,
            causal: bool) -> jax.Array:
  """bool, by broadcasting: visible(seg_BT[:, :, None], seg_BS[:, None], order_BT[:, :, None], ...) is [B, T, S]."""
  trunk = q_segment >> BRANCH_BITS << BRANCH_BITS
  same = (k_segment == q_segment) | (k_segment == trunk)
  return same & (k_order <= q_order) if causal else same
