"""Tiny models of every format, with random weights made from the table alone."""
import dataclasses

import numpy as np

from data_pipelines import tokenizer
from keye_jax.config import DataConfig, IndexerConfig, ModelConfig, TextConfig, VisionConfig
from keye_jax.hf import names

TEXT = TextConfig(layers=2, embed=24, heads=4, kv_heads=2, head_dim=8, vocab=320, ffn=20, experts=4,
                  experts_per_token=2, rope_theta=1e4, max_position=512)
KEYE = ModelConfig(
    text=dataclasses.replace(TEXT, mrope_section=(2, 1, 1), dense_ffn=40,
                             indexer=IndexerConfig(heads=3, head_dim=8, topk=8)),
    vision=VisionConfig(layers=2, embed=16, heads=2, ffn=28, patch=14, image=56, merge=2, packing_positions=6,
                        projector_eps=1e-6, mean=0.4, std=0.3),
    attention='sparse')
MODELS = {
    'keye': KEYE,
    'keye_dense': dataclasses.replace(KEYE, text=dataclasses.replace(KEYE.text, experts=0, experts_per_token=0,
                                                                     dense_ffn=0, tied_head=True)),
    'qwen3_moe': ModelConfig(text=TEXT),
    'qwen3': ModelConfig(text=dataclasses.replace(TEXT, experts=0, experts_per_token=0, tied_head=True)),
    'llama': ModelConfig(text=dataclasses.replace(TEXT, experts=0, experts_per_token=0, qk_norm=False)),
}
FORMATS = {name: name.removesuffix('_dense') for name in MODELS}
DATA = DataConfig(fps=1.0, min_frames=4, frame_tokens_min=4, frame_tokens_max=16, video_tokens=512, image_tokens_min=4,
                  image_tokens_max=64)


def random_params(cfg: ModelConfig, fmt: str, seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  out: dict = {}
  for path, leaf in names.leaves(names.table(cfg, fmt)).items():
    *groups, last = path.split('/')
    tree = out
    for group in groups:
      tree = tree.setdefault(group, {})
    tree[last] = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
  return out


def tiny_tokenizer() -> tokenizer.Tokenizer:
  return tokenizer.train_bpe(['when does the 7 appear? at 1.5 to 3.0 seconds'], 320)
