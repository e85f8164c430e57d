"""Every stage of training, small: `keye ladder` runs them after each other on 2 cores.

    vit, text, 0, 1, 2, 3-warmup, 3      as configs/pretrain.py:tiny
    sft                                  as configs/sft.py:tiny, on the questions alone
    3-dense                              a control: stage 3 with dense attention, the same steps on the same data
    0-random-lm                          a control: stage 0 before the language model has learnt anything
    blind                                a control: stage 1 with grey frames, what can be had from the questions alone

What a stage trains, freezes and reads is what those files say. Sizes, row shapes and optimizer are those that have
learnt these clips (configs/quickstart.py, docs/main_job.md); numbers of steps and rates are ours, for some 40 minutes.
"""
import dataclasses

from configs import pretrain, quickstart, sft
from keye_jax.config import IndexerConfig, RunConfig, TextConfig, to_dict

RUNS = 'runs/ladder'
# Arguments of frameforge.build. Held-out clips ask more than 2,000 questions. What sparse attention costs rests on the
# few answers that a model is not sure of, so it is judged on more held-out clips, by their answers' losses alone.
CLIPS = dict(n_train=4000, n_heldout=400, n_images=3000, seed=0)
MORE_CLIPS = dict(n_train=0, n_heldout=12000, n_images=0, seed=1)
# stage -> (what it starts from, steps, learning rate; in 3-warmup the indexers', which alone learn there)
STAGES = {
    'vit': ('', 500, 5e-3), 'text': ('vit', 500, 5e-3), '0-random-lm': ('vit', 250, 5e-3), '0': ('text', 250, 5e-3),
    'blind': ('text', 150, 5e-3), '1': ('0', 500, 5e-3), '2': ('1', 1500, 3e-3), '3-warmup': ('2', 200, 2e-2),
    '3': ('3-warmup', 600, 1e-3), '3-dense': ('3-warmup', 600, 1e-3), 'sft': ('3', 250, 1e-3)}
CONTROLS = {'0-random-lm': '0', 'blind': '1', '3-dense': '3'}      # control -> the stage it is a variant of
TOPK = 21      # keys of sparse attention: a quarter of the 84 tokens of the median held-out question with its clip
TOWER = TextConfig(layers=1, embed=64, heads=4, kv_heads=4, head_dim=16, vocab=quickstart.VOCAB, ffn=128,
                   max_position=1024, indexer=IndexerConfig())


def stage(name: str, runs: str = RUNS) -> RunConfig:
  """Config of one stage; `runs` holds data/ and the run folders of the stages before. Raises ValueError for a name that
  is none."""
  if name not in STAGES:
    raise ValueError(f'configs/ladder.py has no stage {name!r}; there are {", ".join(STAGES)}')
  before, steps, rate = STAGES[name]
  rate_of = 'indexer_learning_rate' if name == '3-warmup' else 'learning_rate'
  base = sft.tiny() if name == 'sft' else pretrain.tiny(CONTROLS.get(name, name))
  if name == '3-dense':
    base = pretrain.run(base, 'dense', freeze=pretrain.INDEXERS_WAIT)
  text = quickstart.MODEL.text
  text = dataclasses.replace(text, indexer=dataclasses.replace(text.indexer, topk=TOPK))
  model = dataclasses.replace(quickstart.MODEL, text=text, attention=base.model.attention, contrast=base.model.contrast)
  if base.model.contrast:
    model = dataclasses.replace(model, text=TOWER)
  data = dataclasses.replace(quickstart.DATA, path=f'{runs}/data', sources=base.data.sources,
                             samples=quickstart.DATA.vision_rows if base.model.contrast else 0, grey=name == 'blind')
  if name == 'text':
    data = dataclasses.replace(data, vision_rows=0, vision_patches=0)
  if name == 'sft':
    data = dataclasses.replace(data, path=f'{runs}/data/train.jsonl')
  return RunConfig(
      model=model, data=data,
      optimizer=dataclasses.replace(quickstart.OPTIMIZER, **{rate_of: rate}),
      train=dataclasses.replace(base.train, init=f'{runs}/{before}' if before else '', steps=steps, batch=16,
                                log_every=20, save_every=500, keep=1, heldout='', eval_every=0))


def get_config(arg: str = '1'):
  return to_dict(stage(arg))
