"""Sigmoid loss between pictures and captions (SigLIP, arXiv 2303.15343 eq. 1).

N pairs of the whole batch, M the same pairs on the side of the captions, B rows, S samples of a row, E embed.
"""
import jax
import jax.numpy as jnp

from keye_jax import sharding
from keye_jax.objectives.common import Metrics, Objective, over


def sigmoid_pairs(layout: str, image_NE: jax.Array, text_NE: jax.Array, log_scale: jax.Array, bias: jax.Array,
                  pair_N: jax.Array) -> tuple[jax.Array, Metrics]:
  """L = -1/n sum_ij log sigmoid(y_ij (t x_i . z_j + b)), y = 1 for i = j and -1 otherwise, t = exp(log_scale).

  Every picture is compared with every caption of the batch: where N is sharded, each device gathers the captions and
  keeps its own pictures, and the gradient of a caption is summed over the devices on its way back. Equal captions of
  two pictures count as not belonging together, as in the paper.

  Args:
    image_NE, text_NE: float32, of length 1.
    log_scale, bias: scalars, learnt.
    pair_N: float32, 1 for a pair and 0 for padding; n is their number.
  Returns the loss and metrics: `loss`, `accuracy` (share of pictures most similar to their own caption), `temperature`.
  """
  N = image_NE.shape[0]
  text_ME, pair_M = sharding.constrain(text_NE, layout, None, None), sharding.constrain(pair_N, layout, None)
  similar_NM = jnp.einsum('NE,ME->NM', image_NE, text_ME, precision=jax.lax.Precision.HIGHEST,
                          out_sharding=sharding.out(layout, 'batch', None))
  here_N = sharding.constrain(jnp.arange(N), layout, 'batch')
  own_NM = here_N[:, None] == jnp.arange(N)
  logit_NM = jnp.exp(log_scale) * similar_NM + bias
  nll_NM = -jax.nn.log_sigmoid(jnp.where(own_NM, logit_NM, -logit_NM))
  total, count = jnp.sum(nll_NM * pair_N[:, None] * pair_M), jnp.sum(pair_N)
  best_N = jnp.argmax(jnp.where(pair_M > 0, similar_NM, -jnp.inf), 1)
  right = jnp.sum((best_N == here_N) * pair_N)
  return over(count, total), {'loss': (total, count), 'accuracy': (right, count),
                              'temperature': (jnp.exp(log_scale), jnp.float32(1))}


def siglip(layout: str) -> Objective:
  """`sigmoid_pairs` on the `nn.contrast.Output` of a batch, which is one micro-batch: captions of another one would be
  missing among the negatives."""
  def loss(output, batch, totals) -> tuple[jax.Array, Metrics]:
    def flat(x):
      rows = ('batch',) + (None,) * (x.ndim - 1)
      return sharding.local(lambda a: a.reshape(-1, *a.shape[2:]), layout, (rows,), rows[:-1])(x)

    return sigmoid_pairs(layout, flat(output.image_BSW), flat(output.text_BSW), output.log_scale, output.bias,
                         flat(output.pair_BS))

  return Objective(lambda batch: {}, loss)
