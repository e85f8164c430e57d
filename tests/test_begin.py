"""What a run starts from."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import tokenizer
from keye_jax import begin
from keye_jax.config import DataConfig, IndexerConfig
from keye_jax.hf import writer
from keye_jax.nn import keye
from tests.hf.models import MODELS


def test_first_scores_of_a_new_indexer_do_not_depend_on_the_size_of_the_norms(tmp_path):
  dense = MODELS['qwen3']
  words = tokenizer.train_bpe(['a b c'], 320)
  params = keye.init(dense, jax.random.key(0))
  params['layers']['attn_norm'] = jnp.stack([jnp.full(24, 0.05), jnp.full(24, 20.0)])
  writer.export(str(tmp_path / 'hf'), dense, params, words, 'qwen3', DataConfig(), 'float32')
  text = dataclasses.replace(dense.text, indexer=IndexerConfig(heads=2, head_dim=8, topk=4))
  said = []
  params = begin.initial_params(dataclasses.replace(dense, text=text), str(tmp_path / 'hf'), jax.random.key(1),
                                said.append)
  assert 'a new one is initialised' in said[0]
  gate_LDI = np.asarray(params['layers']['attn']['indexer']['gate'])
  x_ND = np.random.default_rng(0).standard_normal((500, 24))
  spread_L = [(x_ND * np.asarray(params['layers']['attn_norm'][i]) @ gate_LDI[i]).std() for i in range(2)]
  np.testing.assert_allclose(spread_L, 1, rtol=0.3)
