"""The loss of an answer beside others of its row is that of the answer alone."""
import dataclasses
import json

import jax
import numpy as np
import pytest

from data_pipelines import pipeline
from keye_jax import answer_losses
from keye_jax.nn import keye
from tests import tiny_run
from tests.tolerances import assert_close


def say(role: str, content: str) -> dict[str, str]:
  return {'role': role, 'content': content}


ASKED = [(['1 + 2', '3'], ['2 + 2', '4']), (['5 + 6', '11'],), (['7 + 1', '8'], ['9 + 9', '18'], ['0 + 1', '1'])]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  tiny_run.dataset(folder)
  turns = lambda pair: [say('user', pair[0]), say('assistant', pair[1])]
  together = [{'messages': [say('system', f'row {i}')], 'branches': [turns(p) for p in pairs]}
              for i, pairs in enumerate(ASKED)]
  alone = [{'messages': [say('system', f'row {i}'), *turns(p)]} for i, pairs in enumerate(ASKED) for p in pairs]
  for name, rows in (('together', together), ('alone', alone)):
    (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return tiny_run.with_indexer(tiny_run.config(folder / 'together.jsonl'))


def test_each_answer_has_the_loss_it_has_alone(config):
  model = dataclasses.replace(config.model, attention='dense')
  data = dataclasses.replace(config.data, tokens=96)
  params = keye.init(model, jax.random.key(0))
  found = answer_losses.losses(model, params, data, batch=2)
  assert found.clips == ['0', '0', '1', '2', '2', '2']
  alone = pipeline.Load(dataclasses.replace(data, path=data.path.replace('together', 'alone')), 14, 2, strict=True)
  batch, = pipeline.heldout_batches(alone, 6, 0, 1, together=False)
  out = jax.jit(lambda p, b: keye.apply(model, p, b))(params, batch)
  logp_BTV = jax.nn.log_softmax(out.hidden_BTD @ out.head_DV, -1)
  logp_BT = np.take_along_axis(np.asarray(logp_BTV), batch.target_BT[..., None], -1)[..., 0]
  assert_close(np.array(found.nats), -np.sum(logp_BT * batch.weight_BT, 1))
  assert found.tokens == (batch.weight_BT > 0).sum(1).tolist() and min(found.tokens) > 1
