"""README.md of an exported folder: what it is, how it was made, how to load it."""
from collections.abc import Mapping
from typing import NamedTuple

from keye_jax.config import ModelConfig

NO_LICENCE = 'unknown'


class Card(NamedTuple):
  """What only the user knows. Every field may stay empty; the card then says that it is not stated."""
  title: str = ''
  made: str = ''                              # how: data, command, base model
  scores: Mapping[str, float] | None = None   # evaluation, by name
  protocol: str = ''                          # how the scores were taken
  licence: str = ''                           # a Hub licence id; empty: a placeholder that must be set


def render(card: Card, cfg: ModelConfig, fmt: str, parameters: int, dtype: str) -> str:
  """The card as Markdown with the Hub's YAML header."""
  t, v = cfg.text, cfg.vision
  task = 'video-text-to-text' if v.layers else 'text-generation'
  rows = [('format', f'`{fmt}`'), ('parameters', f'{parameters:,}'), ('stored as', dtype),
          ('layers, width', f'{t.layers}, {t.embed}'),
          ('attention', f'{t.heads} query heads, {t.kv_heads} key-value heads of {t.head_dim}'),
          ('sparse attention', f'top {t.indexer.topk} keys, indexer of {t.indexer.heads} x {t.indexer.head_dim}'
           if t.indexer.heads else 'none'),
          ('experts', f'{t.experts}, {t.experts_per_token} a token' if t.experts else 'none (dense)'),
          ('vision', f'{v.layers} layers of {v.embed}, {v.patch}-pixel patches, {v.merge} x {v.merge} merged'
           if v.layers else 'none'),
          ('context', f'{t.max_position:,} tokens')]
  scores = '\n'.join(f'| {k} | {x:.4g} |' for k, x in (card.scores or {}).items())
  licence = card.licence or NO_LICENCE
  parts = [
      f'---\nlicense: {licence}\npipeline_tag: {task}\nlibrary_name: keye_jax\n---\n',
      f'# {card.title or "Untitled model"}\n',
      '| | |\n|---|---|\n' + '\n'.join(f'| {k} | {x} |' for k, x in rows) + '\n',
      f'## How it was made\n\n{card.made or "Not stated."}\n',
      '## Evaluation\n\n' + (f'| | |\n|---|---|\n{scores}\n' if scores else 'None was given at export.\n'),
      f'\n{card.protocol}\n' if card.protocol else '',
      '## Loading\n\n```python\nimport keye_jax\nmodel, params = keye_jax.load_pretrained("path/to/this/folder")\n'
      'print(keye_jax.generate(model, params, [{"role": "user", "content": "Hello"}]))\n```\n',
      _elsewhere(fmt),
      '## Licence\n\n' + (f'`{licence}`\n' if card.licence else
                          'Not set. Whoever publishes this folder must set `license:` in the header above, in keeping '
                          'with the licences of the base model and of the data.\n')]
  return '\n'.join(p for p in parts if p)


def _elsewhere(fmt: str) -> str:
  if fmt != 'keye':
    return 'It also loads with `transformers` (`AutoModelForCausalLM.from_pretrained`).\n'
  return ('Tensor names, shapes and config keys are those of Keye-VL-2.0. Its modelling code is not part of '
          '`transformers`: to run this folder there or on its SGLang branch, copy the `*.py` files that `auto_map` in '
          'config.json names, and the processor files beside them, from the published model.\n')
