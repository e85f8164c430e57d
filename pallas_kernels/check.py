"""`python -m pallas_kernels.check`: the ops that have kernels, as they run on this machine's devices, against their
definitions in full precision. On a CPU the tests do more.

Exit code 1 when a row is over its limit. Rows: relative errors (norm of the difference over the norm) of outputs and
gradients, the share of queries whose selection differs (of keys that are equal up to rounding another may be kept), and
whether a second run gives other bits.

B batch, T query time, S key time, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim.
"""
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dsa_attention import dsa_attention
from pallas_kernels.dsa_decode import PAGE, Pages, dsa_decode, eight_bits
from pallas_kernels.grouped_matmul import routed_swiglu
from pallas_kernels.indexer_warmup import indexer_warmup

LIMIT = {'float32': 1e-5, 'bfloat16': 1e-2}
SELECTION = 1e-3           # share of queries that may differ


class Case(NamedTuple):
  """Shape of a case: T new tokens of a row of S, of which `first` are another sample."""
  dtype: str
  T: int
  S: int
  topk: int
  first: int = 0
  H: int = 32
  G: int = 4
  K: int = 128
  I: int = 16  # noqa: E741
  J: int = 64


CASES = (Case('bfloat16', 1024, 5120, 256), Case('float32', 1000, 1000, 100, 333, H=9, G=3, K=64, I=4, J=36))


class Found(NamedTuple):
  op: str
  case: Case
  what: str
  error: float
  limit: float


def inputs(case: Case, batch: int = 1) -> tuple[jax.Array, ...]:
  """Random arguments of dsa_attention; queries are the last T tokens."""
  keys = iter(jax.random.split(jax.random.key(case.T), 6))
  normal = lambda *shape: jax.random.normal(next(keys), (batch, *shape))
  model = lambda *shape: normal(*shape).astype(case.dtype)
  T, S = case.T, case.S
  arrays = model(T, case.H, case.K), model(S, case.G, case.K), model(S, case.G, case.K)
  index = model(T, case.I, case.J), model(S, case.J), normal(T, case.I) * case.J ** -0.5
  place_S = jnp.arange(S, dtype=jnp.int32)
  segment_BS = jnp.tile(jnp.where(place_S < case.first, 1 << 8, 2 << 8), (batch, 1))
  order_BS = jnp.tile(jnp.where(place_S < case.first, place_S, place_S - case.first), (batch, 1))
  return *arrays, *index, segment_BS[:, S - T:], segment_BS, order_BS[:, S - T:], order_BS


def attention(case: Case, implementation: str) -> Callable:
  """(cotangent of o, arguments) -> ((outputs, gradients), selection)."""
  def run(do, *x):
    def loss(*floats):
      out = dsa_attention(*floats, *x[6:], topk=case.topk, implementation=implementation)
      return (out.o_BTHK.astype(jnp.float32) * do).sum() + out.kl_BT.sum(), out
    gradients, out = jax.grad(loss, range(6), has_aux=True)(*x[:6])
    return (*out[:3], *gradients), out.selection
  return jax.jit(run)


def dense(case: Case, implementation: str) -> Callable:
  def run(do, q, k, v, *places):
    def loss(*floats):
      out = dense_attention(*floats, *places, implementation=implementation)
      return (out[0].astype(jnp.float32) * do).sum(), out
    gradients, out = jax.grad(loss, range(3), has_aux=True)(q, k, v)
    return (*out, *gradients), None
  return jax.jit(run)


def warmup(case: Case, implementation: str) -> Callable:
  def run(q, k, lse, iq, ik, gate, *places):
    def loss(*index):
      kl_BT = indexer_warmup(q, k, lse, *index, *places, implementation=implementation)
      return kl_BT.sum(), kl_BT
    gradients, kl_BT = jax.grad(loss, range(3), has_aux=True)(iq, ik, gate)
    return (kl_BT, *gradients), None
  return jax.jit(run)


def experts(case: Case, implementation: str) -> Callable:
  def run(dy, x, expert, *rest):
    def loss(x, *rest):
      y_ND = routed_swiglu(x, expert, *rest, implementation, devices=2)
      return (y_ND.astype(jnp.float32) * dy).sum(), y_ND
    gradients, y_ND = jax.grad(loss, range(4), has_aux=True)(x, *rest)
    return (y_ND, *gradients), None
  return jax.jit(run)


def picks(case: Case, E: int = 8, K: int = 2):
  """Arguments of `experts`: of twice as many experts, half of which another device has; features are those of q."""
  D, F = case.H * case.K // 8, case.G * case.K
  keys = iter(jax.random.split(jax.random.key(case.S), 6))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  expert_NK = jax.random.randint(next(keys), (case.T, K), 0, 2 * E)
  matrices = ((normal(E, i, o) * i ** -0.5).astype(case.dtype) for i, o in ((D, 2 * F), (F, D)))
  x_ND, weight_NK = normal(case.T, D).astype(case.dtype), jax.nn.softmax(normal(case.T, K))
  return normal(case.T, D), x_ND, expert_NK, weight_NK, *matrices


def decoding(case: Case, implementation: str) -> Callable:
  def run(*x):
    out = dsa_decode(*x, topk=case.topk, implementation=implementation)
    return (out.o_BTHK, out.lse_BTH), out.selection
  return jax.jit(run)


def pages(case: Case, eight: bool):
  """Arguments of dsa_decode: three sequences of different lengths, three new tokens each."""
  capacity = case.S // PAGE * PAGE
  x = inputs(case._replace(T=3, S=capacity, first=0), 3)
  cut = lambda a: a.reshape(-1, PAGE, *a.shape[2:])
  ik, scale = eight_bits(cut(x[4])) if eight else (cut(x[4]), None)
  table = jnp.arange(3 * capacity // PAGE, dtype=jnp.int32).reshape(3, -1)
  return x[0], Pages(cut(x[1]), cut(x[2]), ik, scale), x[3], x[5], table, jnp.asarray([capacity, capacity // 2 + 5, 2])


def compare(op: str, case: Case, names: tuple[str, ...], make: Callable, arguments: tuple,
            form: str = '') -> Iterator[Found]:
  run = make(case, dispatch.choose(op, None))       # by name: also where rows this short are left to XLA
  (values, chosen), again = run(*arguments), run(*arguments)
  with jax.default_matmul_precision('highest'):
    wanted, right = make(case, 'reference')(*arguments)
  for name, got, want in zip(names, values, wanted):
    yield Found(op + form, case, name, relative(got, want), LIMIT[case.dtype])
  if chosen is not None:
    differ = (chosen.last_BT != right.last_BT).mean()
    yield Found(op + form, case, 'selection', float(differ), SELECTION)
  equal = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves((values, chosen)), jax.tree.leaves(again)))
  yield Found(op + form, case, 'other bits', float(not equal), 0)


def relative(got, want) -> float:
  got, want = got.astype(jnp.float32), want.astype(jnp.float32)
  return float(jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-30))


def rows(cases: tuple[Case, ...] = CASES) -> Iterator[Found]:
  for case in cases:
    x = inputs(case)
    do = jax.random.normal(jax.random.key(1), x[0].shape)
    names = 'o', 'lse', 'kl', 'dq', 'dk', 'dv', 'diq', 'dik', 'dgate'
    yield from compare('dsa_attention', case, names, attention, (do, *x))
    _, lse_BTH = dense_attention(*x[:3], *x[6:], implementation='reference')
    yield from compare('dense_attention', case, ('o', 'lse', 'dq', 'dk', 'dv'), dense, (do, *x[:3], *x[6:]))
    yield from compare('indexer_warmup', case, ('kl', 'diq', 'dik', 'dgate'), warmup, (*x[:2], lse_BTH, *x[3:]))
    yield from compare('routed_swiglu', case, ('y', 'dx', 'dweight', 'dgate_up', 'ddown'), experts, picks(case))
    for eight in (False, True):
      yield from compare('dsa_decode', case, ('o', 'lse'), decoding, pages(case, eight), ' 8 bits' * eight)


def main() -> int:
  ops = 'index_select', 'dsa_attention', 'dsa_decode', 'dense_attention', 'indexer_warmup', 'routed_swiglu'
  print(f'{jax.devices()[0].device_kind}: ' + ', '.join(f'{op} {dispatch.choose(op, None)}' for op in ops))
  bad = 0
  for found in rows():
    c, over = found.case, not found.error <= found.limit
    bad += over
    print(f'{found.op:<17} {c.dtype:<8} {c.T:>5}/{c.S:<5} heads {c.H}/{c.G} of {c.K}, {c.I} of {c.J}  '
          f'{found.what:<10} {found.error:9.2e}  limit {found.limit:g}' + ('  OVER' if over else ''), flush=True)
  print(f'{bad} over their limit' if bad else 'all within their limits')
  return int(bad > 0)


if __name__ == '__main__':
  sys.exit(main())
