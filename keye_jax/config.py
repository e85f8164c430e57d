"""Schema of a run: frozen dataclasses, hashable, one field a decision.

`configs/*.py` build these, hand them out as an ml_collections ConfigDict so that `--config.a.b=value` works, and a
launcher freezes that dict again at once: `freeze` refuses an unknown key, a missing key and a value of the wrong type.
A part that a model does not have is written as size 0 (`vision.layers == 0`), never as None: a ConfigDict cannot
override None.
"""
import dataclasses
import types
import typing
from typing import Any, Literal

from ml_collections import config_dict

from data_pipelines.errors import InputError


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
  """Lightning indexer of DeepSeek Sparse Attention (arXiv 2606.10651 §2; `sa_config` of the checkpoint)."""
  heads: int = 0                  # 0: no indexer, attention is dense
  head_dim: int = 64
  topk: int = 2048                # keys each query attends to, shared by all attention heads


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Decoder. The same code is a Qwen3-MoE, a dense Qwen3 (`experts=0`) or a Llama (`qk_norm=False` too)."""
  layers: int = 2
  embed: int = 64
  heads: int = 4
  kv_heads: int = 2
  head_dim: int = 16
  vocab: int = 256
  ffn: int = 128                  # width of one expert, or of the dense MLP when experts == 0
  experts: int = 0
  experts_per_token: int = 0
  qk_norm: bool = True            # RMSNorm over head_dim on q and k, before RoPE
  tied_head: bool = False
  rope_theta: float = 1e7
  mrope_section: tuple[int, ...] = ()      # frequency pairs of (time, height, width); (): plain 1-D RoPE
  mrope_interleaved: bool = False
  norm_eps: float = 1e-6
  max_position: int = 262144
  dense_ffn: int = 0              # the checkpoint's unused `intermediate_size` key, kept for export only
  indexer: IndexerConfig = IndexerConfig()


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Native-resolution SigLIP encoder and 2x2 projector (`visual.*`, `mlp_AR.*` of the checkpoint)."""
  layers: int = 0                 # 0: text only
  embed: int = 1152
  heads: int = 16
  ffn: int = 4304
  patch: int = 14                 # pixels
  image: int = 384                # pixels; (image // patch)**2 learned positions, interpolated to each grid
  merge: int = 2                  # merge x merge patches become one language token
  norm_eps: float = 1e-6
  projector_eps: float = 1e-5
  rope_theta: float = 1e4
  packing_positions: int = 32768  # a table the checkpoint carries and the forward pass does not read
  mean: float = 0.5               # pixel normalisation, (x / 255 - mean) / std, all channels
  std: float = 0.5

  @property
  def patch_dim(self) -> int:
    return 3 * self.patch * self.patch

  @property
  def grid(self) -> int:
    return self.image // self.patch


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  text: TextConfig = TextConfig()
  vision: VisionConfig = VisionConfig()
  attention: Literal['dense', 'warmup', 'sparse'] = 'dense'   # warmup: dense attention, indexer learns beside it
  dtype: Literal['float32', 'bfloat16'] = 'float32'           # of computation
  param_dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'block', 'attention', 'offload'] = 'none'      # what backward computes again: nn/layers.py
  experts_transport: Literal['local', 'ring', 'padded', 'ragged'] = 'local'       # keye_jax/nn/transport.py
  experts_capacity: float = 2.0   # of 'padded' and 'ragged': room for picks, over their mean
  vision_balance: float = 0.0     # frames spread over devices, in this share of the slots; 0: not (exchange.py)
  layout: Literal['train', 'decode'] = 'train'        # which table of keye_jax/sharding.py the program uses
  contrast: bool = False          # no language model: the vision tower learns beside `text`, its text tower


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  data: int = 1
  context: int = 1
  expert: int = 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  name: Literal['adamw', 'muon'] = 'adamw'
  learning_rate: float = 1e-4     # peak
  final_fraction: float = 0.1     # of the peak, at the last step
  schedule: Literal['cosine', 'linear', 'constant'] = 'cosine'
  warmup_steps: int = 0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1       # matrices only: no norm, bias or gate
  clip_norm: float = 1.0
  indexer_learning_rate: float = 1e-3   # its own group: the indexer learns from its KL alone
  indexer_clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One file of a mixture."""
  name: str = ''                  # to count by
  path: str = ''                  # file of rows, relative to `data.path`
  weight: float = 1.0             # share of the samples, relative to the other sources' weights


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read and how it is packed into static shapes."""
  path: str = ''                  # file of rows (JSONL, JSON, parquet, Arrow), media paths relative to it
  sources: tuple[SourceConfig, ...] = ()   # files mixed by weight; `path` is then the folder they lie in
  tokenizer: str = ''             # folder with tokenizer.json; '': the one beside `path`, else Keye's full vocabulary
  tokens: int = 512               # T of a row
  vision_rows: int = 0            # R: vision rows packed per token row
  vision_patches: int = 0         # N: patches per vision row; a frame never crosses a row
  fps: float = 2.0
  min_frames: int = 2
  frame_tokens_min: int = 64      # language tokens per video frame
  frame_tokens_max: int = 256
  video_tokens: int = 184320      # language tokens per video
  image_tokens_min: int = 4
  image_tokens_max: int = 20480
  pack: bool = True               # several samples in a row, mutually invisible
  samples: int = 0                # in a row at most; 0: as many as fit
  grey: bool = False              # blind baseline: every frame is replaced by mid grey
  timestamps: Literal['pts', 'index'] = 'pts'     # time of a frame: the container's, or index / fps as released code
  adaptive: Literal['off', 'paper', 'code'] = 'off'     # shorter clips get a share of video_tokens: video.ADAPTIVE
  # A medium beyond one of these limits is a counted skip.
  max_seconds: float = 14400.0
  max_mb: int = 16384             # size of the file, in MiB
  max_pixels: int = 67108864      # of one picture or frame as stored: 8192 x 8192
  max_decode_seconds: float = 600.0     # for reading one video
  cache_mb: int = 0               # decoded media kept in memory, per process
  readers: Literal['local', 'ray'] = 'local'      # where samples are made: beside the process that trains, or anywhere
  workers: int = 0                # worker processes of grain, or actors of Ray, for each process that trains
  streams: int = 0                # that the rows of a batch come from; 0: as many as there are processes at the start
  max_wait_seconds: float = 1800.0      # for one batch; then workers are replaced, and without any the run ends


ONLY_INDEXERS = ('', '!layers/attn/indexer')       # as `TrainConfig.freeze`: all but the indexers waits


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int = 100
  batch: int = 8                  # rows per step, all hosts together
  accumulate: int = 1             # micro-batches per step
  balance_rows: bool = False      # micro-batches of rows of like cost: devices wait less, see steps/even_rows.py
  seed: int = 0
  objective: Literal['sft', 'gspo'] = 'sft'     # gspo: from a policy's own responses; only planned so far
  freeze: tuple[str, ...] = ()    # parameter path prefixes, e.g. ('vision',); beside adapters all is frozen already
  balance_weight: float = 0.001   # router load balance
  indexer_weight: float = 1.0     # only scales the indexer's own step
  max_bad_steps: int = 10         # stop after so many skipped steps in a row
  spike_factor: float = 0.0       # skip a step whose loss is above so many times the recent median; 0: never
  log_every: int = 10
  save_every: int = 1000
  keep: int = 2                   # checkpoints kept
  init: str = ''                  # Hugging Face folder or run folder to start from; '': random
  heldout: str = ''               # file of rows to evaluate on, relative to the folder of the training data
  eval_every: int = 0             # steps between evaluations of `heldout`; the best parameters go to RUN/best
  patience: int = 0               # stop after so many evaluations in a row without a better one; 0: never


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters beside a frozen base (arXiv 2106.09685): W + alpha / rank * A B, only A and B are trained."""
  targets: tuple[str, ...] = ()   # patterns of paths, e.g. ('layers/attn/*',), see keye_jax/nn/lora.py; (): no adapters
  rank: int = 8
  alpha: float = 16.0
  base: Literal['float', 'int8'] = 'float'      # frozen: in model.dtype, or weights of layers in 8 bits (nn/int8.py)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  model: ModelConfig = ModelConfig()
  mesh: MeshConfig = MeshConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  lora: LoraConfig = LoraConfig()


def check(config: RunConfig) -> RunConfig:
  """`config` itself. Raises InputError naming the keys that contradict each other; types are `freeze`'s business."""
  text, vision, train, lora = config.model.text, config.model.vision, config.train, config.lora
  contrast = config.model.contrast
  faults = [
      (config.model.attention != 'dense' and not text.indexer.heads,
       f'model.attention = {config.model.attention!r} needs an indexer; set model.text.indexer.heads'),
      (text.kv_heads < 1 or text.heads % text.kv_heads,
       f'model.text.heads = {text.heads} is no multiple of kv_heads = {text.kv_heads}'),
      (text.experts and not 1 <= text.experts_per_token <= text.experts,
       f'model.text.experts_per_token = {text.experts_per_token} must be 1 to experts = {text.experts}'),
      (text.indexer.heads and any(s * text.indexer.head_dim % text.head_dim for s in text.mrope_section),
       f'model.text.mrope_section = {text.mrope_section} of head_dim = {text.head_dim} does not scale to whole numbers '
       f'for indexer.head_dim = {text.indexer.head_dim}'),
      (text.mrope_section and 2 * sum(text.mrope_section) != text.head_dim,
       f'model.text.mrope_section = {text.mrope_section} must sum to half of head_dim = {text.head_dim}'),
      (contrast and (text.experts or text.indexer.heads or not vision.layers),
       'model.contrast needs a vision tower, and a text tower without experts and indexer'),
      (contrast and lora.targets, 'lora.targets: adapters are for the language model; model.contrast trains none'),
      (contrast and not config.data.samples,
       'model.contrast needs data.samples, the most pictures with their captions in a row'),
      (contrast and train.accumulate > 1, f'train.accumulate = {train.accumulate}: micro-batches would not see each '
       "other's captions; model.contrast needs 1"),
      (not 0 <= config.model.vision_balance <= 1 or contrast and config.model.vision_balance,
       f'model.vision_balance = {config.model.vision_balance} must be 0 to 1, and 0 with model.contrast'),
      (vision.layers and (vision.heads < 1 or vision.embed % vision.heads),
       f'model.vision.embed = {vision.embed} is no multiple of heads = {vision.heads}'),
      (train.accumulate > 0 and train.batch % train.accumulate,
       f'train.batch = {train.batch} rows cannot be cut into train.accumulate = {train.accumulate} micro-batches'),
      (len({s.name for s in config.data.sources} - {''}) < len(config.data.sources),
       f'data.sources: the names {[s.name for s in config.data.sources]} must be different and not empty'),
      *((s.weight <= 0, f'data.sources: {s.name!r} has weight {s.weight}; it must be above 0, or leave the source out')
        for s in config.data.sources),
      (config.data.readers == 'ray' and config.data.workers < 1,
       "data.readers = 'ray' needs data.workers, the number of actors for each process that trains"),
      (config.data.streams and train.batch % config.data.streams,
       f'train.batch = {train.batch} rows cannot come in equal shares from data.streams = {config.data.streams}'),
      (train.spike_factor and train.spike_factor <= 1,
       f'train.spike_factor = {train.spike_factor} must be above 1, or 0 for no limit'),
      (bool(train.heldout) != (train.eval_every > 0),
       f'train.heldout = {train.heldout!r} and train.eval_every = {train.eval_every} need each other'),
      (train.patience and not train.heldout, f'train.patience = {train.patience} needs train.heldout'),
      (lora.rank < 1, f'lora.rank = {lora.rank} must be at least 1; lora.targets = () is without adapters'),
      (lora.base != 'float' and not lora.targets,
       f'lora.base = {lora.base!r} is for adapters, which lora.targets = () is without'),
      (lora.alpha <= 0, f'lora.alpha = {lora.alpha} must be above 0'),
      *((getattr(train, key) < 1, f'train.{key} = {getattr(train, key)} must be at least 1')
        for key in ('steps', 'batch', 'accumulate', 'log_every', 'save_every', 'keep', 'max_bad_steps'))]
  for wrong, message in reversed(faults):       # a number below 1 first: the others are about larger ones
    if wrong:
      raise InputError(message)
  return config


def to_dict(config) -> config_dict.ConfigDict:
  """Dataclass -> ConfigDict, nested; the inverse of `freeze`."""
  return config_dict.ConfigDict(dataclasses.asdict(config))


def freeze(cls: type, values: Any, path: str = '') -> Any:
  """Mapping -> frozen dataclass `cls`.

  Raises InputError naming the full key for an unknown key (with the nearest known one), a missing key, or a value of
  the wrong type.
  """
  hints = typing.get_type_hints(cls)
  where = path or 'config'
  for key in values.keys():
    if key not in hints:
      import difflib
      near = difflib.get_close_matches(key, hints, 1)
      hint = f'; did you mean {near[0]!r}?' if near else f'; known keys: {", ".join(sorted(hints))}'
      raise InputError(f'{where}: unknown key {key!r}{hint}')
  if missing := [k for k in hints if k not in values.keys()]:
    raise InputError(f'{where}: missing keys {missing}')
  return cls(**{k: _value(t, values[k], f'{path}.{k}' if path else k) for k, t in hints.items()})


def _value(hint, value, path):
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    if not hasattr(value, 'keys'):
      raise InputError(f'{path}: expected a group of keys, got {value!r}')
    return freeze(hint, value, path)
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    if value not in args:
      raise InputError(f'{path}: {value!r} is not one of {", ".join(map(repr, args))}')
    return value
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise InputError(f'{path}: expected a tuple, got {value!r}')
    return tuple(_value(args[0], v, f'{path}[{i}]') for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(hint, types.UnionType):
    raise TypeError(f'{path}: unions are not used in this schema')
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise InputError(f'{path}: expected {hint.__name__}, got {value!r}')
  return value
