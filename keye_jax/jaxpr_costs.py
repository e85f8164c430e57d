"""What one device does in a program: FLOPs, bytes and traffic between devices, counted on its jaxpr.

The compiler's own account counts the body of a loop once and nothing inside a kernel. Here a scan counts its length
times, and a pass of an op (`pallas_kernels/equation.py`), whose loops depend on data, is counted by a rule of its own.

Arrays outside `shard_map` are whole and carry their sharding in their type (explicit mesh); inside it they are a
device's own.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pallas_kernels.equation import parse


class Cost(NamedTuple):
  """Of one device."""
  flops: float = 0.0            # of matrix products that the result needs; a multiply-add is 2
  masked: float = 0.0           # further FLOPs on masked places of a tile, at most
  bytes: float = 0.0            # read from and written to HBM, when everything elementwise is fused into its neighbours
  apart: float = 0.0            # further bytes, at most: when neighbouring queries that read together share no key
  sent: Mapping[str, float] = {}     # mesh axis -> bytes that a device sends along it


Rule = Callable[..., Cost]        # dimensions of an op's pass, by keyword -> its cost

ALIKE = ('transpose', 'convert_element_type', 'reshape', 'squeeze', 'expand_dims', 'copy')
READS = ('gather', 'dynamic_slice')
WRITES = {'dynamic_update_slice': 1, 'scatter': 2, 'scatter-add': 2, 'scatter_add': 2}       # place of the update
REDUCTIONS = ('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'argmax', 'argmin')
PASSES_OVER = ('sort', 'cumsum', 'top_k')


def plus(*costs: Cost) -> Cost:
  axes = {axis for c in costs for axis in c.sent}
  return Cost(*(sum(c[i] for c in costs) for i in range(4)), {a: sum(c.sent.get(a, 0) for c in costs) for a in axes})


def times(cost: Cost, n: float) -> Cost:
  return Cost(*(n * x for x in cost[:4]), {axis: n * x for axis, x in cost.sent.items()})


def of_program(closed: ClosedJaxpr, sizes: Mapping[str, int], rules: Mapping[str, Rule]) -> Cost:
  """Cost of a whole program, its arguments read and its results written once.

  sizes: of the mesh axes. Raises ValueError for a loop without a known length or a kernel outside of any rule.
  """
  walk = Walk(sizes, rules)
  cost, waiting = walk.jaxpr(closed.jaxpr, [None] * len(closed.jaxpr.invars))
  ends = (*closed.jaxpr.invars, *closed.jaxpr.outvars)
  return plus(cost, Cost(bytes=sum(walk.bytes(v) for v in ends)),
              *(walk.reduced(v, axes) for v, axes in zip(closed.jaxpr.outvars, waiting) if axes))


def implementations(jaxpr: Jaxpr, rules: Mapping[str, Rule]) -> dict[str, set[tuple]]:
  """{pass of an op: {('pallas' or 'xla', ((dimension, size), ...))}}: how the program does it."""
  found: dict[str, set[tuple]] = {}
  for eqn in jaxpr.eqns:
    if op := ruled(eqn, rules):
      how = 'pallas' if holds(eqn, ('pallas_call',)) else 'xla'
      found.setdefault(op[0], set()).add((how, tuple(op[1].items())))
    for inner in inside(eqn):
      for name, how in implementations(inner, rules).items():
        found.setdefault(name, set()).update(how)
  return found


def once(params: Mapping[str, Any]) -> bool:
  """Whether a `while` runs at most one round: it goes on while a flag of its carry is set, and the round clears it."""
  cond, body = params['cond_jaxpr'].jaxpr, params['body_jaxpr'].jaxpr
  goes_on, carry = cond.outvars[0], list(cond.invars)[params['cond_nconsts']:]
  if goes_on not in carry:
    return False
  after = body.outvars[carry.index(goes_on)]
  return isinstance(after, Literal) and not after.val


def ruled(eqn, rules: Mapping[str, Rule]) -> tuple[str, dict[str, int]] | None:
  """(name, dimensions) of a pass of an op; None for other equations, and for the part of a pass that jax moved out of
  a loop, which prepares tiles and holds no products."""
  name, dims = parse(eqn.params.get('name') or '') if eqn.primitive.name == 'jit' else ('', {})
  return (name, dims) if name in rules and holds(eqn, ('pallas_call', 'dot_general')) else None


def holds(eqn, names: Sequence[str]) -> bool:
  """Whether an equation is, or has inside, one of these primitives."""
  return eqn.primitive.name in names or any(holds(e, names) for inner in inside(eqn) for e in inner.eqns)


def inside(eqn) -> list[Jaxpr]:
  flat = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else [value])]
  return [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in flat if isinstance(v, (Jaxpr, ClosedJaxpr))]


class Walk(NamedTuple):
  """The counting itself. A sum over a sharded axis is not paid at once: it *waits* on its variable, since a result that
  is sharded next is reduce-scattered, at half the traffic of the all-reduce that any other use needs."""
  sizes: Mapping[str, int]
  rules: Mapping[str, Rule]

  def jaxpr(self, jaxpr: Jaxpr, waiting_in: Sequence[tuple[str, ...] | None]):
    """(cost, axes that each result still waits for a sum over)."""
    waiting = {v: axes for v, axes in zip(jaxpr.invars, waiting_in) if axes}
    costs = []
    for eqn in jaxpr.eqns:
      inputs = [None if isinstance(v, Literal) else waiting.get(v) for v in eqn.invars]
      cost, left = self.equation(eqn, inputs)
      costs.append(cost)
      for v, axes in zip(eqn.invars, inputs):
        if axes:                       # paid, or handed on
          waiting.pop(v, None)
      waiting.update({v: axes for v, axes in zip(eqn.outvars, left) if axes})
    return plus(*costs), [None if isinstance(v, Literal) else waiting.get(v) for v in jaxpr.outvars]

  def equation(self, eqn, waiting):
    name, nothing = eqn.primitive.name, [None] * len(eqn.outvars)
    if name in ALIKE:
      return Cost(), waiting[:1]
    if name == 'reshard':
      return self.reshard(eqn, waiting[0] or ()), nothing
    if op := ruled(eqn, self.rules):
      return plus(self.rules[op[0]](**op[1]), self.paid(eqn, waiting)), nothing
    if name in ('scan', 'while', 'cond', 'pallas_call'):
      return plus(self.paid(eqn, waiting), self.control(eqn)), nothing
    bodies = inside(eqn)
    if len(bodies) == 1 and len(bodies[0].invars) == len(eqn.invars):
      return self.jaxpr(bodies[0], waiting)
    cost = plus(self.paid(eqn, waiting), *(self.jaxpr(b, [None] * len(b.invars))[0] for b in bodies))
    if name in ('psum', 'psum_invariant'):
      return cost, [tuple(a for a in eqn.params['axes'] if isinstance(a, str))] * len(eqn.outvars)
    if name == 'dot_general':
      one, axes = self.dot(eqn)
      return plus(cost, one), [axes]
    if name in REDUCTIONS:
      spec = self.spec(eqn.invars[0])
      return cost, [tuple(a for i in eqn.params['axes'] for a in spec[i])] * len(eqn.outvars)
    return plus(cost, self.moved(eqn)), nothing

  def control(self, eqn) -> Cost:
    name, params = eqn.primitive.name, eqn.params
    if name == 'scan':
      body = params['jaxpr'].jaxpr
      cost, waiting = self.jaxpr(body, [None] * len(body.invars))
      cost = plus(cost, *(self.reduced(v, axes) for v, axes in zip(body.outvars, waiting) if axes))
      # What is scanned over has an axis more outside than inside; jax names the counts differently from 0.12 on.
      ends = [v for v, inner in zip((*eqn.invars, *eqn.outvars), (*body.invars, *body.outvars))
              if v.aval.ndim > inner.aval.ndim]
      return plus(times(cost, params['length']), Cost(bytes=sum(map(self.bytes, ends))))
    if name == 'cond':
      return max((self.closed(b) for b in params['branches']), key=lambda c: (c.flops, c.bytes))
    if name == 'while' and once(params):
      return self.closed(params['body_jaxpr'])
    what = 'loop without a known length' if name == 'while' else 'Pallas kernel'
    raise ValueError(f'a {what} outside of any op that has a cost rule: {eqn.source_info.name_stack}')

  def closed(self, closed: ClosedJaxpr) -> Cost:
    cost, waiting = self.jaxpr(closed.jaxpr, [None] * len(closed.jaxpr.invars))
    return plus(cost, *(self.reduced(v, axes) for v, axes in zip(closed.jaxpr.outvars, waiting) if axes))

  def dot(self, eqn) -> tuple[Cost, tuple[str, ...]]:
    (contract, _), _ = eqn.params['dimension_numbers']
    left, right = eqn.invars
    out, = eqn.outvars
    inner = [left.aval.shape[i] for i in contract]
    sharded = {a for v in (left, right) for axes in self.spec(v) for a in axes}
    flops = 2.0 * math.prod(out.aval.shape) * math.prod(inner) / self.count(sharded)
    summed = tuple(a for i in contract for a in self.spec(left)[i])
    return Cost(flops, bytes=sum(map(self.bytes, (left, right, out)))), summed

  def moved(self, eqn) -> Cost:
    """Traffic of what is neither a product nor elementwise: reads and writes of memory, and collectives."""
    name = eqn.primitive.name
    into, out = sum(map(self.bytes, eqn.invars)), sum(map(self.bytes, eqn.outvars))
    if name in READS:
      return Cost(bytes=2 * out)
    if name in WRITES:
      return Cost(bytes=2 * self.bytes(eqn.invars[WRITES[name]]))
    if name in PASSES_OVER:
      return Cost(bytes=into + out)
    axes = eqn.params.get('axis_name') or eqn.params.get('axes') or ()
    axes = (axes,) if isinstance(axes, str) else tuple(a for a in axes if isinstance(a, str))
    if name in ('all_gather', 'all_gather_invariant'):
      return Cost(sent=self.along(axes, out))
    if name in ('reduce_scatter', 'all_to_all', 'ragged_all_to_all'):
      return Cost(sent=self.along(axes, into))
    if name in ('pmax', 'pmin'):
      return Cost(sent=self.along(axes, 2 * into))
    if name == 'ppermute':
      return Cost(sent={axes[0]: into})
    return Cost()

  def reshard(self, eqn, waiting: tuple[str, ...]) -> Cost:
    """Axes that shard only the result cut for nothing (or reduce-scatter what waits for a sum over them), axes that
    change dimension are an all-to-all, axes that shard only the input are gathered."""
    before, after = self.spec(eqn.invars[0]), self.spec(eqn.outvars[0])
    at = lambda spec: {a: i for i, axes in enumerate(spec) for a in axes}
    had, has = at(before), at(after)
    size, costs = float(self.bytes(eqn.invars[0])), []
    rest = tuple(a for a in waiting if a not in has)
    for axis in has:
      if axis not in had:
        if axis in waiting:
          costs.append(self.along((axis,), size))
        size /= self.sizes[axis]
      elif had[axis] != has[axis]:
        costs.append(self.along((axis,), size))
    costs.append(self.along(rest, 2 * size))
    gone = tuple(a for a in had if a not in has)
    costs.append(self.along(gone, size * self.count(gone)))
    return plus(*(Cost(sent=sent) for sent in costs))

  def paid(self, eqn, waiting) -> Cost:
    """All-reduces of the inputs that still wait for one."""
    return plus(*(self.reduced(v, axes) for v, axes in zip(eqn.invars, waiting) if axes))

  def reduced(self, v, axes: tuple[str, ...]) -> Cost:
    return Cost(sent=self.along(axes, 2 * self.bytes(v)))

  def along(self, axes: Sequence[str], whole: float) -> dict[str, float]:
    """Bytes a device sends along each axis to gather `whole` bytes over all of them: over the last axis first."""
    sent = {}
    for axis in axes:
      n = self.sizes[axis]
      sent[axis] = sent.get(axis, 0.0) + whole * (n - 1) / n
      whole /= n
    return sent

  def spec(self, v) -> list[tuple[str, ...]]:
    """Mesh axes of each dimension."""
    sharding = getattr(v.aval, 'sharding', None)
    shape = getattr(v.aval, 'shape', ())
    entries = tuple(sharding.spec) if sharding is not None else ()
    entries += (None,) * (len(shape) - len(entries))
    names = [e if isinstance(e, tuple) else (e,) if e else () for e in entries]
    return [tuple(a for a in axes if a in self.sizes) for axes in names]

  def count(self, axes) -> int:
    return math.prod(self.sizes[a] for a in axes)

  def bytes(self, v) -> float:
    """Of a device's own part."""
    aval = v.aval
    if not hasattr(aval, 'shape'):
      return 0.0
    return math.prod(aval.shape) * aval.dtype.itemsize / self.count(a for axes in self.spec(v) for a in axes)
