"""SwiGLU experts, and the choice of how tokens travel to them (transport.py).

B batch, T time, N flattened tokens, D embed, E experts (of this device), F ffn, K experts per token.
"""
import functools

import flax.linen as nn
import jax

from keye_jax import sharding
from keye_jax.config import ModelConfig
from keye_jax.nn import layers, router, transport
from keye_jax.sharding import Adapted


class Mlp(nn.Module):
  """x_BTD -> (y_BTD, Routing or None, dropped or None): experts, or one dense SwiGLU when the config has none."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, valid_BT):
    c, text = self.config, self.config.text
    D, F, E = text.embed, text.ffn, text.experts
    init_in, init_out = nn.initializers.normal(D ** -0.5), layers.residual_init(F, text.layers)
    if not E:
      gate_up_DF2 = sharding.param(self, 'gate_up', init_in, (D, 2 * F), ('embed', None), c)
      down_FD = sharding.param(self, 'down', init_out, (F, D), (None, 'embed'), c)
      return layers.swiglu(x_BTD, gate_up_DF2, down_FD), None, None
    router_DE = sharding.param(self, 'router', nn.initializers.normal(D ** -0.5), (D, E), ('embed', None), c)
    gate_up_EDF2 = sharding.param(self, 'gate_up', init_in, (E, D, 2 * F), ('experts', 'embed', None), c)
    down_EFD = sharding.param(self, 'down', init_out, (E, F, D), ('experts', None, 'embed'), c)
    routing = router.route(x_BTD, router_DE, text.experts_per_token, valid_BT)
    y_BTD, dropped = moe(c, x_BTD, routing, gate_up_EDF2, down_EFD)
    return y_BTD, routing, dropped


def moe(config: ModelConfig, x_BTD, routing: router.Routing, gate_up_EDF2, down_EFD):
  """(weighted sum of each token's experts, picks that the transport dropped or None where it drops none).

  Either matrix may be `Adapted`: then each expert has a low-rank pair, or scales, of its own.
  """
  name = config.experts_transport
  if not sharding.has_mesh():
    name = 'local'
  elif name == 'local' and sharding.extent(config.layout, 'experts') > 1:
    raise ValueError("experts_transport='local' needs an expert axis of 1; use 'ring'")
  with_room = functools.partial(functools.partial, capacity=config.experts_capacity)
  carry = dict(local=transport.local, ring=transport.ring, padded=with_room(transport.padded),
               ragged=with_room(transport.ragged))[name]

  def fn(x_BTD, expert_BTK, weight_BTK, gate_up_EDF2, down_EFD):
    B, T, _ = x_BTD.shape
    flat = lambda a: a.reshape(B * T, a.shape[-1])
    y_ND, dropped_N = carry(flat(x_BTD), flat(expert_BTK), flat(weight_BTK), gate_up_EDF2, down_EFD)
    return y_ND.reshape(x_BTD.shape), dropped_N.reshape(B, T)

  if isinstance(gate_up_EDF2, Adapted) or isinstance(down_EFD, Adapted):
    gate_up_EDF2, down_EFD = (full(w, config.dtype) for w in (gate_up_EDF2, down_EFD))
  tokens = ('batch', 'seq', None)
  matrices = jax.tree.map(lambda a: ('experts',) + (None,) * (a.ndim - 1), (gate_up_EDF2, down_EFD))
  y_BTD, dropped_BT = sharding.local(fn, config.layout, (tokens, tokens, tokens, *matrices), (tokens, tokens[:2]))(
      x_BTD, routing.expert_BTK, routing.weight_BTK, gate_up_EDF2, down_EFD)
  return y_BTD, dropped_BT.sum() if name in ('padded', 'ragged') else None


def full(w_EAB: jax.Array | Adapted, dtype: str) -> Adapted:
  """A weight with its adapter, or with one of rank 0."""
  found = w_EAB if isinstance(w_EAB, Adapted) else Adapted(w_EAB, None, None)
  if found.a is not None:
    return found
  return found._replace(a=found.w[:, :, :0].astype(dtype), b=found.w[:, :0].astype(dtype))
