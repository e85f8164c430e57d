"""Where the published model's pre-training stages run: mesh and batch for each stage and slice of TPUs.

`configs/layouts.py:stage3_v5p_4x4x8` is stage 3 (262,144 tokens a row) on v5p:4x4x8; `docs/scale.md` says which of them
fit. Lengths are those of arXiv 2606.10651; attention is sparse in stage 3, as the paper gives no stage and DSA pays off
with length. A step is 8 M tokens everywhere (the paper gives no batch), cut into micro-batches of one row for each
group of devices that holds a row. Parameters and optimizer are float32, computation bfloat16.

Batches are text: `keye plan` says so too. With images, add --config.data.vision_rows and --config.data.vision_patches.
"""
import dataclasses

from configs import keye_vl_2_30b_a3b
from keye_jax.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig, to_dict

TOKENS_A_STEP = 1 << 23
LENGTHS = {'stage1': 32768, 'stage2': 65536, 'stage3': 262144}

# (data, context, expert). Rows lie over data x expert, tokens of a row over context. Where the torus allows it an axis
# is a product of its dimensions, so that every axis is a ring of its own. Every device of an expert group keeps room
# for the picks of the whole group, so a small group saves memory and a large one weights; v6e has a third of the memory
# of the others, and gets smaller groups and fewer tokens a device.
MESHES = {
    'v5p_4x4x4': {'stage1': (16, 1, 4), 'stage2': (4, 4, 4), 'stage3': (1, 16, 4)},
    'v5p_4x4x8': {'stage1': (16, 1, 8), 'stage2': (4, 4, 8), 'stage3': (1, 16, 8)},
    'v6e_16x16': {'stage1': (16, 4, 4), 'stage2': (8, 8, 4), 'stage3': (2, 32, 4)},
    'tpu7x_4x4x4': {'stage1': (16, 1, 8), 'stage2': (4, 4, 8), 'stage3': (1, 16, 8)},      # two devices a chip
}


def layout(stage: str, where: str) -> RunConfig:
  mesh, tokens = MeshConfig(*MESHES[where][stage]), LENGTHS[stage]
  rows = TOKENS_A_STEP // tokens
  model = dataclasses.replace(keye_vl_2_30b_a3b.model(), param_dtype='float32', layout='train',
                              attention='sparse' if stage == 'stage3' else 'dense')
  return RunConfig(model=model, mesh=mesh, optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
                   data=DataConfig(tokens=tokens, workers=16),
                   train=TrainConfig(steps=60000, batch=rows, accumulate=rows // (mesh.data * mesh.expert)))


def get_config(variant: str = ''):
  """RunConfig as a ConfigDict; raises ValueError for an unknown variant."""
  stage, _, where = variant.partition('_')
  if stage not in LENGTHS or where not in MESHES:
    raise ValueError(f'configs/layouts.py: no variant {variant!r}; write one of {", ".join(LENGTHS)}, an underscore '
                     f'and one of {", ".join(MESHES)}, e.g. stage3_v5p_4x4x8')
  return to_dict(layout(stage, where))
