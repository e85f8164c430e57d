"""Training the lightning indexer of DeepSeek Sparse Attention beside the model.

L layers, B rows, T query tokens.
"""
import jax
import jax.numpy as jnp

from keye_jax.objectives.common import Metrics, over


def indexer_kl(kl_LBT: jax.Array, segment_BT: jax.Array, total_queries: jax.Array) -> tuple[jax.Array, Metrics]:
  """L = sum_l mean_t KL(p_lt || softmax(I_lt)), arXiv 2606.10651 section 2.2.

  p is the head-averaged attention distribution of layer l at query t, over all visible keys in the warm-up and over
  the selected ones in sparse training; the paper's sum over KV groups of KL(p_g || .) equals G times this up to a
  constant. Inputs and target are detached where kl is computed, so the gradient reaches indexer parameters only.
  Layers are summed: the gradient of one layer's indexer does not depend on how many layers there are.

  Args:
    kl_LBT: float32 nats.
    segment_BT: int32, 0 is padding and does not count. Prompt and vision tokens do count: they are queries too.
    total_queries: number of non-padding tokens of the whole batch.
  The metric is the mean over layers too.
  """
  real_BT = (segment_BT != 0).astype(jnp.float32)
  kl = jnp.sum(jnp.where(segment_BT != 0, kl_LBT, 0.0))
  return over(total_queries, kl), {'indexer_kl': (kl, jnp.sum(real_BT) * kl_LBT.shape[0])}
