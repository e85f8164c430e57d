"""The Python surface: load a model, take its logits, let it answer.

    model, params = keye_jax.load_pretrained('folder')
    text = keye_jax.generate(model, params, [{'role': 'user', 'content': [
        {'type': 'video', 'video': 'clip.mp4'}, {'type': 'text', 'text': 'What happens first?'}]}])

B rows, T tokens, V vocabulary, Q branches of a row (always one here).
"""
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from data_pipelines import chat, mrope, packing, pipeline, tokenizer
from data_pipelines.errors import InputError
from data_pipelines.images import patchify
from data_pipelines.schema import Batch, Example
from keye_jax import adapters, checkpoint, run_folder, sharding
from keye_jax.config import DataConfig, ModelConfig, RunConfig
from keye_jax.hf import gguf, reader, writer
from keye_jax.nn import head, int8, keye, lora
from keye_jax.nn.model import param_shapes
from keye_jax.rollout import sampler

Dtype = Literal['float32', 'bfloat16']
Message = dict[str, Any]      # {'role': ..., 'content': str or list of parts}; see data_pipelines/chat.py
Placing = Callable[[ModelConfig], reader.Place]
Medium = Any                  # a path, the bytes of a file, or a uint8 array


@dataclasses.dataclass(frozen=True)
class Model:
  """A loaded model without its weights, which travel beside it as a nested dict of arrays."""
  config: ModelConfig
  tokenizer: tokenizer.Tokenizer
  data: DataConfig            # how media are sampled and resized
  source: str                 # where it came from
  format: str                 # of the folder; for a run, what it would be exported as


def load_pretrained(folder: str | os.PathLike, dtype: Dtype | None = None,
                    attention: Literal['dense', 'sparse'] | None = None) -> tuple[Model, dict[str, Any]]:
  """Loads a Hugging Face folder, a Llama GGUF file, or the newest whole checkpoint of a run folder, whose adapters, if
  it has any, are merged into their base.

  dtype: of weights and computation; None is float32 on CPU and bfloat16 on an accelerator. attention: None is what the
  model was saved with, sparse when it has an indexer. Under a mesh the parameters are born sharded.
  Raises InputError, in one line that names the file, for anything missing, unused, damaged or of the wrong shape.
  """
  return load(folder, dtype, attention)


def placed(config: ModelConfig) -> reader.Place:
  """Where the reader puts parameters: on the device, or sharded over the mesh, each device reading its own block."""
  if not sharding.has_mesh():
    return lambda path, shape, dtype, fetch: jax.device_put(fetch((slice(None),) * len(shape)))
  specs = {path: leaf.sharding.spec for path, leaf in writer.flatten(param_shapes(config)).items()}

  def place(path, shape, dtype, fetch):
    return jax.make_array_from_callback(shape, jax.NamedSharding(jax.sharding.get_mesh(), specs[path]), fetch)
  return place


def load(folder: str | os.PathLike, dtype: Dtype | None = None, attention: Literal['dense', 'sparse'] | None = None,
         place: Placing = placed) -> tuple[Model, dict[str, Any]]:
  """`load_pretrained` with a say in what stands for a parameter that is read from a folder or a file of weights."""
  folder = os.fspath(folder)
  dtype = dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
  adapt = functools.partial(_adapted, dtype=dtype, attention=attention)
  if checkpoint.is_run(folder):
    run = run_folder.read_config(folder)
    if run.model.contrast:
      raise InputError(f'{folder}: holds a vision tower and its text tower, which answer nothing; start a stage '
                       f'from it: --config.train.init={folder}')
    config = adapt(run.model)
    if run.lora.targets:
      params = adapters.load(folder, run, config, lambda base: load_base(base, run, dtype))
    else:
      params = checkpoint.load_params(folder, keye.param_shapes(config), warnings.warn).params
    data = dataclasses.replace(run.data, tokenizer=run_tokenizer(folder, run.data), sources=())
    return Model(config, pipeline.open_tokenizer(data), data, folder, default_format(config)), params
  if folder.endswith('.gguf'):
    config, source, words = gguf.open_gguf(folder)
    config, fmt, data = adapt(config), 'llama', DataConfig(tokenizer=folder)
  else:
    source = reader.open_folder(folder)
    config, fmt, data = reader.read_config(folder)
    config, data, words = adapt(config), dataclasses.replace(data, tokenizer=folder), tokenizer.load(folder)
  params = reader.load(source, config, fmt, dtype, place(config))
  return Model(config, words, data, folder, fmt), params


def load_base(folder: str, run: RunConfig, dtype: Dtype) -> dict[str, Any]:
  """Parameters of the base of a run with adapters, in `dtype` but for what the run has in 8 bits: that is made of what
  it was made of when the run began, weights in the run's own dtype."""
  eight = lora.in_int8(run)
  params = load(folder, run.model.param_dtype if eight else dtype, place=int8.placing(eight, placed))[1]
  return int8.cast(int8.quantised(eight, params), dtype)


def encode(model: Model, messages: Sequence[Message], images: Sequence[Medium] = (), videos: Sequence[Medium] = (),
           think: bool = False) -> np.ndarray:
  """The prompt that `messages` make, int32 [T], media expanded to their placeholder tokens: what `logits` takes.

  Content is text in which `<image>` and `<video>` stand for the next of `images` and `videos`, or a list of
  {'type': 'text' | 'image' | 'video', ...} parts. think: opens `<think>` in the answer.
  """
  return _prompt(model, messages, images, videos, think).token_T


def logits(model: Model, params: dict[str, Any], tokens_BT: Any, images: Sequence[Medium] = (),
           videos: Sequence[Medium] = ()) -> jax.Array:
  """Next-token logits at every place: float32 [B, T, V].

  tokens_BT: integers; an image is its run of `<|image_pad|>`, a frame of a video its run of `<|video_pad|>`, one token
  for each merged patch, as `encode` lays them out. images, videos: in the order in which the rows need them.
  Raises InputError when the placeholders do not match the media.
  """
  token_BT = np.asarray(tokens_BT)
  if token_BT.ndim != 2 or not np.issubdtype(token_BT.dtype, np.integer) or not token_BT.size:
    raise InputError(f'tokens_BT must be integers of shape [B, T], got {token_BT.dtype} {list(token_BT.shape)}')
  if not (0 <= token_BT.min() and token_BT.max() < model.config.text.vocab):
    raise InputError(f'tokens_BT holds ids outside 0..{model.config.text.vocab - 1}')
  queues = {kind: _frames(model, kind, media) for kind, media in (('image', images), ('video', videos))}
  examples = [_example(model, row, queues, f'row {b}') for b, row in enumerate(token_BT)]
  for kind, frames in queues.items():
    if frames:
      raise InputError(f'{len(frames)} {kind} grid(s) have no run of placeholder tokens in tokens_BT')
  B, T = token_BT.shape
  return _logits(model.config, params, _batch(model, examples, T))[:B, :T]


def generate(model: Model, params: dict[str, Any], messages: Sequence[Message], images: Sequence[Medium] = (),
             videos: Sequence[Medium] = (), **sampling: Any) -> str:
  """The assistant's answer to `messages`. Keywords as in `stream_generate`."""
  return ''.join(stream_generate(model, params, messages, images, videos, **sampling))


def stream_generate(model: Model, params: dict[str, Any], messages: Sequence[Message], images: Sequence[Medium] = (),
                    videos: Sequence[Medium] = (), *, max_tokens: int = 512, temperature: float = 0.0,
                    top_p: float = 1.0, top_k: int = 0, stop: Sequence[str] = (), seed: int = 0,
                    think: bool = False, caches: sampler.Caches = 'contiguous') -> Iterator[str]:
  """Yields the answer in pieces as it is made.

  temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary. stop: strings that end the answer and are
  left out of it. The answer also ends at the tokenizer's end tokens and after `max_tokens`. Equal arguments and seed
  give equal answers. caches: 'paged' takes memory by need, for models with sparse attention on one device. Raises
  InputError for a bad message, a medium that cannot be read, a prompt that is too long, or caches in pages where there
  are none.
  """
  if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_tokens < 1 or '' in stop:
    raise InputError('sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_tokens >= 1 and no empty string '
                     'in stop')
  if caches == 'paged' and (model.config.attention != 'sparse' or sharding.has_mesh()):
    raise InputError("caches='paged' needs a model with attention='sparse', on one device")
  example = _prompt(model, messages, images, videos, think)
  # the sequence stays whole on a device: caches grow by a token at a time
  model = dataclasses.replace(model, config=dataclasses.replace(model.config, layout='decode'))
  T = len(example.token_T)
  if T + max_tokens > model.config.text.max_position:
    raise InputError(f'a prompt of {T} tokens and an answer of {max_tokens} exceed the model\'s context of '
                     f'{model.config.text.max_position}; shorten one of them')
  batch = _batch(model, [example], T)
  last_BQ = np.full((len(batch.token_BT), 1), -1, np.int32)
  last_BQ[0] = T - 1
  steps = sampler.stream(model.config, params, batch, _laid_out(last_BQ, 'decode', 'batch', None), max_tokens,
                         model.tokenizer.stop_ids, sampler.Sampling(temperature, top_p, top_k), seed, caches)
  ids = (int(token_BQ[0, 0]) for token_BQ, _ in steps)
  return _until(_text(model.tokenizer, ids), tuple(stop))


def default_format(config: ModelConfig) -> str:
  """The export format that holds a model."""
  if config.vision.layers or config.text.indexer.heads or config.text.mrope_section:
    return 'keye'
  return 'qwen3_moe' if config.text.experts else 'qwen3' if config.text.qk_norm else 'llama'


def run_tokenizer(folder: str, data: DataConfig) -> str:
  """The tokenizer folder of a run: its own when it carries one."""
  return folder if os.path.exists(os.path.join(folder, 'tokenizer.json')) else data.tokenizer


def bucket(n: int, least: int = 32) -> int:
  """The smallest 2**k or 3 * 2**k >= n, from `least` (a power of two) on: few shapes, hence few compilations, and at
  most a third of padding."""
  size = least
  while size < n:
    size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
  return size


def _adapted(config: ModelConfig, dtype: Dtype, attention: str | None) -> ModelConfig:
  if attention == 'sparse' and not config.text.indexer.heads:
    raise InputError('this model has no indexer: attention can only be dense')
  ring = sharding.has_mesh() and jax.sharding.get_abstract_mesh().shape['expert'] > 1
  kept = 'sparse' if config.attention == 'sparse' else 'dense'      # warm-up is a way to train
  return dataclasses.replace(config, dtype=dtype, param_dtype=dtype, remat='none', attention=attention or kept,
                             experts_transport='ring' if ring else 'local')


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params, batch: Batch) -> jax.Array:
  out = keye.apply(config, params, batch)
  return sharding.constrain(head.logits(out.hidden_BTD, out.head_DV), config.layout, None, None, None)


def _prompt(model: Model, messages, images, videos, think) -> Example:
  v = model.config.vision
  turns = chat.turns(messages, images, videos)
  if not v.layers and any(kind != 'text' for turn in turns for kind, _ in turn.parts):
    raise InputError(f'{model.source}: this model has no vision encoder; send text only')
  turns = pipeline.load_media(turns, model.data, v.patch, v.merge)
  return chat.prompt(turns, model.tokenizer, think, v.patch, v.merge)


def _frames(model: Model, kind: str, media: Sequence[Medium]) -> list[np.ndarray]:
  """Images, or the frames of all videos, resized: [h, w, 3] uint8 each."""
  if media and not model.config.vision.layers:
    raise InputError(f'{model.source}: this model has no vision encoder; send text only')
  v = model.config.vision
  turn = chat.Turn('user', tuple((kind, m) for m in media))
  (turn,) = pipeline.load_media([turn], model.data, v.patch, v.merge)
  return [frame for _, m in turn.parts for frame in (m.frames_FHW3 if kind == 'video' else [m])]


def _example(model: Model, token_T: np.ndarray, queues: dict[str, list[np.ndarray]], where: str) -> Example:
  """One row of tokens and the frames that its placeholder runs take off the queues."""
  v, side = model.config.vision, model.config.vision.patch * model.config.vision.merge
  pads = {model.tokenizer.id(f'<|{kind}_pad|>'): kind for kind in queues} if v.layers else {}
  vision_T, spans, seen, patches, t = np.full(len(token_T), -1, np.int32), [], 0, [], 0
  while t < len(token_T):
    kind = pads.get(int(token_T[t]))
    if kind is None:
      spans.append(1)
      t += 1
      continue
    if not queues[kind]:
      raise InputError(f'{where}, token {t}: a {kind} placeholder, but no {kind} is left for it')
    frame = queues[kind].pop(0)
    grid = frame.shape[0] // side, frame.shape[1] // side
    n = grid[0] * grid[1]
    if len(token_T) < t + n or (token_T[t:t + n] != token_T[t]).any():
      raise InputError(f'{where}, token {t}: the {kind} there is {grid[0]} x {grid[1]} tokens and needs a run of {n} '
                       'placeholders')
    vision_T[t:t + n] = np.arange(seen, seen + n)
    spans.append(grid)
    patches.append(patchify(frame[None], v.patch, v.merge))
    t, seen = t + n, seen + n
  zeros = np.zeros(len(token_T), np.int32)
  patch_PC = np.concatenate([p for p, _, _ in patches]) if patches else np.zeros((0, v.patch_dim), np.uint8)
  coord_P4 = np.concatenate([c for _, c, _ in patches]) if patches else np.zeros((0, 4), np.int32)
  frame_P = np.repeat(np.arange(1, len(patches) + 1, dtype=np.int32), [len(p) for p, _, _ in patches])
  return Example(token_T.astype(np.int32), zeros, zeros.astype(np.float32), mrope.positions(spans)[0], zeros, vision_T,
                 patch_PC, coord_P4, frame_P, where)


def _batch(model: Model, examples: list[Example], tokens: int) -> Batch:
  """One sample a row of at least `tokens`. Under a mesh, empty rows fill it, and the arrays are laid out on it."""
  v, layout = model.config.vision, model.config.layout
  frames = [packing.frame_runs(e) for e in examples]
  largest = max((size for runs in frames for size, _ in runs), default=0)
  # vision rows hold whole frames and at most about a thousand patches more than the largest: attention is inside frames
  N = bucket(largest, 16) if largest else 0
  N = max(N, min(1024, bucket(max(len(e.frame_P) for e in examples), 16))) if N else 0
  R = 0
  while any(packing.place(runs, [N] * R) is None for runs in frames):
    R = max(1, 2 * R)
  up = lambda n, axis: -(-n // sharding.extent(layout, axis)) * sharding.extent(layout, axis)
  rows = up(len(examples), 'batch')
  shape = packing.Shape(up(bucket(tokens), 'seq'), up(R, 'frames'), N, v.merge, v.patch_dim)
  batch = packing.pack(examples, shape, together=False)
  batch = Batch(*(np.concatenate([a, np.zeros((rows - len(a), *a.shape[1:]), a.dtype)]) for a in batch))
  return Batch(**{name: _laid_out(a, layout, *sharding.batch_axes(name, a.ndim))
                  for name, a in batch._asdict().items()})


def _laid_out(x: np.ndarray, layout: str, *axes: str | None) -> Any:
  """A host array on the mesh; itself without one."""
  if not sharding.has_mesh():
    return x
  return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec(layout, *axes)))


def _text(words: tokenizer.Tokenizer, ids: Iterator[int]) -> Iterator[str]:
  """Text as ids arrive; bytes of an unfinished character wait for the rest of it."""
  waiting: list[int] = []
  for i in ids:
    if i in words.stop_ids:
      break
    waiting.append(i)
    text = words.decode(waiting)
    if not text.endswith('\ufffd') or len(waiting) > 4:     # no character is longer than four bytes
      yield text
      waiting = []
  if waiting:
    yield words.decode(waiting)


def _until(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
  """Passes text on until a stop string; holds back what may be the beginning of one."""
  held = ''
  for piece in pieces:
    held += piece
    ends = [at for at in map(held.find, stop) if at >= 0]
    if ends:
      if text := held[:min(ends)]:
        yield text
      return
    keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
    if len(held) > keep:
      yield held[:len(held) - keep]
      held = held[len(held) - keep:]
  if held:
    yield held
