"""The main job at the size of a laptop: a Keye of 1.1 million parameters learns from FrameForge clips.

Stages of `keye quickstart`, in this order; each is a run that `keye train --config configs/quickstart.py:STAGE` can
also train by itself once the data lie in runs/quickstart/data:

    text     transcripts of the clips, without pictures: to find the time of what is asked about
    images   pictures, the language model frozen: to see a digit and to say which
    video    clips with dense attention: what is shown when, how often, before or after what
    indexer  the same with the indexer learning beside the model (Keye's DSA warm-up)
    sparse   clips with sparse attention
    blind    video with grey frames, from the stage text: what can be had from the questions alone

What takes long is the match of a digit that is asked about and one that is shown (docs/main_job.md). It is learnt on
transcripts, whose steps are cheap, and pictures then have to be told in the terms of a language model that knows it.
Training clips ask for all events as well, and the optimizer is Muon: both bring the match forward. A row holds one clip
with all its questions. Stages share the shape of a batch and with it the compiled program where they can.
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
STAGES = ('text', 'images', 'video', 'indexer', 'sparse', 'blind')
CLIPS = dict(n_train=3000, n_heldout=150, n_images=2000, seed=0)     # arguments of frameforge.build
MIXED_IMAGES = 600       # pictures that stay in the mix while clips are learnt
VOCAB = 448              # at most, of the tokenizer trained on the task's own text

MODEL = ModelConfig(
    text=TextConfig(
        layers=3, embed=128, heads=4, kv_heads=2, head_dim=32, vocab=VOCAB, ffn=64, experts=8, experts_per_token=2,
        rope_theta=1e4, mrope_section=(6, 5, 5), max_position=1024, tied_head=True,
        # A clip with a question is 63 to 102 tokens: an answer attends to less than a quarter of them.
        indexer=IndexerConfig(heads=4, head_dim=32, topk=15)),
    vision=VisionConfig(layers=2, embed=64, heads=4, ffn=128, image=56, packing_positions=16),
    attention='dense')
# One vision row a frame: its 16 patches attend to each other alone.
DATA = DataConfig(
    tokens=220, vision_rows=14, vision_patches=16, fps=2.0, min_frames=2, frame_tokens_min=4, frame_tokens_max=4,
    video_tokens=64, image_tokens_min=4, image_tokens_max=4, cache_mb=1024)
OPTIMIZER = OptimizerConfig(
    name='muon', learning_rate=5e-3, final_fraction=0.05, schedule='linear', warmup_steps=20, weight_decay=0.0,
    indexer_learning_rate=3e-3)


def stage(name: str, runs: str = RUNS, seed: int = 0) -> RunConfig:
  """Config of one stage; `runs` holds data/ and the run folders of the stages before."""
  base = RunConfig(model=MODEL, optimizer=OPTIMIZER, data=dataclasses.replace(DATA, path=f'{runs}/data/clips.jsonl'),
                   train=TrainConfig(steps=1000, batch=16, log_every=20, save_every=500, keep=1, seed=seed))

  def run(after='', attention='dense', data=(), optimizer=(), **train) -> RunConfig:
    init = f'{runs}/{after}' if after else ''
    return dataclasses.replace(
        base, model=dataclasses.replace(MODEL, attention=attention),
        data=dataclasses.replace(base.data, **dict(data)),
        optimizer=dataclasses.replace(OPTIMIZER, **dict(optimizer)),
        train=dataclasses.replace(base.train, init=init, **train))

  match name:
    case 'text':
      return run(data=dict(path=f'{runs}/data/text.jsonl', tokens=176, vision_rows=0, vision_patches=0), steps=440,
                 freeze=('vision', 'projector'))
    case 'images':
      return run('text', data=dict(path=f'{runs}/data/images.jsonl'), optimizer=dict(final_fraction=0.3), steps=320,
                 freeze=('', '!projector', '!vision'))
    case 'video':
      return run('images', steps=320)
    case 'indexer':
      return run('video', 'warmup', optimizer=dict(learning_rate=3e-4, indexer_learning_rate=2e-2, final_fraction=1.0),
                 steps=60)
    case 'sparse':
      return run('indexer', 'sparse', optimizer=dict(learning_rate=1e-3), steps=80)
    case 'blind':
      return run('text', data=dict(grey=True), steps=40)
  raise ValueError(f'configs/quickstart.py has no variant {name!r}; there are {", ".join(STAGES)}')


def get_config(arg: str = 'video'):
  return to_dict(stage(arg))
