"""Twenty AdamW steps on a tiny Qwen3-MoE give the losses of a torch loop: numbers by fixtures/make_training.py."""
import functools
import json

import jax
import numpy as np

from keye_jax.config import OptimizerConfig
from keye_jax.nn import keye
from keye_jax.objectives.sft import sft
from keye_jax.steps import state as state_lib
from keye_jax.steps.optimizer import make_optimizer, rates
from keye_jax.steps.update import make_update
from tests.parity.fixtures import FOLDER, load, text_batch
from tests.tolerances import LOSS


def test_twenty_steps_have_the_losses_and_gradients_of_torch():
  cfg, params, _ = load('qwen3_moe_tiny.npz')
  with np.load(FOLDER / 'training_tiny.npz') as f:
    data = {k: f[k] for k in f}
  settings = json.loads(str(data['settings']))
  optimizer = OptimizerConfig(schedule='cosine', **{k: v for k, v in settings.items() if k != 'steps'})
  tx, at = make_optimizer(optimizer), rates(optimizer, settings['steps'])
  # transformers balances experts over the pooled batch, this project row by row: left out on both sides
  objective = sft(cfg.layout, balance_weight=0.0, indexer_weight=0.0)
  update = make_update(functools.partial(keye.apply, cfg), objective, tx)
  state, losses, norms = state_lib.create(params, tx, (), cfg.dtype, jax.random.key(0)), [], []
  for step, token_BT in enumerate(data['token_NBT']):
    state, metrics = update(state, text_batch(token_BT), at(step))
    losses.append(float(metrics['loss'][0] / metrics['loss'][1]))
    norms.append(float(metrics['grad_norm'][0]))
  np.testing.assert_allclose(losses, data['losses'], rtol=0, atol=LOSS)
  np.testing.assert_allclose(norms, data['norms'], rtol=1e-3)
  assert losses[-1] < 0.9 * losses[0] and max(norms) > settings['clip_norm'] > min(norms)
