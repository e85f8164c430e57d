"""The main job at the size of a laptop: a Keye of 1.1 million parameters learns from FrameForge clips.

Stages of `keye quickstart`, in this order; each is a run that `keye train --config configs/quickstart.py:STAGE` can
also train by itself once the data lie in runs/quickstart/data:

    images   single pictures: the vision tower learns to read digits
    video    clips with dense attention: what is shown when, how often, before or after what
    indexer  the same with the indexer learning beside the model (Keye's DSA warm-up)
    sparse   clips with sparse attention
    blind    a model of its own that only ever sees grey frames: what can be had from the questions alone

The learning rate falls in one line from `video` to the end of `sparse`. Muon needs about half as many steps here as
AdamW, and a row holds one clip with all its questions.
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
STAGES = ('images', 'video', 'indexer', 'sparse', 'blind')
CLIPS = dict(n_train=3000, n_heldout=150, n_images=4000, seed=0)     # arguments of frameforge.build
MIXED_IMAGES = 600       # pictures that stay in the mix while clips are learnt
VOCAB = 448              # at most, of the tokenizer trained on the task's own text

MODEL = ModelConfig(
    text=TextConfig(
        layers=3, embed=128, heads=4, kv_heads=2, head_dim=32, vocab=VOCAB, ffn=64, experts=8, experts_per_token=2,
        rope_theta=1e4, mrope_section=(6, 5, 5), max_position=1024,
        # A clip is 68 to 101 tokens and a question about 15 more: each query attends to less than a quarter of them.
        indexer=IndexerConfig(heads=4, head_dim=32, topk=20)),
    vision=VisionConfig(layers=2, embed=64, heads=4, ffn=128, image=56, packing_positions=16),
    attention='dense')
# One vision row a frame: its 16 patches attend to each other alone.
DATA = DataConfig(
    tokens=256, vision_rows=16, vision_patches=16, fps=2.0, min_frames=2, frame_tokens_min=4, frame_tokens_max=4,
    video_tokens=64, image_tokens_min=4, image_tokens_max=4, cache_mb=1024)
OPTIMIZER = OptimizerConfig(
    name='muon', learning_rate=5e-3, final_fraction=0.3, schedule='linear', warmup_steps=20, weight_decay=0.0,
    indexer_learning_rate=3e-3)


def stage(name: str, runs: str = RUNS) -> RunConfig:
  """Config of one stage; `runs` holds data/ and the run folders of the stages before."""
  base = RunConfig(model=MODEL, optimizer=OPTIMIZER, data=dataclasses.replace(DATA, path=f'{runs}/data/clips.jsonl'),
                   train=TrainConfig(steps=1000, batch=8, log_every=20, save_every=500, keep=1))

  def run(after='', attention='dense', data=(), optimizer=(), **train) -> RunConfig:
    init = f'{runs}/{after}' if after else ''
    return dataclasses.replace(
        base, model=dataclasses.replace(MODEL, attention=attention),
        data=dataclasses.replace(base.data, **dict(data)),
        optimizer=dataclasses.replace(OPTIMIZER, **dict(optimizer)),
        train=dataclasses.replace(base.train, init=init, **train))

  match name:
    case 'images':
      pictures = dict(path=f'{runs}/data/images.jsonl', tokens=120, vision_rows=8)
      return run(data=pictures, steps=160, batch=32)
    case 'video':
      return run('images', steps=1300)
    case 'indexer':
      return run('video', 'warmup', optimizer=dict(learning_rate=1.5e-3, final_fraction=0.7), steps=150)
    case 'sparse':
      return run('indexer', 'sparse', optimizer=dict(learning_rate=1e-3, final_fraction=0.05), steps=300)
    case 'blind':
      return run(data=dict(grey=True), optimizer=dict(final_fraction=0.05), steps=250)
  raise ValueError(f'configs/quickstart.py has no variant {name!r}; there are {", ".join(STAGES)}')


def get_config(arg: str = 'video'):
  return to_dict(stage(arg))
