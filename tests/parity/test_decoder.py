"""The decoder against transformers' Qwen3-MoE, with and without DSA. Numbers by tests/fixtures/make_decoders.py."""
import jax
import numpy as np
import pytest

from keye_jax.nn import head, keye
from keye_jax.objectives.sft import sft
from tests.parity.fixtures import load, text_batch
from tests.tolerances import assert_close


def test_qwen3_moe_logits_loss_and_balance():
  cfg, params, data = load('qwen3_moe_tiny.npz')
  batch = text_batch(data['token_BT'])
  out = jax.jit(keye.apply, static_argnums=0)(cfg, params, batch)
  assert_close(head.logits(out.hidden_BTD, out.head_DV), data['logits'], what='logits')
  assert_close(out.aux.balance_LB, data['balance_LB'], what='balance')
  objective = sft(cfg.layout, balance_weight=0.0, indexer_weight=0.0)
  loss, metrics = objective.loss(out, batch, objective.totals(batch))
  assert_close(loss, data['loss'], what='loss')
  assert_close(metrics['balance'][0] / metrics['balance'][1], data['balance_LB'].mean(), what='mean balance')


@pytest.mark.parametrize('attention,fixture', [('dense', 'dense'), ('warmup', 'dense'), ('sparse', 'sparse')])
def test_dsa_logits_and_indexer_kl(attention, fixture):
  cfg, params, data = load('dsa_tiny.npz', attention)
  batch = text_batch(data['token_T'][None], data['position_3T'].T[None])
  out = jax.jit(keye.apply, static_argnums=0)(cfg, params, batch)
  assert_close(head.logits(out.hidden_BTD, out.head_DV)[0], data[f'logits_{fixture}'], what='logits')
  if attention != 'dense':
    assert_close(out.aux.kl_LBT[:, 0], data[f'kl_{fixture}'], what='indexer KL')


def test_fixture_tells_dense_from_sparse():
  """Queries with at most k keys agree in both modes, later ones do not: the selection is at work."""
  _, _, data = load('dsa_tiny.npz')
  dense, sparse = data['logits_dense'], data['logits_sparse']
  assert_close(sparse[:8], dense[:8])
  assert (np.abs(sparse - dense).max(-1)[8:] > 0.1).all()
