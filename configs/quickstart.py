"""The main job at the size of a laptop: a Keye of under a million parameters learns from FrameForge clips.

Stages of `keye quickstart`, in this order; each is a run that `keye train --config configs/quickstart.py:STAGE` can
also train by itself once the data lie in runs/quickstart/data:

    images   single pictures: the vision tower learns to read digits
    video    clips with dense attention, the indexer learning beside it (Keye's DSA warm-up)
    sparse   clips with sparse attention
    blind    like `video`, but every frame is grey: what can be had from the questions alone
"""
import dataclasses

from keye_jax.config import (
  DataConfig,
  IndexerConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TextConfig,
  TrainConfig,
  VisionConfig,
  to_dict,
)

RUNS = 'runs/quickstart'
STAGES = ('images', 'video', 'sparse', 'blind')
CLIPS = dict(n_train=2000, n_heldout=150, n_images=4000, seed=0)     # arguments of frameforge.build
MIXED_IMAGES = 1000      # pictures that stay in the mix while clips are learnt
VOCAB = 448              # of the tokenizer trained on the task's own text

MODEL = ModelConfig(
    text=TextConfig(
        layers=3, embed=128, heads=4, kv_heads=2, head_dim=32, vocab=VOCAB, ffn=128, experts=8, experts_per_token=2,
        rope_theta=1e4, mrope_section=(4, 6, 6), max_position=1024,
        # A clip is 68 to 98 tokens and a question about 15 more: each query attends to less than a quarter of them.
        indexer=IndexerConfig(heads=4, head_dim=32, topk=20)),
    vision=VisionConfig(layers=2, embed=64, heads=4, ffn=128, image=56, packing_positions=16),
    attention='warmup')
DATA = DataConfig(
    tokens=256, vision_rows=1, vision_patches=320, fps=2.0, min_frames=2, frame_tokens_min=4, frame_tokens_max=4,
    video_tokens=256, image_tokens_min=4, image_tokens_max=4, cache_mb=1024)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, final_fraction=0.05, schedule='linear', warmup_steps=20,
                            weight_decay=0.05, indexer_learning_rate=2e-3)


def stage(name: str, runs: str = RUNS) -> RunConfig:
  """Config of one stage; `runs` holds data/ and the run folders of the stages before."""
  run = RunConfig(model=MODEL, optimizer=OPTIMIZER, data=dataclasses.replace(DATA, path=f'{runs}/data/clips.jsonl'),
                  train=TrainConfig(steps=1000, batch=16, log_every=20, save_every=500, keep=1))
  match name:
    case 'images':
      return dataclasses.replace(
          run, data=dataclasses.replace(run.data, path=f'{runs}/data/images.jsonl'),
          train=dataclasses.replace(run.train, steps=250))
    case 'video':
      return dataclasses.replace(run, train=dataclasses.replace(run.train, steps=900, init=f'{runs}/images'))
    case 'sparse':
      return dataclasses.replace(
          run, model=dataclasses.replace(run.model, attention='sparse'),
          optimizer=dataclasses.replace(run.optimizer, learning_rate=5e-4),
          train=dataclasses.replace(run.train, steps=400, init=f'{runs}/video'))
    case 'blind':
      return dataclasses.replace(run, data=dataclasses.replace(run.data, grey=True),
                                 train=dataclasses.replace(run.train, steps=250))
  raise ValueError(f'configs/quickstart.py has no variant {name!r}; there are {", ".join(STAGES)}')


def get_config(arg: str = 'video'):
  return to_dict(stage(arg))
