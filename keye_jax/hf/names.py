"""The one table between our parameters and the tensors of a Hugging Face folder, by name and shape, both ways.

`table(cfg, fmt)` lists every tensor of a checkpoint with its name, its shape, and the blocks of our parameters that its
rows hold. Describing (names only), reading and writing all walk this list, so they cannot disagree.

Formats: `keye` (Keye-VL-2.0, names from the loaders of its serving branch), `qwen3_moe`, `qwen3`, `llama`.
Rotary embedding is rotate-half in all of them and in ours, so no head is permuted here.

Letters: D embed, H query heads, G KV heads, K head dim, I indexer heads, J indexer head dim, E experts, F ffn, V vocab,
W vision width.
"""
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from keye_jax.config import ModelConfig

Format = Literal['keye', 'qwen3_moe', 'qwen3', 'llama']
FORMATS: tuple[Format, ...] = ('keye', 'qwen3_moe', 'qwen3', 'llama')
# How the expert weights of one layer are stored. `split`: one matrix an expert and projection, (out, in). `hub`: fused
# [E, D, 2F] and [E, F, D], as the published Keye and Qwen3-VL-MoE folders. `module`: fused [E, 2F, D] and [E, D, F], as
# transformers 5 holds them in memory and writes them back for vision-language models.
Experts = Literal['split', 'hub', 'module']
IGNORED = ('rotary_emb.inv_freq', 'visual.vision_model.head.')   # older checkpoints carry them; nothing reads them


class Piece(NamedTuple):
  """Rows [start, stop) of a stored tensor <-> one block of one of our parameters."""
  rows: tuple[int, int]
  path: str                        # 'layers/attn/indexer/q'
  index: tuple[int | slice, ...]   # where the block lies in the parameter: layer, expert, then slices
  shape: tuple[int, ...]           # of the block
  rule: Literal['same', 'linear', 'swap']


class Tensor(NamedTuple):
  name: str
  shape: tuple[int, ...]
  pieces: tuple[Piece, ...]        # in row order; together they are the whole tensor


def to_stored(rule: str, block: np.ndarray, rows: int) -> np.ndarray:
  """One of our blocks -> `rows` rows of a stored tensor, trailing axes still flat for `linear`.

  same: as is. linear: ours is [in..., out...], stored is [out, in]. swap: the last two axes change places.
  """
  if rule == 'linear':
    return block.reshape(-1, rows).T
  return block.swapaxes(-1, -2) if rule == 'swap' else block


def to_ours(rule: str, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The inverse of `to_stored`: rows of a stored tensor -> our block of `shape`."""
  if rule == 'linear':
    return stored.reshape(stored.shape[0], -1).T.reshape(shape)
  return stored.swapaxes(-1, -2) if rule == 'swap' else stored.reshape(shape)


def _same(name, path, index, shape) -> Tensor:
  return Tensor(name, shape, (Piece((0, shape[0]), path, index, shape, 'same'),))


def _linear(name, parts: list[tuple[str, tuple, tuple[int, ...], int]]) -> Tensor:
  """A stored matrix [out, in] whose rows are `parts`: (path, index, shape of our block, number of its rows)."""
  pieces, start = [], 0
  for path, index, shape, rows in parts:
    pieces.append(Piece((start, start + rows), path, index, shape, 'linear'))
    start += rows
  return Tensor(name, (start, int(np.prod(parts[0][2])) // parts[0][3]), tuple(pieces))


def _attention(cfg: ModelConfig, layer: int) -> Iterator[Tensor]:
  t, i = cfg.text, cfg.text.indexer
  at, name = (layer,), f'model.layers.{layer}.self_attn'
  D, H, G, K, I, J = t.embed, t.heads, t.kv_heads, t.head_dim, i.heads, i.head_dim
  yield _linear(f'{name}.q_proj.weight', [('layers/attn/q', at, (D, H, K), H * K)])
  yield _linear(f'{name}.k_proj.weight', [('layers/attn/k', at, (D, G, K), G * K)])
  yield _linear(f'{name}.v_proj.weight', [('layers/attn/v', at, (D, G, K), G * K)])
  yield _linear(f'{name}.o_proj.weight', [('layers/attn/o', at, (H, K, D), D)])
  if t.qk_norm:
    yield _same(f'{name}.q_norm.weight', 'layers/attn/q_norm', at, (K,))
    yield _same(f'{name}.k_norm.weight', 'layers/attn/k_norm', at, (K,))
  if I:
    name, path = f'{name}.sa_indexer', 'layers/attn/indexer'
    yield _linear(f'{name}.q_proj.weight', [(f'{path}/q', at, (D, I, J), I * J), (f'{path}/gate', at, (D, I), I)])
    yield _linear(f'{name}.k_proj.weight', [(f'{path}/k', at, (D, J), J)])
    yield _same(f'{name}.q_norm.weight', f'{path}/q_norm', at, (J,))
    yield _same(f'{name}.k_norm.weight', f'{path}/k_norm_scale', at, (J,))
    yield _same(f'{name}.k_norm.bias', f'{path}/k_norm_bias', at, (J,))


def _mlp(cfg: ModelConfig, layer: int, experts: Experts) -> Iterator[Tensor]:
  t = cfg.text
  D, F, E = t.embed, t.ffn, t.experts
  name, gate_up, down = f'model.layers.{layer}.mlp', 'layers/mlp/gate_up', 'layers/mlp/down'
  gate, up, rest = slice(0, F), slice(F, 2 * F), slice(None)
  if E:
    yield _linear(f'{name}.gate.weight', [('layers/mlp/router', (layer,), (D, E), E)])
  if E and experts != 'split':
    rule = 'same' if experts == 'hub' else 'swap'
    for leaf, path, shape in (('gate_up_proj', gate_up, (E, D, 2 * F)), ('down_proj', down, (E, F, D))):
      stored = shape if experts == 'hub' else (E, shape[2], shape[1])
      yield Tensor(f'{name}.experts.{leaf}', stored, (Piece((0, E), path, (layer,), shape, rule),))
    return
  for prefix, at in [(f'{name}.experts.{e}', (layer, e)) for e in range(E)] or [(name, (layer,))]:
    yield _linear(f'{prefix}.gate_proj.weight', [(gate_up, (*at, rest, gate), (D, F), F)])
    yield _linear(f'{prefix}.up_proj.weight', [(gate_up, (*at, rest, up), (D, F), F)])
    yield _linear(f'{prefix}.down_proj.weight', [(down, at, (F, D), D)])


def _vision(cfg: ModelConfig) -> Iterator[Tensor]:
  v, D = cfg.vision, cfg.text.embed
  W, F, h, k, P = v.embed, v.ffn, v.heads, v.embed // v.heads, v.patch
  name = 'visual.vision_model'
  patch = Piece((0, W), 'vision/patch', (), (v.patch_dim, W), 'linear')
  yield Tensor(f'{name}.embeddings.patch_embedding.weight', (W, 3, P, P), (patch,))
  yield _same(f'{name}.embeddings.patch_embedding.bias', 'vision/patch_bias', (), (W,))
  yield _same(f'{name}.embeddings.position_embedding.weight', 'vision/position', (), (v.grid ** 2, W))
  if v.packing_positions:
    yield _same(f'{name}.embeddings.packing_position_embedding.weight', 'vision/packing_position', (),
                (v.packing_positions, W))
  for layer in range(v.layers):
    at, prefix, path = (layer,), f'{name}.encoder.layers.{layer}', 'vision/layers'
    for norm in (1, 2):
      yield _same(f'{prefix}.layer_norm{norm}.weight', f'{path}/norm{norm}_scale', at, (W,))
      yield _same(f'{prefix}.layer_norm{norm}.bias', f'{path}/norm{norm}_bias', at, (W,))
    for x in 'qkv':
      yield _linear(f'{prefix}.self_attn.{x}_proj.weight', [(f'{path}/{x}', at, (W, h, k), W)])
      yield Tensor(f'{prefix}.self_attn.{x}_proj.bias', (W,), (Piece((0, W), f'{path}/{x}_bias', at, (h, k), 'same'),))
    yield _linear(f'{prefix}.self_attn.out_proj.weight', [(f'{path}/o', at, (h, k, W), W)])
    yield _same(f'{prefix}.self_attn.out_proj.bias', f'{path}/o_bias', at, (W,))
    for fc, size_in, size_out in (('fc1', W, F), ('fc2', F, W)):
      yield _linear(f'{prefix}.mlp.{fc}.weight', [(f'{path}/{fc}', at, (size_in, size_out), size_out)])
      yield _same(f'{prefix}.mlp.{fc}.bias', f'{path}/{fc}_bias', at, (size_out,))
  yield _same(f'{name}.post_layernorm.weight', 'vision/post_norm_scale', (), (W,))
  yield _same(f'{name}.post_layernorm.bias', 'vision/post_norm_bias', (), (W,))
  M = v.merge ** 2 * W
  yield _same('mlp_AR.pre_norm.weight', 'projector/norm_scale', (), (M,))
  yield _same('mlp_AR.pre_norm.bias', 'projector/norm_bias', (), (M,))
  for leaf, fc, size_out in (('linear_1', 'fc1', M), ('linear_2', 'fc2', D)):
    yield _linear(f'mlp_AR.{leaf}.weight', [(f'projector/{fc}', (), (M, size_out), size_out)])
    yield _same(f'mlp_AR.{leaf}.bias', f'projector/{fc}_bias', (), (size_out,))


def check_format(cfg: ModelConfig, fmt: Format) -> None:
  """Raises ValueError when a model has a part that the format cannot hold, rather than dropping it."""
  t = cfg.text
  wrong = {
      'keye': [],
      'qwen3_moe': [('no experts', not t.experts), ('no QK-norm', not t.qk_norm)],
      'qwen3': [('experts', t.experts), ('no QK-norm', not t.qk_norm)],
      'llama': [('experts', t.experts), ('QK-norm', t.qk_norm)],
  }
  if fmt not in wrong:
    raise ValueError(f'unknown format {fmt!r}; choose one of {", ".join(FORMATS)}')
  parts = [('a vision encoder', cfg.vision.layers), ('an indexer', t.indexer.heads), ('M-RoPE', t.mrope_section)]
  if bad := [what for what, present in wrong[fmt] + (parts if fmt != 'keye' else []) if present]:
    raise ValueError(f'format {fmt!r} cannot hold this model: it has {", ".join(bad)}')


def table(cfg: ModelConfig, fmt: Format, experts: Experts | None = None) -> list[Tensor]:
  """Every tensor of a checkpoint of `cfg` in format `fmt`, in the order of the network.

  `experts` None is the layout that the format's publishers use: `hub` for keye, `split` for qwen3_moe.
  Raises ValueError when the format cannot hold the model.
  """
  check_format(cfg, fmt)
  experts = experts or ('hub' if fmt == 'keye' else 'split')
  t = cfg.text
  V, D = t.vocab, t.embed
  out = [_same('model.embed_tokens.weight', 'embed', (), (V, D))]
  for layer in range(t.layers):
    out.append(_same(f'model.layers.{layer}.input_layernorm.weight', 'layers/attn_norm', (layer,), (D,)))
    out.extend(_attention(cfg, layer))
    out.append(_same(f'model.layers.{layer}.post_attention_layernorm.weight', 'layers/ffn_norm', (layer,), (D,)))
    out.extend(_mlp(cfg, layer, experts))
  out.append(_same('model.norm.weight', 'norm', (), (D,)))
  if not t.tied_head:
    out.append(_linear('lm_head.weight', [('head', (), (D, V), V)]))
  if cfg.vision.layers:
    out.extend(_vision(cfg))
  return out


def expert_layout(cfg: ModelConfig, fmt: Format, shapes: dict[str, tuple[int, ...]]) -> Experts:
  """Which layout a folder uses, from its names and shapes.

  A square fused matrix fits both fused layouts ([E, D, 2F] when D == 2F, [E, F, D] when D == F), but never are both
  matrices square, so the two of layer 0 together decide. When they fit neither layout, the format's own is returned
  and the check of names and shapes then reports them.
  """
  if not cfg.text.experts or 'model.layers.0.mlp.experts.gate_up_proj' not in shapes:
    return 'split'
  for layout in ('hub', 'module'):
    want = {x.name: x.shape for x in _mlp(cfg, 0, layout) if '.experts.' in x.name}
    if all(shapes.get(name) == shape for name, shape in want.items()):
      return layout
  return 'hub' if fmt == 'keye' else 'module'


class Leaf(NamedTuple):
  """One of our parameters: its shape, and every (tensor name, piece) that fills it."""
  shape: tuple[int, ...]
  parts: tuple[tuple[str, Piece], ...]


def bounds(piece: Piece) -> tuple[tuple[int, int], ...]:
  """[start, stop) of the piece's block along every axis of its parameter."""
  stacked = [(i, i + 1) for i in piece.index if isinstance(i, int)]
  slices = [s for s in piece.index if isinstance(s, slice)] + [slice(None)] * len(piece.shape)
  return (*stacked, *((s.start or 0, (s.start or 0) + n) for s, n in zip(slices, piece.shape)))


def leaves(tensors: list[Tensor]) -> dict[str, Leaf]:
  """The table turned round: our parameters by path, in the order of the table."""
  parts: dict[str, list[tuple[str, Piece]]] = {}
  for tensor in tensors:
    for piece in tensor.pieces:
      parts.setdefault(piece.path, []).append((tensor.name, piece))
  return {path: Leaf(tuple(max(stop for _, stop in axis) for axis in zip(*(bounds(p) for _, p in found))), tuple(found))
          for path, found in parts.items()}
