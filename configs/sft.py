"""Supervised fine-tuning.

`tiny`: every part of the model at a size that a laptop trains in a minute. `30b`: the published model (arXiv
2606.10651) with DSA on; the paper gives no learning rates, so the values and where they come from stand beside them.
`tiny,lora` and `30b,lora` train adapters beside the model that `train.init` names; with `,int8` that base is in 8 bits.
"""
import dataclasses

from configs import keye_vl_2_30b_a3b
from keye_jax.config import (
  DataConfig,
  IndexerConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TextConfig,
  TrainConfig,
  VisionConfig,
  to_dict,
)


def tiny() -> RunConfig:
  """Text and small images or clips; set data.path."""
  return RunConfig(
      model=ModelConfig(
          text=TextConfig(layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, vocab=1024, ffn=64, experts=4,
                          experts_per_token=2, mrope_section=(2, 3, 3), max_position=4096,
                          indexer=IndexerConfig(heads=4, head_dim=16, topk=64)),
          vision=VisionConfig(layers=1, embed=32, heads=2, ffn=64, image=112, packing_positions=64),
          attention='sparse'),
      optimizer=OptimizerConfig(learning_rate=2e-3, final_fraction=0.05, schedule='cosine', warmup_steps=10,
                                weight_decay=0.01, indexer_learning_rate=2e-3),
      data=DataConfig(tokens=256, vision_rows=1, vision_patches=512, frame_tokens_min=4, frame_tokens_max=4,
                      video_tokens=128, image_tokens_min=4, image_tokens_max=16, cache_mb=256),
      train=TrainConfig(steps=200, batch=8, log_every=10, save_every=50))


def full() -> RunConfig:
  """The 30B model at 64K tokens a row on 128 chips (v5p:4x4x8): 16 x 1 x 8."""
  return RunConfig(
      model=keye_vl_2_30b_a3b.model(),
      mesh=MeshConfig(data=16, context=1, expert=8),
      optimizer=OptimizerConfig(
          # The sparse stage of DeepSeek-V3.2, the only published DSA recipe: 7.3e-6 for the model, k = 2048.
          learning_rate=7.3e-6, schedule='cosine', final_fraction=0.1, warmup_steps=100,
          b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0,
          # Its warm-up trains the indexer at 1e-3; afterwards 1e-4 keeps it following the model.
          indexer_learning_rate=1e-4, indexer_clip_norm=1.0),
      data=DataConfig(
          tokens=65536,           # stage 2 of arXiv 2606.10651; its long stage packs 262144
          vision_rows=3, vision_patches=81920,        # 61,440 merged tokens: the paper's 64K of video at most
          fps=2.0, min_frames=2, frame_tokens_min=64, frame_tokens_max=256, video_tokens=61440,
          image_tokens_min=4, image_tokens_max=20480, workers=16,
          streams=32),            # 32 hosts of 4 chips; also read by 16, 8, ... of them
      train=TrainConfig(
          steps=60000,            # x 128 rows x 64K = 500 B tokens, the paper's SFT
          batch=128,
          balance_weight=0.001,   # router_aux_loss_coef of Qwen3-MoE
          indexer_weight=1.0,     # with detached inputs it only sets the size of the indexer's own step
          spike_factor=2.0,       # a batch of 8 M tokens does not double the loss unless something is wrong with it
          save_every=500, keep=3))


def tiny_lora() -> RunConfig:
  """Adapters on attention and experts, a pair an expert; set train.init and data.path."""
  run = tiny()
  return dataclasses.replace(run, lora=LoraConfig(targets=('layers/attn/*', 'layers/mlp/*'), rank=4, alpha=8.0),
                             optimizer=dataclasses.replace(run.optimizer, learning_rate=1e-2))


def full_lora() -> RunConfig:
  """Adapters on the attention of the 30B model, on one device of 80 GB: 13 million parameters beside 62 GB of bfloat16
  base; `30b,lora,int8` has 32 GB of base, for a device of 48 GB or longer rows.

  With 'layers/mlp/*' as well, a pair for each of 128 experts, it would be 629 million more: 10 GB with gradients and
  optimizer state, so lower the rank then.
  """
  run = full()
  return dataclasses.replace(
      run, mesh=MeshConfig(), model=dataclasses.replace(run.model, experts_transport='local'),
      lora=LoraConfig(targets=('layers/attn/*',), rank=16, alpha=32.0),
      # arXiv 2106.09685, appendix D: 2e-4 for GPT-3
      optimizer=dataclasses.replace(run.optimizer, learning_rate=2e-4, weight_decay=0.0),
      data=dataclasses.replace(run.data, tokens=8192, vision_rows=1, vision_patches=32768, video_tokens=7168,
                               image_tokens_max=7168, streams=0),
      train=dataclasses.replace(run.train, steps=1000, batch=8, accumulate=8))


def eight_bits(run: RunConfig) -> RunConfig:
  """The same with the frozen matrices of the layers in 8 bits (keye_jax/nn/int8.py)."""
  return dataclasses.replace(run, lora=dataclasses.replace(run.lora, base='int8'))


def get_config(variant: str = ''):
  """RunConfig as a ConfigDict; raises ValueError for an unknown variant."""
  variants = {'tiny': tiny, 'tiny,lora': tiny_lora, '30b': full, '30b,lora': full_lora}
  variants |= {'tiny,lora,int8': lambda: eight_bits(tiny_lora()), '30b,lora,int8': lambda: eight_bits(full_lora())}
  if variant not in variants:
    raise ValueError(f'configs/sft.py: no variant {variant!r}; there are {"; ".join(variants)}')
  return to_dict(variants[variant]())
