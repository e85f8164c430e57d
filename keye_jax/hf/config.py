"""ModelConfig <-> config.json.

A key that changes the mathematics and that this model does not have (a bias, a sliding window, another rotary scaling)
is refused by name: a folder either loads as what it is or not at all.
"""
import json
from typing import Any

from data_pipelines.errors import InputError
from keye_jax.config import IndexerConfig, ModelConfig, TextConfig, VisionConfig
from keye_jax.hf.names import Format, check_format

MODEL_TYPES: dict[str, Format] = {'KeyeVL2': 'keye', 'qwen3_moe': 'qwen3_moe', 'qwen3': 'qwen3', 'llama': 'llama'}
PACKING_POSITIONS = 32768    # the published class hard-codes it, so its config.json has no key for it
PROJECTOR_EPS = 1e-5         # likewise


def read_json(path: str) -> dict[str, Any]:
  """A JSON object from a file; InputError naming the file when it is missing or not one."""
  try:
    with open(path, encoding='utf-8') as f:
      value = json.load(f)
  except FileNotFoundError:
    raise InputError(f'{path}: no such file; give a folder that holds a complete Hugging Face checkpoint') from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise InputError(f'{path}: not valid JSON ({e}); download the file again') from None
  if not isinstance(value, dict):
    raise InputError(f'{path}: expected a JSON object, found a {type(value).__name__}')
  return value


def from_hf(raw: dict[str, Any], where: str = 'config.json') -> tuple[ModelConfig, Format]:
  """config.json as a dict -> (model, format).

  The model computes in float32 with float32 parameters, attention is `sparse` when there is an indexer; the caller
  replaces what it wants otherwise. Raises InputError naming the key.
  """
  kind = raw.get('model_type')
  if kind not in MODEL_TYPES:
    raise InputError(f'{where}: model_type {kind!r} is not supported; supported are {", ".join(sorted(MODEL_TYPES))}')
  fmt = MODEL_TYPES[kind]
  _refuse(raw, fmt, where)
  experts = _get(raw, where, 'num_experts', 'num_local_experts', default=0) if fmt in ('keye', 'qwen3_moe') else 0
  embed, heads = _get(raw, where, 'hidden_size'), _get(raw, where, 'num_attention_heads')
  theta, sections, interleaved = _rope(raw, where)
  text = TextConfig(
      layers=_get(raw, where, 'num_hidden_layers'), embed=embed, heads=heads,
      kv_heads=_get(raw, where, 'num_key_value_heads', default=heads),
      head_dim=_get(raw, where, 'head_dim', default=embed // heads),
      vocab=_get(raw, where, 'vocab_size'),
      ffn=_get(raw, where, 'moe_intermediate_size' if experts else 'intermediate_size'),
      experts=experts, experts_per_token=_get(raw, where, 'num_experts_per_tok') if experts else 0,
      qk_norm=fmt != 'llama',
      tied_head=bool(_get(raw, where, 'tie_word_embeddings', default=False)),
      rope_theta=theta, mrope_section=sections, mrope_interleaved=interleaved,
      norm_eps=float(_get(raw, where, 'rms_norm_eps')),
      max_position=_get(raw, where, 'max_position_embeddings'),
      dense_ffn=_get(raw, where, 'intermediate_size', default=0) if experts else 0,
      indexer=_indexer(raw, where) if fmt == 'keye' else IndexerConfig())
  seen = raw.get('vision_config') if fmt == 'keye' else None
  vision = vision_keys(seen, f'{where}: vision_config') if seen else VisionConfig()
  return ModelConfig(text=text, vision=vision, attention='sparse' if text.indexer.heads else 'dense'), fmt


def to_hf(cfg: ModelConfig, fmt: Format, dtype: str = 'bfloat16', ids: dict[str, int] | None = None) -> dict[str, Any]:
  """The config.json of `cfg` in format `fmt`; `from_hf` inverts it.

  ids: special token ids under their config.json names (`eos_token_id`, `video_token_id`, ...), written as they are.
  Raises ValueError when the format cannot hold the model.
  """
  check_format(cfg, fmt)
  t = cfg.text
  out: dict[str, Any] = {
      'architectures': [_architecture(cfg, fmt)],
      'model_type': next(k for k, v in MODEL_TYPES.items() if v == fmt),
      'hidden_size': t.embed, 'num_hidden_layers': t.layers, 'num_attention_heads': t.heads,
      'num_key_value_heads': t.kv_heads, 'head_dim': t.head_dim, 'vocab_size': t.vocab, 'hidden_act': 'silu',
      'intermediate_size': t.dense_ffn if t.experts else t.ffn,
      'rms_norm_eps': t.norm_eps, 'max_position_embeddings': t.max_position, 'tie_word_embeddings': t.tied_head,
      'attention_bias': False, 'attention_dropout': 0.0, 'initializer_range': 0.02, 'use_cache': True,
      'rope_theta': t.rope_theta, 'rope_scaling': None, 'torch_dtype': dtype,
  }
  if fmt == 'llama':
    out |= {'mlp_bias': False}
  if t.experts:
    out |= {'num_experts': t.experts, 'num_experts_per_tok': t.experts_per_token, 'moe_intermediate_size': t.ffn,
            'decoder_sparse_step': 1, 'mlp_only_layers': [], 'norm_topk_prob': True, 'router_aux_loss_coef': 0.001,
            'output_router_logits': False}
  if t.mrope_section:
    out['rope_scaling'] = {'mrope_section': list(t.mrope_section), 'rope_type': 'default', 'type': 'default'}
    if t.mrope_interleaved:
      out['rope_scaling']['mrope_interleaved'] = True
  if fmt == 'keye':
    out['auto_map'] = {'AutoConfig': 'configuration_keye_vl_2.KeyeVL2Config',
                       'AutoModelForCausalLM': f'modeling_keye_topk_mask_30ba3b.{_architecture(cfg, fmt)}'}
  if t.indexer.heads:
    out['sa_config'] = {'indexer_head_dim': t.indexer.head_dim, 'indexer_num_heads': t.indexer.heads,
                        'indexer_num_kv_heads': 1, 'topk': t.indexer.topk, 'q_chunk_size': 512, 'kv_chunk_size': 512}
  if v := (cfg.vision if cfg.vision.layers else None):
    out['vision_config'] = {
        'hidden_size': v.embed, 'intermediate_size': v.ffn, 'num_hidden_layers': v.layers,
        'num_attention_heads': v.heads, 'patch_size': v.patch, 'image_size': v.image, 'num_channels': 3,
        'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': v.norm_eps, 'spatial_merge_size': v.merge,
        'temporal_patch_size': 1, 'rope_theta': v.rope_theta, 'attention_dropout': 0.0,
    }
    own = {'packing_positions': (v.packing_positions, PACKING_POSITIONS),
           'projector_norm_eps': (v.projector_eps, PROJECTOR_EPS)}
    out['vision_config'] |= {k: value for k, (value, published) in own.items() if value != published}
  return out | (ids or {})


def _architecture(cfg: ModelConfig, fmt: Format) -> str:
  if fmt == 'keye':
    return 'KeyeVL2MoeForConditionalGeneration' if cfg.text.experts else 'KeyeVL2ForConditionalGeneration'
  return {'qwen3_moe': 'Qwen3MoeForCausalLM', 'qwen3': 'Qwen3ForCausalLM', 'llama': 'LlamaForCausalLM'}[fmt]


def _get(raw, where, *keys, default=None):
  """The first of `keys` that is present and not null; without a default, its absence is the user's error."""
  for key in keys:
    if raw.get(key) is not None:
      return raw[key]
  if default is None:
    raise InputError(f'{where}: key {keys[0]!r} is missing; the folder does not describe its model completely')
  return default


def _refuse(raw, fmt, where):
  """Keys whose value would change what is computed."""
  allowed = {'attention_bias': (None, False), 'mlp_bias': (None, False), 'use_sliding_window': (None, False),
             'hidden_act': (None, 'silu'), 'decoder_sparse_step': (None, 1), 'mlp_only_layers': (None, []),
             'quantization_config': (None,), 'partial_rotary_factor': (None, 1.0)}
  if fmt == 'qwen3_moe':
    allowed['norm_topk_prob'] = (True,)      # absent means false there, and this router always renormalises
  elif fmt == 'keye':
    allowed['norm_topk_prob'] = (None, True)
  for key, values in allowed.items():
    if raw.get(key) not in values:
      raise InputError(f'{where}: {key} = {raw.get(key)!r} is not supported (supported: {values[-1]!r})')


def _rope(raw, where) -> tuple[float, tuple[int, ...], bool]:
  """(theta, sections, interleaved) from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
  rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'mrope') or rope.get('partial_rotary_factor', 1.0) != 1.0:
    raise InputError(f'{where}: rotary scaling {rope!r} is not supported; supported rope_type: default, mrope')
  theta = _get({'rope_theta': rope.get('rope_theta', raw.get('rope_theta'))}, where, 'rope_theta')
  return float(theta), tuple(rope.get('mrope_section') or ()), bool(rope.get('mrope_interleaved', False))


def _indexer(raw, where) -> IndexerConfig:
  sa = raw.get('sa_config')
  if not sa:
    return IndexerConfig()
  if sa.get('indexer_num_kv_heads', 1) != 1:
    raise InputError(f'{where}: sa_config.indexer_num_kv_heads = {sa["indexer_num_kv_heads"]!r} is not supported '
                     '(supported: 1)')
  inside = f'{where}: sa_config'
  return IndexerConfig(heads=_get(sa, inside, 'indexer_num_heads'), head_dim=_get(sa, inside, 'indexer_head_dim'),
                       topk=_get(sa, inside, 'topk'))


def vision_keys(v: dict[str, Any], inside: str) -> VisionConfig:
  """The tower that the keys of a `vision_config` describe, of Keye or SigLIP. Raises InputError naming the key."""
  if (act := v.get('hidden_act', 'gelu_pytorch_tanh')) != 'gelu_pytorch_tanh':
    raise InputError(f'{inside}: hidden_act {act!r} is not supported (supported: gelu_pytorch_tanh)')
  return VisionConfig(
      layers=_get(v, inside, 'num_hidden_layers'), embed=_get(v, inside, 'hidden_size'),
      heads=_get(v, inside, 'num_attention_heads'), ffn=_get(v, inside, 'intermediate_size'),
      patch=_get(v, inside, 'patch_size'), image=_get(v, inside, 'image_size'),
      merge=_get(v, inside, 'spatial_merge_size'), norm_eps=float(_get(v, inside, 'layer_norm_eps', default=1e-6)),
      projector_eps=float(_get(v, inside, 'projector_norm_eps', default=PROJECTOR_EPS)),
      rope_theta=float(_get(v, inside, 'rope_theta', default=1e4)),
      packing_positions=_get(v, inside, 'packing_positions', default=PACKING_POSITIONS))
