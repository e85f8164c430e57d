"""The training step, and the only place that differentiates.

Every algorithm's step is `make_update(apply, objective, tx)`: they differ in the objective and in the batch.
"""
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from data_pipelines.errors import InputError
from keye_jax.objectives.common import Metrics, Objective, over
from keye_jax.steps import rounding
from keye_jax.steps.optimizer import group_norms
from keye_jax.steps.state import State, merge

GRADIENT_NORM = {'model': 'grad_norm', 'indexer': 'indexer_grad_norm'}      # group -> metric


def make_update(apply: Callable[[Any, Any], Any], objective: Objective, tx: optax.GradientTransformation,
                accumulate: int = 1) -> Callable[..., tuple[State, Metrics]]:
  """Returns a jitted pure function (state, batch, rates, limit=inf) -> (state, metrics).

  rates: learning rate of each optimizer group, see `optimizer.rates`; another value needs no other program.
  limit: a step whose metric `loss` is above it is skipped.
  The optimizer works in float32 whatever the parameters are kept in (`rounding.py`).
  Everything of the state but its frozen parameters is donated. A step whose loss or gradient is not finite, or above
  the limit, changes neither parameters nor optimizer state; its metrics are zero with zero weight, `skipped` counts it,
  and `spikes` those above the limit.

  Args:
    apply: (params, batch) -> what the objective takes as output.
    accumulate: number of micro-batches; rows i, i + accumulate, ... of the batch form micro-batch i, so that under a
      mesh every device keeps its own rows. Denominators are those of the whole batch, whatever the number.
  """
  def loss(train, frozen, batch, totals):
    return objective.loss(apply(merge(train, frozen), batch), batch, totals)

  def gradient(train, frozen, batch):
    grad = jax.value_and_grad(loss, has_aux=True)
    totals = objective.totals(batch)
    if accumulate == 1:
      (value, metrics), grads = grad(train, frozen, batch, totals)
      return value, metrics, grads

    def one(summed, part):
      (value, metrics), grads = grad(train, frozen, part, totals)
      return jax.tree.map(lambda s, g: s + g.astype(s.dtype), summed, grads), (value, metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), train)
    grads, (values, stacked) = jax.lax.scan(one, zeros, micro_batches(batch, accumulate))
    return jnp.sum(values), jax.tree.map(lambda m: jnp.sum(m, 0), stacked), grads

  tx = optax.with_extra_args_support(tx)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(live, frozen, batch, rates, limit):
    count, train, opt, rng = live
    value, metrics, grads = gradient(train, frozen, batch)
    norms = group_norms(grads)
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(n) for n in norms.values()], jnp.isfinite(value))
    spike = finite & (over(metrics['loss'][1], metrics['loss'][0]) > limit)
    ok = finite & ~spike

    def take(train, opt, grads):
      changes, opt = tx.update(rounding.float32(grads), opt, train, rates=rates, norms=norms)
      return rounding.apply_updates(train, changes, jax.random.fold_in(rng, count)), opt

    train, opt = when(ok, lambda both: take(*both, grads), (train, opt))
    one = jnp.float32(1)
    metrics = metrics | {GRADIENT_NORM[group]: (norm, one) for group, norm in norms.items()}
    metrics = jax.tree.map(lambda m: jnp.where(ok, m, 0).astype(jnp.float32), metrics)
    metrics['skipped'] = (1 - ok.astype(jnp.float32), one)
    metrics['spikes'] = (spike.astype(jnp.float32), one)
    return (count + 1, train, opt, rng), metrics

  def update(state: State, batch: Any, rates: dict[str, float], limit: float = math.inf) -> tuple[State, Metrics]:
    live = (state.step, state.train, state.opt, state.rng)
    (count, train, opt, rng), metrics = step(live, state.frozen, batch, rates, limit)
    return State(count, train, state.frozen, opt, rng), metrics

  return update


def when(ok: jax.Array, fn: Callable[[Any], Any], value: Any) -> Any:
  """fn(value) where `ok`, a scalar, else `value`: a loop of at most one round.

  A choice between old and new values would copy the optimizer state to keep both, and XLA for CPUs runs the branches
  of `lax.cond` on one core.
  """
  return jax.lax.while_loop(lambda carry: carry[0], lambda carry: (False, fn(carry[1])), (ok, value))[1]


def make_measure(apply: Callable[[Any, Any], Any], objective: Objective) -> Callable[[Any, Any, Any], Metrics]:
  """Returns a jitted pure function (trained parameters, frozen ones, batch) -> metrics, without a gradient."""
  @jax.jit
  def measure(train, frozen, batch):
    return objective.loss(apply(merge(train, frozen), batch), batch, objective.totals(batch))[1]
  return measure


def micro_batches(batch: Any, n: int) -> Any:
  """Leaves [B, ...] -> [n, B/n, ...], rows dealt in turn. Raises InputError when n does not divide B."""
  def one(x):
    B = x.shape[0]
    if B % n:
      raise InputError(f'train.batch = {B} rows cannot be cut into train.accumulate = {n} equal micro-batches')
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
      return jnp.moveaxis(x.reshape(B // n, n, *x.shape[1:]), 1, 0)
    rows, *rest = sharding.spec
    cut = jax.lax.reshape(x, (B // n, n, *x.shape[1:]), out_sharding=jax.P(rows, None, *rest))
    return jnp.moveaxis(cut, 1, 0)
  return jax.tree.map(one, batch)
