"""SwiGLU experts, and how tokens travel to them.

B batch, T time, N flattened tokens, D embed, E experts (of this device), F ffn, K experts per token.
"""
import flax.linen as nn
import jax

from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import layers, router
from keye_jax.sharding import Adapted
from pallas_kernels.grouped_matmul import adapted_swiglu, routed_swiglu


class Mlp(nn.Module):
  """x_BTD -> (y_BTD, Routing or None): experts, or one dense SwiGLU when the config has none."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, valid_BT):
    c, text = self.config, self.config.text
    D, F, E = text.embed, text.ffn, text.experts
    init_in, init_out = nn.initializers.normal(D ** -0.5), layers.residual_init(F, text.layers)
    if not E:
      gate_up_DF2 = sharding.param(self, 'gate_up', init_in, (D, 2 * F), ('embed', None), c)
      down_FD = sharding.param(self, 'down', init_out, (F, D), (None, 'embed'), c)
      return layers.swiglu(x_BTD, gate_up_DF2, down_FD), None
    router_DE = sharding.param(self, 'router', nn.initializers.normal(D ** -0.5), (D, E), ('embed', None), c)
    gate_up_EDF2 = sharding.param(self, 'gate_up', init_in, (E, D, 2 * F), ('experts', 'embed', None), c)
    down_EFD = sharding.param(self, 'down', init_out, (E, F, D), ('experts', None, 'embed'), c)
    routing = router.route(x_BTD, router_DE, text.experts_per_token, valid_BT)
    return moe(c, x_BTD, routing, gate_up_EDF2, down_EFD), routing


def moe(config: ModelConfig, x_BTD, routing: router.Routing, gate_up_EDF2, down_EFD) -> jax.Array:
  """Weighted sum of each token's experts. Transports:

  local: every device holds all experts (expert axis 1).
  ring:  tokens are all-gathered over the expert axis, each device computes its own experts, results are
         reduce-scattered. Drops nothing.

  Either matrix may be `Adapted`: then each expert has a low-rank pair of its own.
  """
  ring = config.experts_transport == 'ring' and sharding.has_mesh()
  if not ring and sharding.has_mesh() and jax.sharding.get_abstract_mesh().shape['expert'] > 1:
    raise ValueError("experts_transport='local' needs an expert axis of 1; use 'ring'")

  def fn(x_BTD, expert_BTK, weight_BTK, gate_up_EDF2, down_EFD):
    B, T, D = x_BTD.shape
    flat = lambda a: a.reshape(B * T, a.shape[-1])
    x_ND, expert_NK, weight_NK = flat(x_BTD), flat(expert_BTK), flat(weight_BTK)
    if not ring:
      return run(x_ND, expert_NK, weight_NK, gate_up_EDF2, down_EFD).reshape(B, T, D)
    gather = lambda a: jax.lax.all_gather(a, 'expert', tiled=True)
    first = jax.lax.axis_index('expert') * jax.tree.leaves(gate_up_EDF2)[0].shape[0]
    y_ND = run(gather(x_ND), gather(expert_NK) - first, gather(weight_NK), gate_up_EDF2, down_EFD)
    return jax.lax.psum_scatter(y_ND, 'expert', tiled=True).reshape(B, T, D)

  run = routed_swiglu
  if isinstance(gate_up_EDF2, Adapted) or isinstance(down_EFD, Adapted):
    run, gate_up_EDF2, down_EFD = adapted_swiglu, full(gate_up_EDF2), full(down_EFD)
  tokens = ('batch', 'seq', None)
  matrices = jax.tree.map(lambda a: ('experts', None, None), (gate_up_EDF2, down_EFD))
  return sharding.local(fn, config.layout, (tokens, tokens, tokens, *matrices), tokens)(
      x_BTD, routing.expert_BTK, routing.weight_BTK, gate_up_EDF2, down_EFD)


def full(w_EAB: jax.Array | Adapted) -> Adapted:
  """A weight with its adapter, or with one of rank 0."""
  if isinstance(w_EAB, Adapted):
    return w_EAB
  return Adapted(w_EAB, w_EAB[:, :, :0], w_EAB[:, :0])
