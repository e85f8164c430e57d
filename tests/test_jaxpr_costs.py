"""Costs of small programs worked out by hand."""
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from keye_jax import jaxpr_costs
from keye_jax.jaxpr_costs import Cost
from keye_jax.steps import update
from pallas_kernels.equation import equation

SIZES = {'data': 4, 'expert': 2}
P = jax.P


def cost(fn, *arrays, rules=None):
  """Of `fn` on a mesh of 4 x 2; arrays as (shape, spec)."""
  mesh = AbstractMesh((4, 2), tuple(SIZES), (AxisType.Explicit,) * 2)
  with jax.sharding.use_abstract_mesh(mesh):
    shapes = [jax.ShapeDtypeStruct(shape, 'float32', sharding=jax.NamedSharding(mesh, spec)) for shape, spec in arrays]
    return jaxpr_costs.of_program(jax.make_jaxpr(fn)(*shapes), SIZES, rules or {})


def test_a_scan_counts_its_length_and_a_branch_its_larger_side():
  def fn(x, w):
    def step(x, w):
      return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x), None
    return jax.lax.scan(step, x, w)[0]
  got = cost(fn, ((16, 8), P('data', None)), ((5, 8, 8), P()))
  assert got.flops == 5 * 2 * (2 * 16 * 8 * 8) / 4         # rows lie over 4 devices
  product = (2 * 16 * 8 / 4 + 8 * 8) * 4                   # reads x, w, writes the result
  ends = (2 * 16 * 8 / 4 + 5 * 8 * 8) * 4
  assert got.bytes == pytest.approx(5 * 2 * product + 5 * 8 * 8 * 4 + ends, rel=0.02)       # and w once a scan


def test_a_loop_of_at_most_one_round_counts_once():
  got = cost(lambda x, w: update.when(x.sum() > 0, lambda x: x @ w, x), ((16, 8), P('data', None)), ((8, 8), P()))
  assert got.flops == 2 * 16 * 8 * 8 / 4


def test_gathered_weights_and_their_gradient():
  """x [rows over data] times w [rows over data], gathered first: an all-gather forward, and backward a reduce-scatter,
  since the gradient is cut again at once."""
  def loss(w, x):
    return jnp.sum(x @ jax.sharding.reshard(w, P()))
  got = cost(jax.grad(loss), ((8, 16), P('data', None)), ((32, 8), P('data', None)))
  gathered = 8 * 16 * 4 * 3 / 4
  assert got.sent == {'data': gathered + gathered}
  assert got.flops == 2 * 2 * 32 * 8 * 16 / 4              # forward, and the gradient of w


def test_a_sum_that_is_used_at_once_is_an_all_reduce():
  got = cost(lambda x, w: jnp.einsum('ab,bc->ac', x, w, out_sharding=P()) * 2, ((4, 8), P(None, 'data')),
             ((8, 16), P('data', None)))
  assert got.sent == {'data': 2 * 4 * 16 * 4 * 3 / 4}


def test_reshard_between_dimensions_is_an_all_to_all():
  got = cost(lambda x: jax.sharding.reshard(x, P(None, 'expert')), ((8, 16), P('expert', None)))
  assert got.sent == {'expert': 8 * 16 * 4 / 2 / 2}
  assert cost(lambda x: jax.sharding.reshard(x, P('expert')), ((8,), P())).sent == {}


def test_collectives_inside_shard_map():
  def fn(x):
    def local(x):
      y = jax.lax.all_gather(x, 'expert', tiled=True)      # [4, 8] -> [8, 8]
      return jax.lax.psum_scatter(y @ y, 'expert', tiled=True)
    return jax.shard_map(local, in_specs=P(('data', 'expert')), out_specs=P(('data', 'expert')), check_vma=False)(x)
  got = cost(fn, ((32, 8), P(('data', 'expert'), None)))
  assert got.flops == 2 * 8 * 8 * 8
  assert got.sent == {'expert': 2 * 8 * 8 * 4 / 2}


def test_an_op_has_a_rule_and_a_loop_without_one_is_refused():
  def loop(n, x):
    return jax.lax.fori_loop(0, n[0].astype(int), lambda i, x: x @ x, x)
  arrays = ((1,), P()), ((8, 8), P())
  with pytest.raises(ValueError, match='a loop without a known length outside of any op'):
    cost(loop, *arrays)
  rules = {'op_forward': lambda N: Cost(flops=7.0 * N)}

  def step(n, x):
    return jax.checkpoint(functools.partial(equation('op_forward', loop, N=8), n))(x)
  assert cost(step, *arrays, rules=rules).flops == 56
  jaxpr = jax.make_jaxpr(step)(jnp.ones(1), jnp.ones((8, 8))).jaxpr
  assert jaxpr_costs.implementations(jaxpr, rules) == {'op_forward': {('xla', (('N', 8),))}}
