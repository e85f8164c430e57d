"""The published Kwai Keye-VL-2.0-30B-A3B (arXiv 2606.10651): 31,122,082,160 parameters, about 3 B active a token.

Language model: Qwen3-30B-A3B with one DSA indexer a layer. Vision: the SigLIP-400M encoder at native resolution and a
2x2 projector. Data limits are those of its third pre-training stage: 256K tokens, of which 180K visual.
"""
from keye_jax.config import (
  DataConfig,
  IndexerConfig,
  ModelConfig,
  RunConfig,
  TextConfig,
  TrainConfig,
  VisionConfig,
  to_dict,
)


def model() -> ModelConfig:
  """The published architecture, computing in bfloat16 with DSA on."""
  return ModelConfig(
      text=TextConfig(
          layers=48, embed=2048, heads=32, kv_heads=4, head_dim=128, vocab=151936,
          ffn=768, experts=128, experts_per_token=8, qk_norm=True, tied_head=False,
          rope_theta=1e7, mrope_section=(16, 24, 24), norm_eps=1e-6, max_position=262144,
          dense_ffn=6144,     # a key of the checkpoint's config.json that no weight has
          indexer=IndexerConfig(heads=16, head_dim=64, topk=2048)),
      vision=VisionConfig(
          layers=27, embed=1152, heads=16, ffn=4304, patch=14, image=384, merge=2,
          norm_eps=1e-6, projector_eps=1e-5, rope_theta=1e4, packing_positions=32768),
      attention='sparse', dtype='bfloat16', param_dtype='bfloat16', remat='block', experts_transport='ring')


def get_config(arg: str = ''):
  """RunConfig as a ConfigDict. There is one variant: any `arg` is an error."""
  if arg:
    raise ValueError(f'configs/keye_vl_2_30b_a3b.py has no variant {arg!r}; leave out what follows the colon')
  return to_dict(RunConfig(
      model=model(),
      data=DataConfig(
          tokens=262144,
          # 9 x 81,920 patches = 184,320 merged tokens, the visual budget of one row; the largest image (20,480 tokens)
          # is one vision row
          vision_rows=9, vision_patches=81920,
          fps=2.0, min_frames=2, frame_tokens_min=64, frame_tokens_max=256, video_tokens=184320,
          image_tokens_min=4, image_tokens_max=20480),
      train=TrainConfig(batch=256)))
