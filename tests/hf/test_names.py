import dataclasses
import itertools
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from configs import keye_vl_2_30b_a3b
from keye_jax.config import ModelConfig
from keye_jax.hf import names
from keye_jax.nn import keye
from tests.hf.models import FORMATS, MODELS, TEXT

PUBLISHED = pathlib.Path(__file__).parent.parent / 'fixtures' / 'keye_vl_2_names.txt'


def published() -> dict[str, tuple[int, ...]]:
  """The fixture with its placeholders expanded."""
  out = {}
  for line in PUBLISHED.read_text().splitlines():
    if line.startswith('#'):
      continue
    template, shape = line.split('\t')
    choices = [[*map(str, range(48))] if body == 'i' else [*map(str, range(27))] if body == 'j' else body.split(',')
               for body in re.findall(r'\{(.*?)\}', template)]
    pattern = re.sub(r'\{.*?\}', '{}', template)
    for values in itertools.product(*choices):
      out[pattern.format(*values)] = tuple(map(int, shape.split(',')))
  return out


def test_published_checkpoint_has_these_names_and_shapes():
  table = names.table(keye_vl_2_30b_a3b.model(), 'keye')
  ours = {t.name: t.shape for t in table}
  assert len(ours) == len(table)
  assert ours == published()
  assert sum(map(math.prod, ours.values())) == 31_122_082_160


@pytest.mark.parametrize('model', MODELS)
def test_table_covers_the_parameters_of_the_model(model):
  cfg = MODELS[model]
  shapes = {'/'.join(k.key for k in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(keye.param_shapes(cfg))}
  leaves = names.leaves(names.table(cfg, FORMATS[model]))
  assert {path: leaf.shape for path, leaf in leaves.items()} == shapes


@pytest.mark.parametrize('experts', ['split', 'hub', 'module'])
@pytest.mark.parametrize('model', MODELS)
def test_every_element_is_held_exactly_once(model, experts):
  table = names.table(MODELS[model], FORMATS[model], experts)
  for leaf in names.leaves(table).values():
    held = np.zeros(leaf.shape, int)
    for _, piece in leaf.parts:
      held[tuple(slice(*b) for b in names.bounds(piece))] += 1
    assert (held == 1).all()
  for tensor in table:
    ends = [p.rows for p in tensor.pieces]
    assert [a for a, _ in ends] == [0, *(b for _, b in ends[:-1])] and ends[-1][1] == tensor.shape[0]
    assert math.prod(tensor.shape) == sum(math.prod(p.shape) for p in tensor.pieces)


@pytest.mark.parametrize('rule,block,stored', [
    ('same', (6, 5), (6, 5)), ('linear', (5, 2, 3), (6, 5)), ('linear', (2, 3, 5), (5, 6)),
    ('swap', (4, 2, 3), (4, 3, 2))])
def test_rules_invert_each_other(rule, block, stored):
  x = np.arange(math.prod(block)).reshape(block)
  y = names.to_stored(rule, x, stored[0])
  assert y.shape == stored
  np.testing.assert_array_equal(names.to_ours(rule, y, block), x)


def expert_shapes(embed, ffn, layout):
  cfg = ModelConfig(text=dataclasses.replace(TEXT, embed=embed, ffn=ffn))
  return cfg, {t.name: t.shape for t in names.table(cfg, 'qwen3_moe', layout)}


@pytest.mark.parametrize('layout', ['split', 'hub', 'module'])
@pytest.mark.parametrize('embed,ffn', [(24, 20), (24, 12), (24, 24)])    # plain; gate_up square; down square
def test_layout_of_experts_is_read_off_the_shapes(embed, ffn, layout):
  cfg, shapes = expert_shapes(embed, ffn, layout)
  assert names.expert_layout(cfg, 'qwen3_moe', shapes) == layout


@pytest.mark.parametrize('model,fmt,word', [
    ('keye', 'qwen3_moe', 'vision'), ('qwen3_moe', 'llama', 'experts'), ('qwen3', 'qwen3_moe', 'no experts'),
    ('llama', 'qwen3', 'no QK-norm'), ('llama', 'gemma', 'unknown format')])
def test_a_format_refuses_what_it_cannot_hold(model, fmt, word):
  with pytest.raises(ValueError, match=word):
    names.table(MODELS[model], fmt)
