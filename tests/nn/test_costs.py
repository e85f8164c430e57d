"""The walk of the published model's training step against the closed formula of its forward pass."""
import dataclasses
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import keye_vl_2_30b_a3b, pretrain
from keye_jax import jaxpr_costs, planning
from keye_jax.config import ONLY_INDEXERS, DataConfig, LoraConfig, RunConfig, TrainConfig
from keye_jax.nn import costs, counts
from pallas_kernels.equation import parse
from tests.nn import batches
from tests.steps.test_mesh import mesh


def step_cost(attention, tokens, rows=1, what='train', **model):
  config = dataclasses.replace(keye_vl_2_30b_a3b.model(), attention=attention, experts_transport='local', **model)
  run = RunConfig(model=config, data=DataConfig(tokens=tokens, samples=4), train=TrainConfig(batch=rows))
  return config, jaxpr_costs.of_program(planning.traced(run, what).trace.jaxpr, {}, costs.rules(config))


@pytest.mark.parametrize('attention, what', [('dense', 'train'), ('sparse', 'train'), ('sparse', 'rl')])
def test_flops_of_a_training_step(attention, what):
  """Without recomputation: no remat of blocks, and the 4,096 tokens are one chunk of the head.

  Three times the forward pass, but for: products of queries and keys, 2 forward, 5 backward and 1 for the indexer's
  target; the indexer, whose input takes no gradient; its scores, once forward and once backward to select, and on the
  selected keys 1 for the loss and 3 for its gradients.
  """
  tokens = 4096
  config, got = step_cost(attention, tokens, what=what, remat='none')
  t, part = config.text, counts.flops_per_token(config, tokens)
  expected = 3 * (part['layers'] + part['head']) + part['attention'] * {'dense': 7, 'sparse': 8}[attention] / 2
  if attention == 'sparse':
    kept = part['attention'] / (4 * t.layers * t.heads * t.head_dim) / ((tokens + 1) / 2)
    expected += 2 * part['indexer_projections'] + (2 + 4 * kept) * part['indexer_scores']
  assert got.flops == pytest.approx(tokens * expected, rel=0.02)
  assert got.sent == {}
  # tiles are visited whole at most: all visible keys, where products on the selected ones are counted
  assert got.masked == pytest.approx(0 if attention == 'dense' else tokens * (
      part['attention'] * 4 + part['indexer_scores'] * 4 * kept) * (1 / kept - 1), rel=1e-6)


VARIANTS = {
    'all': {}, 'all, dense': dict(attention='dense', freeze=pretrain.INDEXERS_WAIT),
    'indexers': dict(attention='warmup', freeze=ONLY_INDEXERS),
    'projector': dict(attention='dense', freeze=pretrain.ONLY_PROJECTOR),
    'adapters': dict(lora=LoraConfig(targets=('layers/attn/*',)))}


@pytest.mark.parametrize('name', VARIANTS)
def test_the_bound_of_a_step_is_below_what_its_program_computes(name):
  """Not far: more than it needs are here products of queries and keys and scores that are computed again, and beside
  adapters the loss of indexers that do not learn."""
  change = dict(VARIANTS[name])
  model = dataclasses.replace(keye_vl_2_30b_a3b.model(), attention=change.pop('attention', 'sparse'), remat='none',
                              experts_transport='local')
  run = RunConfig(model=model, data=DataConfig(tokens=4096, vision_rows=1, vision_patches=1024),
                  train=TrainConfig(freeze=change.pop('freeze', ())), **change)
  step = planning.traced(run)
  got = jaxpr_costs.of_program(step.trace.jaxpr, {}, costs.rules(model))
  assert 0.7 * got.flops < step.model_flops < 1.01 * got.flops


@pytest.mark.parametrize('name', ['dsa_attention_forward_kl', 'dsa_attention_backward_kl'])
def test_lists_on_a_gpu_have_fewer_masked_places_than_tiles(name):
  """What the result needs is the same; 16 queries with no key in common meet 16 times what each selected, or all keys
  that they see."""
  config = keye_vl_2_30b_a3b.model()
  device = type(jax.make_mesh((1,), ('x',)).abstract_mesh.abstract_device)('a device', 1, 'cuda')
  there = AbstractMesh((1,), ('x',), (AxisType.Explicit,), abstract_device=device)

  def both(S, T=4096):
    dims = dict(B=1, G=4, N=8 * T, K=128, S=S, I=16, T=T, J=64, width=2)
    with jax.sharding.use_abstract_mesh(there):
      on_gpu = costs.rules(config)[name](**dims)
    return on_gpu, costs.rules(config)[name](**dims)
  long, tiled = both(262144)
  assert long.flops == tiled.flops and long.apart > 0 == tiled.apart
  seen = 262145 / 2
  kept = costs.selected(262144, 2048, seen)
  assert long.masked / tiled.masked == pytest.approx(15 * kept / (seen - kept))
  short, tiled = both(16384)
  assert short.masked == tiled.masked > 0 and short.apart > 0
  newest, tiled = both(32768, T=1)            # one tile, where a GPU has no lists
  assert newest == tiled


def test_flops_of_generation():
  """A decoding step reads the whole cache and attends to topk of it. A prefill computes no loss of the indexer; that
  its last layer answers for few tokens is not counted (the costlier branch is), one layer of 48."""
  model = dataclasses.replace(keye_vl_2_30b_a3b.model(), experts_transport='local')
  run = RunConfig(model=model, data=DataConfig(tokens=4096), train=TrainConfig(batch=4))
  for what in ('decode', 'prefill'):
    step = planning.traced(run, what)
    got = jaxpr_costs.of_program(step.trace.jaxpr, {}, step.rules)
    assert got.flops == pytest.approx(step.model_flops, rel=0.02), what


def test_a_mesh_divides_the_work_and_adds_traffic():
  config = dataclasses.replace(batches.CONFIG, attention='sparse', remat='block')

  def cost(mesh_sizes, **model):
    run = RunConfig(model=dataclasses.replace(config, **model), data=DataConfig(tokens=256), train=TrainConfig(batch=8))
    return jaxpr_costs.of_program(planning.traced(run).trace.jaxpr, mesh_sizes, costs.rules(config))
  alone = cost({})
  with mesh(2, 2, 2):
    shared = cost({'data': 2, 'context': 2, 'expert': 2}, experts_transport='ring')
  # a little more: the norms of gradients that every device of an axis holds
  assert alone.flops <= 8 * shared.flops <= 1.05 * alone.flops
  assert 8 * shared.masked == pytest.approx(alone.masked)
  assert all(shared.sent[axis] > 0 for axis in ('data', 'context', 'expert'))


def test_adapters_save_the_gradients_of_what_is_frozen():
  """On experts of rank 0 a third of their products; with everything adapted the step costs what is counted by hand: of
  every matrix product 2 of 3, of the head too, and of each pair 3, of those of experts one more to form x A again."""
  rules = costs.rules(keye_vl_2_30b_a3b.model())
  dims, none = dict(N=4096, D=2048, E=128, F=768, K=8, width=2), dict(G=0, A=0, stored=2)
  flops = lambda name, **more: rules[name](**dims, **more).flops
  assert flops('adapted_swiglu_forward', **none) == flops('routed_swiglu_forward')
  assert flops('adapted_swiglu_backward', **none) == flops('routed_swiglu_backward') / 2
  read = [rules['adapted_swiglu_forward'](**dims, G=0, A=0, stored=stored).bytes for stored in (2, 1)]
  assert read[0] - read[1] == (4096 * 8 / 512 + 128) * 3 * 2048 * 768           # a byte a weight less in every tile

  tokens, rank = 4096, 16
  model = dataclasses.replace(keye_vl_2_30b_a3b.model(), attention='dense', experts_transport='local', remat='none')
  run = RunConfig(model=model, data=DataConfig(tokens=tokens), train=TrainConfig(batch=1),
                  lora=LoraConfig(targets=('layers/*',), rank=rank))
  got = jaxpr_costs.of_program(planning.traced(run).trace.jaxpr, {}, costs.rules(model))
  t, part = model.text, counts.flops_per_token(model, tokens)
  width = (t.heads + t.kv_heads) * t.head_dim
  attn, expert = 4 * t.embed + 2 * width, t.experts_per_token * (2 * t.embed + 3 * t.ffn)
  again = t.experts_per_token * (t.embed + t.ffn)
  pairs = t.layers * rank * 2.0 * (3 * (attn + expert) + again)
  expected = 2 * (part['layers'] + part['head']) + part['attention'] * 7 / 2 + pairs
  assert got.flops == pytest.approx(tokens * expected, rel=0.02)


@pytest.mark.parametrize('remat, parts', [('block', ('layers', 'attention')), ('attention', ('layers',))])
def test_recomputing_costs_a_forward_pass_of_what_is_not_kept(remat, parts):
  tokens = 4096
  config, whole = step_cost('dense', tokens, remat=remat)
  _, kept = step_cost('dense', tokens, remat='none')
  part = counts.flops_per_token(config, tokens)
  assert whole.flops - kept.flops == pytest.approx(tokens * sum(part[name] for name in parts), rel=0.02)


def test_sparse_attention_that_is_kept_is_done_once():
  """Neither its products nor its scores and its selection are in the backward pass again."""
  def step(remat):
    config = RunConfig(model=dataclasses.replace(batches.CONFIG, attention='sparse', remat=remat),
                       data=DataConfig(tokens=256), train=TrainConfig(batch=1))
    program = planning.traced(config)
    return program, jaxpr_costs.of_program(program.trace.jaxpr, {}, program.rules)
  (program, again), (_, once) = step('block'), step('attention')
  name, dims = parse(re.search(r'name=(dsa_attention_forward_kl[.\w]*)', str(program.trace.jaxpr))[1])
  assert again.flops - once.flops == batches.TEXT.layers * program.rules[name](**dims).flops
