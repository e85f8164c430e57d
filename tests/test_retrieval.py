"""The stage vit learns: pictures with digits and backgrounds that training has not shown find their captions."""
import dataclasses

import pytest

from configs import pretrain
from data_pipelines import frameforge, sources, tokenizer
from keye_jax import loop, metrics, retrieval
from launch import cli


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pictures')
  frameforge.build(folder, n_train=0, n_heldout=150, n_images=2000, processes=1)
  tokenizer.train_bpe(sources.texts(folder / 'images.jsonl'), 400).save(folder)
  return folder


def config(folder, **train):
  made = pretrain.tiny('vit')
  return dataclasses.replace(made, data=dataclasses.replace(made.data, path=str(folder)),
                             train=dataclasses.replace(made.train, **train))


@pytest.mark.slow
def test_held_out_pictures_find_their_captions(pictures, tmp_path, capsys):
  path = str(pictures / 'heldout_images.jsonl')
  out = tmp_path / 'vit'
  loop.train(config(pictures), out)
  found = retrieval.scores(str(out), path)
  assert found['retrieval'].n == 150 and found['retrieval'].low > 2 * found['majority'].value
  assert cli.main(['evaluate', '--model', str(out), '--data', path]) == 0
  said = capsys.readouterr().out
  assert f'{found["retrieval"].value:.3f}' in said and 'most frequent caption' in said
  losses = [record['heldout/loss'] for record in metrics.read(out) if 'heldout/loss' in record]
  assert losses[-1] < losses[0]
