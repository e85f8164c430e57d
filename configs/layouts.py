"""Where the published model is trained: mesh and batch for each stage and slice of TPUs, or number of GPUs.

`configs/layouts.py:stage3_v5p_4x4x8` is stage 3 (262,144 tokens a row) on v5p:4x4x8; `docs/scale.md` says which of them
fit. Lengths are those of arXiv 2606.10651, what is trained is that of `configs/pretrain.py` and `configs/sft.py`.
A step is 8 M tokens (the paper gives no batch; the warm-up's 2 M are those of DeepSeek-V3.2; stage 0, which has few
tokens, takes 4 M), cut into micro-batches of one row for each group of devices that holds a row. Parameters and
optimizer are float32, computation bfloat16. The step of `rl`, on responses of the policy, is planned by
`keye plan --what rl`.

Batches are text, but for stage 0, which learns from pictures alone: `keye plan` says so too. With images, add
--config.data.vision_rows and --config.data.vision_patches.
"""
import dataclasses
from typing import NamedTuple

from configs import keye_vl_2_30b_a3b
from configs.pretrain import INDEXERS_WAIT, ONLY_PROJECTOR
from keye_jax.config import (
  ONLY_INDEXERS,
  DataConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
  to_dict,
)


class Stage(NamedTuple):
  like: str                    # the stage whose meshes it has
  tokens: int                  # of a row
  attention: str
  freeze: tuple[str, ...] = ()
  step: int = 1 << 23          # tokens
  rate: float = 2e-5
  indexer_rate: float = 1e-3
  balance: float = 0.001
  responses: int = 0           # in a row at most
  patches: int = 0             # of the vision row that goes with a row of tokens


STAGES = {
    'stage0': Stage('stage0', 8192, 'dense', ONLY_PROJECTOR, 1 << 22, rate=1e-3, patches=32768),
    'stage1': Stage('stage1', 32768, 'dense', INDEXERS_WAIT),
    'stage2': Stage('stage2', 65536, 'dense', INDEXERS_WAIT),
    'warmup': Stage('stage3', 262144, 'warmup', ONLY_INDEXERS, 1 << 21),
    'stage3': Stage('stage3', 262144, 'sparse'),
    'sft': Stage('stage2', 65536, 'sparse'),
    # Vision tower and projector frozen: arXiv 2606.10651, Video-RL, which gives neither length, batch, group nor rate.
    # A row is a prompt with its group of 16 responses, branches behind it, in SFT's 64K tokens; 128 prompts a step. The
    # model's rate is that of DeepSeekMath (arXiv 2402.03300 section 4.2), the indexer's ten times as much, about the
    # ratio of `configs/sft.py:30b`, so that it keeps following. The router is not balanced any more.
    'rl': Stage('stage2', 65536, 'sparse', ('vision', 'projector'), rate=1e-6, indexer_rate=1e-5, balance=0.0,
                responses=16),
}

# (data, context, expert). Rows lie over data x expert, tokens of a row over context. Where the torus allows it an axis
# is a product of its dimensions, so that every axis is a ring of its own. Every device of an expert group keeps room
# for the picks of the whole group, so a small group saves memory and a large one weights; v6e has a third of the memory
# of the others, and gets smaller groups and fewer tokens a device.
MESHES = {
    'v5p_4x4x4': {'stage0': (16, 1, 4), 'stage1': (16, 1, 4), 'stage2': (4, 4, 4), 'stage3': (1, 16, 4)},
    'v5p_4x4x8': {'stage0': (16, 1, 8), 'stage1': (16, 1, 8), 'stage2': (4, 4, 8), 'stage3': (1, 16, 8)},
    'v6e_16x16': {'stage0': (64, 1, 4), 'stage1': (16, 4, 4), 'stage2': (8, 8, 4), 'stage3': (2, 32, 4)},
    # Two devices a chip.
    'tpu7x_4x4x4': {'stage0': (16, 1, 8), 'stage1': (16, 1, 8), 'stage2': (4, 4, 8), 'stage3': (1, 16, 8)},
    # 8 GPUs a host: the last axis stays within one, since experts travel in every layer.
    'h100_8': {'stage0': (2, 1, 4), 'stage1': (1, 2, 4), 'stage2': (1, 2, 4), 'stage3': (1, 8, 1)},
    'h100_64': {'stage0': (16, 1, 4), 'stage1': (16, 1, 4), 'stage2': (4, 4, 4), 'stage3': (1, 16, 4)},
}


def layout(stage: Stage, where: str) -> RunConfig:
  mesh, rows = MeshConfig(*MESHES[where][stage.like]), stage.step // stage.tokens
  pictures = dict(vision_rows=1, vision_patches=stage.patches, image_tokens_max=4096) if stage.patches else {}
  model = dataclasses.replace(keye_vl_2_30b_a3b.model(), param_dtype='float32', layout='train',
                              attention=stage.attention)
  return RunConfig(model=model, mesh=mesh,
                   optimizer=OptimizerConfig(learning_rate=stage.rate, indexer_learning_rate=stage.indexer_rate,
                                             warmup_steps=100),
                   data=DataConfig(tokens=stage.tokens, samples=stage.responses, workers=16, **pictures),
                   train=TrainConfig(steps=60000, batch=rows, accumulate=rows // (mesh.data * mesh.expert),
                                     objective='gspo' if stage.responses else 'sft', balance_rows=True,
                                     freeze=stage.freeze, balance_weight=stage.balance))


def get_config(variant: str = ''):
  """RunConfig as a ConfigDict; raises ValueError for an unknown variant."""
  stage, _, where = variant.partition('_')
  if stage not in STAGES or STAGES[stage].like not in MESHES.get(where, ()):
    raise ValueError(f'configs/layouts.py: no variant {variant!r}; write one of {", ".join(STAGES)}, an underscore '
                     f'and one of {", ".join(MESHES)}, e.g. stage3_v5p_4x4x8')
  return to_dict(layout(STAGES[stage], where))
