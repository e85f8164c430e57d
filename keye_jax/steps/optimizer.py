"""The optimizer: two groups of parameters, each with its own learning rate and clip norm.

Which rule a weight gets follows from its path: `indexer` anywhere in it puts it in the indexer's group, and the last
name tells a matrix from a norm, a bias or a table.
"""
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from data_pipelines.errors import InputError
from keye_jax.config import OptimizerConfig
from pallas_kernels import dispatch

MUON_BETA, MUON_RMS = 0.95, 0.2      # arXiv 2502.16982 section 2.2: an update of AdamW's size, so its rate fits both

_ROWS = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
_HEADS_OUT = MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
_HEADS_IN = MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
# Hidden matrices. Leading axes (layers, experts) are batches of matrices. Embedding, head, router and patch weights
# stay with AdamW, as in the reference recipe.
MUON_AXES = {'q': _HEADS_OUT, 'k': _HEADS_OUT, 'v': _HEADS_OUT, 'o': _HEADS_IN,
             'gate_up': _ROWS, 'down': _ROWS, 'fc1': _ROWS, 'fc2': _ROWS}


def rates(cfg: OptimizerConfig, steps: int) -> Callable[[int], dict[str, float]]:
  """Step 0, 1, ... -> learning rate of each group: a line up to the peak, then cosine, line or nothing down from it.

  Step i of a warm-up of W runs at peak * (i + 1) / W, the last step (steps - 1) at peak * final_fraction. Rates are
  arguments of the training step, so runs that differ in length or rates share its program. Raises InputError when the
  warm-up is not shorter than the run.
  """
  W, f = cfg.warmup_steps, cfg.final_fraction
  if W >= steps:
    raise InputError(f'optimizer.warmup_steps = {W} must be below train.steps = {steps}')
  shape = {'cosine': lambda t: f + (1 - f) * 0.5 * (1 + math.cos(math.pi * t)),
           'linear': lambda t: 1 - (1 - f) * t,
           'constant': lambda t: 1.0}[cfg.schedule]

  def at(step: int) -> dict[str, float]:
    t = min(max(step - W, 0) / max(steps - 1 - W, 1), 1.0)
    scale = (step + 1) / W if step < W else shape(t)
    return {'model': cfg.learning_rate * scale, 'indexer': cfg.indexer_learning_rate * scale}

  return at


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
  """AdamW or Muon for the model, AdamW for the indexer; global-norm clipping inside each group.

  The groups share nothing: a large indexer gradient cannot shrink the model's step, nor the other way round. The
  update takes `rates={'model': ..., 'indexer': ...}` and `norms=group_norms(grads)`.
  """
  adamw = optax.adamw(1.0, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=decayed)
  model = adamw
  if cfg.name == 'muon':
    muon = optax.contrib.muon(1.0, beta=MUON_BETA, eps=cfg.eps, weight_decay=cfg.weight_decay,
                              consistent_rms=MUON_RMS, muon_weight_dimension_numbers=muon_axes)
    model = optax.partition({'matrix': outside_explicit_sharding(muon), 'rest': adamw},
                            _by_path(lambda path: 'matrix' if path[-1] in MUON_AXES else 'rest'))

  def group(name, clip_norm, tx):
    return optax.chain(clip(name, clip_norm), tx, scale_by_rate(name))
  return optax.partition({'model': group('model', cfg.clip_norm, model),
                          'indexer': group('indexer', cfg.indexer_clip_norm, adamw)}, groups)


def clip(group: str, limit: float) -> optax.GradientTransformationExtraArgs:
  """Scales gradients whose norm, `norms[group]` given at each update, is above `limit` down to it."""
  def update(updates, state, params=None, *, norms, **_):
    if not jax.tree.leaves(updates):      # a model without an indexer
      return updates, state
    scale = jnp.minimum(1.0, limit / jnp.maximum(norms[group], 1e-30))
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates), state
  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def group_norms(grads) -> dict[str, jax.Array]:
  """Global L2 norm, float32, of the gradients of each group that there is."""
  labels, leaves = jax.tree.leaves(groups(grads)), jax.tree.leaves(grads)
  return {group: norm([g for g, label in zip(leaves, labels) if label == group]) for group in sorted(set(labels))}


def norm(arrays) -> jax.Array:
  """L2 norm of all arrays together, float32.

  XLA for CPUs adds up a plain sum of squares on one core, and products of rows with themselves hardly faster: a fifth
  and 3% of a training step. A product of squares with ones it does in a sixth of that, which an accelerator would not.
  """
  cpu = dispatch.platform() == 'cpu'

  def squares(x):
    sharding = jax.typeof(x).sharding
    rows = None if sharding.mesh.empty else jax.P(*sharding.spec[:-1])
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
                            out_sharding=rows)
    if not cpu:
      return dot('...d,...d->...', x, x).sum()
    return dot('...d,d->...', jnp.square(x.astype(jnp.float32)), jnp.ones(x.shape[-1:])).sum()
  return jnp.sqrt(sum(map(squares, arrays)))


def scale_by_rate(group: str) -> optax.GradientTransformationExtraArgs:
  """Multiplies by `rates[group]`, given at each update."""
  def update(updates, state, params=None, *, rates, **_):
    return jax.tree.map(lambda u: u * rates[group], updates), state
  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def groups(params):
  """Tree of 'model' or 'indexer'."""
  return _by_path(lambda path: 'indexer' if 'indexer' in path else 'model')(params)


def decayed(params):
  """Tree of bools: weight decay touches matrices, not norms, biases, the indexer's gate or position tables.

  The packing position table is part of the checkpoint but not of the forward pass: decay would erase it.
  """
  def one(path):
    name = path[-1]
    return not (name.endswith(('norm', 'scale', 'bias', 'position')) or name == 'gate')
  return _by_path(one)(params)


def muon_axes(params):
  """Tree of MuonDimensionNumbers."""
  return _by_path(lambda path: MUON_AXES[path[-1]])(params)


def _by_path(fn: Callable[[tuple[str, ...]], object]) -> Callable:
  return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: fn(tuple(p.key for p in path)), tree)


def outside_explicit_sharding(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` with its update under automatic sharding; what comes out keeps the shardings that went in.

  Muon reshapes and transposes weights, which explicit sharding refuses on sharded axes.
  """
  def update(updates, state, params=None):
    if jax.sharding.get_abstract_mesh().empty:
      return tx.update(updates, state, params)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
    return jax.sharding.auto_axes(tx.update, out_sharding=specs)(updates, state, params)

  return optax.GradientTransformation(tx.init, update)
