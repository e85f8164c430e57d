"""The pre-training stages of Keye-VL-2.0 (arXiv 2606.10651): `configs/pretrain.py:30b,stage=1`, `:tiny,stage=1`.

    vit         the vision tower and a text tower learn which caption belongs to which picture (keye_jax/nn/contrast.py)
    text        language model on text; tiny only, the published model begins with Qwen3-30B-A3B
    0           the projector alone learns to hand pictures to the language model
    1, 2        everything learns, in rows of 32K and 64K tokens; the indexers wait
    3-warmup    256K; dense attention, the indexers alone learn what it looks at
    3           256K; everything learns through sparse attention

A stage starts from the one before by one flag:

    keye train --config configs/pretrain.py:30b,stage=vit --config.train.init=SIGLIP --config.data.path=DATA --out vit
    keye assemble --lm QWEN3_MOE --vit vit --out start            # where stage 0 of the published model begins
    keye train --config configs/pretrain.py:30b,stage=0 --config.train.init=start --config.data.path=DATA --out s0
    keye train --config configs/pretrain.py:30b,stage=1 --config.train.init=s0 --config.data.path=DATA --out s1

DATA is a folder with the files that `data.sources` names. Of the published stages known are context, tokens, what is
trained, and length and budget of videos; no learning rate, batch or weight of a source was ever published, so each
value here has beside it where it comes from.
"""
import dataclasses

from configs import keye_vl_2_30b_a3b
from keye_jax.config import (
  ONLY_INDEXERS,
  DataConfig,
  IndexerConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  SourceConfig,
  TextConfig,
  TrainConfig,
  VisionConfig,
  to_dict,
)

STAGES = {'tiny': ('vit', 'text', '0', '1', '2', '3-warmup', '3'), '30b': ('vit', '0', '1', '2', '3-warmup', '3')}

ONLY_PROJECTOR = ('', '!projector')
# Dense attention does not read the indexers: without gradients weight decay would still wear them down.
INDEXERS_WAIT = ('layers/attn/indexer',)
# The text stage has no pictures: the vision tower only goes along, to the stage after it.
TOWER_WAITS = ('vision', 'projector', *INDEXERS_WAIT)


def sources(**weights: float) -> tuple[SourceConfig, ...]:
  """NAME=weight -> the file NAME.jsonl of `data.path`."""
  return tuple(SourceConfig(name, f'{name}.jsonl', weight) for name, weight in weights.items())


def run(base: RunConfig, attention: str, model=(), mesh=(), optimizer=(), data=(), **train) -> RunConfig:
  """`base` with fields of its parts replaced."""
  change = lambda part, fields: dataclasses.replace(part, **dict(fields))
  return RunConfig(change(base.model, dict(model) | dict(attention=attention)), change(base.mesh, mesh),
                   change(base.optimizer, optimizer), change(base.data, data), change(base.train, train))


def full(stage: str) -> RunConfig:
  """The 30B model on 128 chips (v5p:4x4x8)."""
  base = RunConfig(
      model=keye_vl_2_30b_a3b.model(),
      mesh=MeshConfig(data=16, context=1, expert=8),
      # No optimizer was published. AdamW's usual values for models of this size, as in DeepSeek-V3 (arXiv 2412.19437).
      optimizer=OptimizerConfig(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0, schedule='cosine'),
      data=DataConfig(
          # Frames a second, tokens a frame and an image: defaults of the released preprocessing code.
          fps=2.0, min_frames=2, frame_tokens_min=64, frame_tokens_max=256, image_tokens_min=4, image_tokens_max=20480,
          adaptive='paper',         # its pixel budget by duration
          workers=16),
      train=TrainConfig(
          balance_weight=0.001,     # router_aux_loss_coef of Qwen3-MoE
          indexer_weight=1.0,       # with detached inputs it only sets the size of the indexer's own step
          save_every=500, keep=3))

  # Kinds of data from the paper. Their weights are not published: pictures to videos to text as 50 to 24 to 26, what
  # the Keye-VL-1.5 report (arXiv 2509.01563) gives for its long stage, shared out evenly inside each.
  early = dict(captions=0.20, interleaved=0.15, ocr=0.15, video_captions=0.24, text_qa=0.26)
  middle = dict(ocr=0.10, captions=0.10, vqa=0.10, gui=0.05, grounding_counting=0.10, ecommerce_chinese=0.05,
                temporal_grounding=0.12, video_captions=0.12,
                math_stem=0.065, text_math_code=0.065, tool_use=0.065, search=0.065)
  # Long to short is 1:1 in the paper, here by samples: rows of the stage before on the short side.
  late = dict(long_video=0.20, documents=0.08, multi_document=0.06, multi_image=0.06, code=0.05, agent=0.05, short=0.50)

  # One vision row of 81,920 patches holds the largest image, 20,480 tokens; a row of tokens can be all vision.
  wide = dict(vision_patches=81920)
  # Rows hold very different numbers of pictures, devices see equal shares of all of them (docs/scale.md). Ours: room
  # for three quarters of the vision slots; frames of a batch that needs more stay at home.
  even = dict(vision_balance=0.75)
  # Sixteen devices share a row of 256K tokens and its vision rows, one each, often full of pictures.
  long = dict(model=dict(vision_balance=1.0), mesh=dict(data=1, context=16, expert=8))
  match stage:
    case 'vit':
      # Paper: SigLIP's loss against its text tower, native resolution, 500 B tokens, packed. SigLIP's own text tower is
      # of another kind; this one is a decoder of its size (27 layers, 1152 wide), new, with Keye's vocabulary.
      tower = TextConfig(layers=27, embed=1152, heads=16, kv_heads=16, head_dim=72, vocab=151936, ffn=4304,
                         max_position=4096)
      return run(
          base, 'dense', model=dict(text=tower, contrast=True),
          # arXiv 2303.15343: b2 = 0.95, and no weight decay on a tower that is trained already. The rate is ours, a
          # tenth of its 1e-3 from scratch.
          optimizer=dict(learning_rate=1e-4, warmup_steps=2000, weight_decay=0.0),
          data=dict(sources=sources(captions=1.0),            # DataComp, LAION, CC12M, PD12M, COCO (paper) in one file
                    # Ours: pictures of 900 x 900 pixels and 32 pairs a row at most. A row of tokens can be all vision.
                    tokens=4096, vision_rows=1, vision_patches=16384, image_tokens_max=1024, samples=32),
          # Up to 32K pairs a step, beyond which SigLIP found nothing to gain.
          batch=1024, steps=119209)                                                    # x 4K = 500 B tokens
    case '0':
      return run(
          base, 'dense', freeze=ONLY_PROJECTOR,
          optimizer=dict(learning_rate=1e-3, final_fraction=0.1, warmup_steps=30),     # usual for a projector alone
          data=dict(sources=sources(captions=0.5, interleaved=0.5),                    # kinds: paper; weights: even
                    tokens=8192, vision_rows=1, vision_patches=32768, image_tokens_max=4096),
          batch=512, steps=954)                                                        # x 8K = 4 B tokens
    case '1':
      return run(
          base, 'dense', freeze=INDEXERS_WAIT, model=even,
          # From 1e-4 down to where stage 2 begins: the range that models of this kind are pre-trained in.
          optimizer=dict(learning_rate=1e-4, final_fraction=0.2, warmup_steps=2000),
          data=dict(sources=sources(**early), tokens=32768, vision_rows=2, **wide,
                    video_tokens=24576, max_seconds=16.0),    # paper: 24K, segments of 15 s; these end at key frames
          batch=256, accumulate=2, balance_rows=True, steps=119209)                    # x 32K = 1 T tokens
    case '2':
      return run(
          base, 'dense', freeze=INDEXERS_WAIT, model=even,
          optimizer=dict(learning_rate=2e-5, final_fraction=0.5, warmup_steps=500),    # on from stage 1 to stage 3
          data=dict(sources=sources(**middle), tokens=65536, vision_rows=3, **wide,
                    video_tokens=61440, max_seconds=900.0),   # paper: 15 minutes, 64K less room for the text of a row
          batch=128, steps=238419)                                                     # x 64K = 2 T tokens
    case '3-warmup':
      return run(
          base, 'warmup', **long, freeze=ONLY_INDEXERS,
          # DeepSeek-V3.2 (arXiv 2512.02556): 1e-3 for 1000 steps of 16 x 128K = 2.1 B; Keye says about 2 B tokens.
          optimizer=dict(indexer_learning_rate=1e-3, schedule='constant'),
          data=dict(sources=sources(**late), tokens=262144, vision_rows=16, **wide, video_tokens=184320,
                    max_seconds=7200.0),                      # paper: 2 hours, 180K
          batch=8, steps=1000)
    case '3':
      return run(
          base, 'sparse', **long,
          # 7.3e-6: the sparse stage of DeepSeek-V3.2. Its indexer goes on more gently than in the warm-up.
          optimizer=dict(learning_rate=7.3e-6, final_fraction=0.1, warmup_steps=100, indexer_learning_rate=1e-4),
          data=dict(sources=sources(**late), tokens=262144, vision_rows=16, **wide, video_tokens=184320,
                    max_seconds=7200.0),
          batch=32, accumulate=4, balance_rows=True, steps=59605)                      # x 256K = 500 B tokens


def tiny(stage: str) -> RunConfig:
  """The same ladder at a size that a laptop trains in minutes, on the files that `keye data frameforge` writes.

  Rows grow with the stages, rates are those that a model of this size learns with.
  """
  base = RunConfig(
      model=ModelConfig(
          text=TextConfig(layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, vocab=1024, ffn=64, experts=4,
                          experts_per_token=2, mrope_section=(2, 3, 3), max_position=4096,
                          indexer=IndexerConfig(heads=4, head_dim=16, topk=32)),
          vision=VisionConfig(layers=1, embed=32, heads=2, ffn=64, image=56, packing_positions=16)),
      optimizer=OptimizerConfig(learning_rate=2e-3, final_fraction=0.2, warmup_steps=10, weight_decay=0.01,
                                indexer_learning_rate=2e-3),
      # A picture or frame of 56 x 56 pixels is 16 patches and 4 tokens; a vision row holds one. A clip with its
      # questions is up to 200 tokens.
      data=DataConfig(tokens=256, vision_rows=16, vision_patches=16, frame_tokens_min=4, frame_tokens_max=4,
                      video_tokens=64, image_tokens_min=4, image_tokens_max=4, cache_mb=256),
      train=TrainConfig(steps=200, batch=8, log_every=10, save_every=50))
  clips, mixed = dict(images=0.5, train=0.5), dict(tokens=512, vision_rows=32)
  tried = dict(heldout='heldout.jsonl', eval_every=50)
  match stage:
    case 'vit':
      tower = TextConfig(layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, vocab=1024, ffn=64, max_position=4096)
      return run(base, 'dense', model=dict(text=tower, contrast=True),
                 data=dict(sources=sources(images=1.0), samples=12), heldout='heldout_images.jsonl', eval_every=50)
    case 'text':
      return run(base, 'dense', freeze=TOWER_WAITS,
                 data=dict(sources=sources(text=1.0), vision_rows=0, vision_patches=0))
    case '0':
      return run(base, 'dense', freeze=ONLY_PROJECTOR, data=dict(sources=sources(images=1.0), tokens=128))
    case '1':
      return run(base, 'dense', freeze=INDEXERS_WAIT, data=dict(sources=sources(**clips)), **tried)
    case '2':
      return run(base, 'dense', freeze=INDEXERS_WAIT, optimizer=dict(learning_rate=1e-3),
                 data=dict(sources=sources(**clips), **mixed), **tried)
    case '3-warmup':
      return run(base, 'warmup', freeze=ONLY_INDEXERS, optimizer=dict(schedule='constant'), steps=100,
                 data=dict(sources=sources(**clips), **mixed), **tried)
    case '3':
      return run(base, 'sparse', optimizer=dict(learning_rate=5e-4, indexer_learning_rate=1e-3),
                 data=dict(sources=sources(**clips), **mixed), **tried)


def get_config(variant: str = ''):
  """RunConfig as a ConfigDict; raises ValueError for an unknown variant."""
  size, _, stage = variant.partition(',stage=')
  if stage not in STAGES.get(size, ()):
    known = '; '.join(f'{size},stage= {", ".join(stages)}' for size, stages in STAGES.items())
    raise ValueError(f'configs/pretrain.py: no variant {variant!r}; there are {known}')
  return to_dict({'tiny': tiny, '30b': full}[size](stage))
