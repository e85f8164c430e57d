"""What a run would need of devices that are not here: its real programs, compiled ahead of time for them.

The training steps are those of `begin.py`, the others those of `rollout/sampler.py`, on arrays that have shapes and
shardings and no content. The caller has set the mesh of the absent devices (`sharding.use_mesh`).
"""
import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from data_pipelines.errors import InputError
from data_pipelines.schema import Batch, PolicyBatch
from keye_jax import begin, feed, jaxpr_costs, sharding, temporaries
from keye_jax.chips import CHIPS, Chip
from keye_jax.config import ONLY_INDEXERS, RunConfig, check
from keye_jax.jaxpr_costs import Cost
from keye_jax.nn import costs, counts, keye
from keye_jax.rollout import sampler
from pallas_kernels import dense_attention, dispatch, dsa_attention, grouped_matmul

STEPS = ('train', 'warmup', 'rl')        # with a gradient and an optimizer
WHATS = (*STEPS, 'prefill', 'decode')


def batch_shapes(config: RunConfig) -> Batch:
  """The batch of a step, all hosts together, as ShapeDtypeStructs on the mesh."""
  d, v, B, T = config.data, config.model.vision, config.train.batch, config.data.tokens
  R, N = d.vision_rows, d.vision_patches
  feed.check(config.model.layout, T, R)
  if B % (rows := sharding.extent(config.model.layout, 'batch')):
    raise InputError(f'train.batch = {B} rows cannot be divided over {rows} groups of devices; use a multiple')
  shapes = dict(token_BT=(B, T), target_BT=(B, T), weight_BT=(B, T), position_BT3=(B, T, 3), segment_BT=(B, T),
                order_BT=(B, T), vision_BT=(B, T), patch_BRNC=(B, R, N, v.patch_dim), coord_BRN4=(B, R, N, 4),
                frame_BRN=(B, R, N), origin_BT=(B, T))
  dtypes = {'weight_BT': 'float32', 'patch_BRNC': 'uint8'}
  return Batch(**{name: _batched(config, name, shape, dtypes.get(name, 'int32')) for name, shape in shapes.items()})


def policy_shapes(config: RunConfig) -> PolicyBatch:
  """The same with responses: `data.samples` of a row at most."""
  B, T, M = config.train.batch, config.data.tokens, config.data.samples
  if not M:
    raise InputError('--what rl needs data.samples, the most responses in a row')
  one = functools.partial(_batched, config)
  return PolicyBatch(batch_shapes(config), one('old_logp_BT', (B, T), 'float32'), one('sequence_BT', (B, T), 'int32'),
                     one('advantage_BM', (B, M), 'float32'))


def _batched(config: RunConfig, name: str, shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
  spec = sharding.spec(config.model.layout, *sharding.batch_axes(name, len(shape)))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=_on_mesh(spec))


class Program(NamedTuple):
  """One of `WHATS`, traced."""
  trace: Any                   # jax.stages.Traced
  parts: dict[str, Any]        # what a device holds of the arguments: name -> tree of shapes
  rules: dict[str, jaxpr_costs.Rule]
  model_flops: float           # of all devices: the closed formula (`nn/counts.py`)


def traced(config: RunConfig, what: str = 'train') -> Program:
  """`what` of a run: its training step, supervised, ('warmup') of the indexers alone beside dense attention, or ('rl')
  on a policy's responses; or on its batch the prefill, or one decoding step with caches of its length, both with
  bfloat16 weights in the layout 'decode'."""
  if what == 'warmup':
    config = check(dataclasses.replace(config, model=dataclasses.replace(config.model, attention='warmup'),
                                       train=dataclasses.replace(config.train, freeze=ONLY_INDEXERS)))
  key = jax.eval_shape(lambda: jax.random.key(0))
  if what in STEPS:
    made, shapes = (begin.policy_programs, policy_shapes) if what == 'rl' else (begin.programs, batch_shapes)
    made, batch = made(config), shapes(config)
    state = jax.tree.map(_placed, jax.eval_shape(made.fresh, key))
    # `update` is a plain function around the jitted step; the frozen parameters it hands on are donated too here, which
    # changes no byte: they are an argument, and the same buffer is a result.
    trace = jax.jit(made.update, donate_argnums=0).trace(state, batch, made.rates(0))
    parts = {'parameters': (state.train, state.frozen), 'optimizer': state.opt, 'batch': batch}
    flops = step_flops(config, counts.parts(state.train), counts.parts(state.frozen))
    return Program(trace, parts, costs.rules(config.model), flops)

  model = dataclasses.replace(config.model, layout='decode', param_dtype=config.model.dtype, remat='none')
  config = dataclasses.replace(config, model=model)
  B, T = config.train.batch, config.data.tokens
  params, batch = jax.tree.map(_placed, keye.param_shapes(model)), batch_shapes(config)
  last = jax.ShapeDtypeStruct((B, 1), 'int32', sharding=_on_mesh(sharding.spec('decode', 'batch', None)))
  if what == 'prefill':
    read = functools.partial(sampler.prefill, model, slots=T, sampling=sampler.GREEDY)
    trace = jax.jit(lambda params, batch, last, key: read(params, batch, last, key=key)).trace(params, batch, last, key)
    unread = B * (T - 1) * counts.flops_per_token(model, T)['head']      # logits of the last token alone
    return Program(trace, {'parameters': params, 'batch': batch}, costs.rules(model), forward_flops(config) - unread)
  cache, front = jax.tree.map(_placed, jax.eval_shape(
      functools.partial(sampler.prefill, model, slots=T, sampling=sampler.GREEDY), params, batch, last, key=key))
  one = functools.partial(sampler.step, model, stop=(), sampling=sampler.GREEDY)
  trace = jax.jit(lambda params, cache, front, key: one(params, cache, front, key=key),
                  donate_argnums=1).trace(params, cache, front, key)
  active = sum(counts.active(model).values())
  seen = costs.selected(T, model.text.indexer.topk if model.attention == 'sparse' else T, T)
  text = model.text
  per_token = 2.0 * active + 4.0 * text.layers * text.heads * text.head_dim * seen + (
      2.0 * text.layers * text.indexer.heads * text.indexer.head_dim * T)
  return Program(trace, {'parameters': params, 'cache': cache}, costs.rules(model, costs.every), B * per_token)


def plan(config: RunConfig, chip: Chip, efficiency: float, what: str = 'train') -> dict[str, Any]:
  """Everything `keye plan` says of a run, JSON-able. efficiency: share of its peak that a matrix unit reaches.

  Raises InputError when an op would not run the way a run on these devices runs it.
  """
  program = traced(config, what)
  jaxpr, mesh = program.trace.jaxpr, dict(jax.sharding.get_abstract_mesh().shape)
  ops = implementations(jaxpr.jaxpr, program.rules)
  cost = jaxpr_costs.of_program(jaxpr, mesh, program.rules)
  sizes = {name: _bytes(tree) for name, tree in program.parts.items()}
  found, largest = memory(program.trace, chip)
  return {'what': what, 'mesh': mesh, 'layout': config.model.layout if what in STEPS else 'decode',
          'batch': described(config, what), 'bytes': sizes | found, 'largest': largest, 'ops': ops,
          **roofline(cost, program.model_flops / math.prod(mesh.values()), chip, efficiency, mesh)}


def implementations(jaxpr, rules) -> dict[str, str]:
  """{pass of an op: implementation} of a program. Raises InputError when one is not what `dispatch` chooses for the
  devices of the mesh."""
  found = {}
  for name, ways in sorted(jaxpr_costs.implementations(jaxpr, rules).items()):
    op = name.partition('_forward')[0].partition('_backward')[0]
    for how, dims in sorted(ways):
      expected = chosen(op, **dict(dims))
      if how != ('xla' if expected == 'xla' else 'pallas'):
        raise InputError(f'{name} is compiled as {how}, but {expected!r} is what runs on these devices')
      found.setdefault(name, set()).add(expected)
  return {name: ', '.join(sorted(each)) for name, each in found.items()}


def chosen(op: str, **dims: int) -> str:
  """The implementation of an op that a run takes at these dimensions of its passes."""
  if op == 'dsa_attention':
    return dsa_attention.implementation_of(dims['G'] * dims['N'] // dims['T'], dims['T'], dims['S'])
  if op in ('dense_attention', 'indexer_warmup'):
    return dense_attention.implementation_of(op, dims['T'], dims['S'])
  if op == 'routed_swiglu':
    return grouped_matmul.implementation_of(dims['N'] * dims['K'])
  return dispatch.choose(op, None)


def memory(trace, chip: Chip) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Compiles: (bytes of a device, and how long that took; its largest temporaries, when it fits)."""
  started = time.monotonic()
  try:
    compiled = trace.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return ({'hbm': chip.hbm, 'fits': False, 'compiler': first_lines(e),
             'compile seconds': round(time.monotonic() - started, 1)}, [])
  m = compiled.memory_analysis()
  peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
  return ({'arguments': m.argument_size_in_bytes, 'results': m.output_size_in_bytes - m.alias_size_in_bytes,
           'temporaries': m.temp_size_in_bytes, 'peak': peak, 'hbm': chip.hbm, 'fits': peak <= chip.hbm,
           'compile seconds': round(time.monotonic() - started, 1)}, temporaries.largest(compiled.as_text()))


def first_lines(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return ' '.join(lines[:3])[:600]


def roofline(cost: Cost, model_flops: float, chip: Chip, efficiency: float, mesh: Mapping[str, int]) -> dict[str, Any]:
  """Seconds of one device from the walk of its program.

  model_flops: of one device. At full peak they are a bound: nothing can be faster, since recomputation, masked tiles
  and traffic are not in it.
  """
  rate, link = chip.flops * efficiency, links(chip, mesh)
  seconds = {'compute_s': (cost.flops + cost.masked) / rate, 'hbm_s': (cost.bytes + cost.apart) / chip.hbm_bandwidth,
             'ici_s': sum(sent / link[axis] for axis, sent in cost.sent.items())}
  return {'flops': cost.flops, 'masked_flops': cost.masked, 'hbm_bytes': cost.bytes + cost.apart,
          'sent_bytes': dict(cost.sent), 'efficiency': efficiency, **seconds,
          'compute_s_without_masked': cost.flops / rate, 'hbm_s_without_masked': cost.bytes / chip.hbm_bandwidth,
          'step_s': max(seconds.values()), 'model_flops': model_flops, 'model_flops_bound_s': model_flops / chip.flops}


def links(chip: Chip, mesh: Mapping[str, int]) -> dict[str, float]:
  """Bytes a second that a device sends along each axis of the mesh, whose last axis counts devices next to each other.

  On a torus an axis is a ring over one dimension, whose two links at a device carry half of the ring's traffic each.
  Where links join the devices of a host, an axis that leaves it goes at the speed of the network, the slowest link that
  its collectives cross.
  """
  found, span = {}, 1
  for axis, n in reversed(mesh.items()):
    span *= n
    found[axis] = chip.network if chip.host and n > 1 and span > chip.host else chip.ici_bandwidth / chip.dimensions
  return found


def step_flops(config: RunConfig, trained: dict[str, int], frozen: dict[str, int]) -> float:
  """What no training step can do without, all devices: the forward pass, as much again for gradients of weights in the
  parts that are trained whole, and as much for those of inputs wherever something before them is trained.

  trained, frozen: parameters by part (`counts.parts`). The indexer's input takes no gradient; where attention is sparse
  neither do scores of keys that are not selected.
  """
  tokens, attention, topk = config.data.tokens, config.model.attention, config.model.text.indexer.topk
  towers = lambda of: of | {'language': of['language'] + of.get('text tower', 0)}
  trained, frozen = towers(trained), towers(frozen)
  learns = lambda part: trained[part] > 0
  whole = lambda part: learns(part) and not frozen[part]
  before = learns('language') or learns('projector') or learns('vision')
  seen = (tokens + 1) / 2
  kept = costs.selected(tokens, topk, seen) / seen if attention == 'sparse' else 1
  passes = {'layers': 1 + before + whole('language'), 'head': 1 + before + whole('language'),
            'attention': 1 + 2 * before, 'vision': 1 + learns('vision') + whole('vision'),
            'projector': 1 + learns('vision') + whole('projector'),
            'indexer_projections': 1 + whole('indexers'), 'indexer_scores': 1 + 2 * kept * learns('indexers')}
  return forward_flops(config, passes)


def forward_flops(config: RunConfig, passes: Mapping[str, float] = {}) -> float:
  """All devices; passes: how often each part is done, once by default. Dense attention does not run the indexer."""
  part = counts.flops_per_token(config.model, config.data.tokens)
  part = {name: flops * passes.get(name, 1) for name, flops in part.items()
          if config.model.attention != 'dense' or not name.startswith('indexer')}
  seen = part.pop('vision', 0.0) + part.pop('projector', 0.0)
  merged = config.data.vision_rows * config.data.vision_patches / config.model.vision.merge ** 2
  return config.train.batch * (sum(part.values()) * config.data.tokens + seen * merged)


def described(config: RunConfig, what: str) -> str:
  d, t = config.data, config.train
  if what == 'decode':
    return f'{t.batch} rows, one new token each, caches of {d.tokens:,} tokens'
  patches = d.vision_rows * d.vision_patches
  media = f'{patches:,} patches a row' if patches else 'text only, no image'
  parts = f', in {t.accumulate} micro-batches' if t.accumulate > 1 and what in STEPS else ''
  return f'{t.batch} rows of {d.tokens:,} tokens, one sample a row, {media}{parts}'


def chip_of(topology: str) -> Chip:
  """The chip of 'v5p:4x4x8'. Raises InputError for one that is not in the table."""
  name = topology.partition(':')[0]
  if name not in CHIPS:
    raise InputError(f'--topology {topology}: no figures for {name!r}; there are {", ".join(CHIPS)}')
  return CHIPS[name]


def _placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_on_mesh(x.sharding.spec if x.sharding else jax.P()))


def _on_mesh(spec) -> jax.NamedSharding | None:
  return jax.NamedSharding(jax.sharding.get_mesh(), spec) if sharding.has_mesh() else None


def _bytes(tree) -> int:
  """Of a device's own part."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
