"""`keye data build --embed`: a small random tower finds copies in rows and evaluation sets, and keeps the rest."""
import functools
import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.corpus import local, looks
from data_pipelines.errors import InputError
from keye_jax.hf import writer
from launch import cli, embed
from tests.data_pipelines.test_corpus import build, bytes_of, picture, row
from tests.hf import models

SIMILAR = 0.999           # of this tower; copies have 0.9995 and more, other pictures 0.993 at most


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  out = str(tmp_path_factory.mktemp('tower') / 'keye')
  writer.export(out, models.KEYE, models.random_params(models.KEYE, 'keye'), models.tiny_tokenizer(), 'keye',
                models.DATA, 'float32')
  return out


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Rows 1 and 4 show the picture of row 0 without its border, which the perceptual hash does not find, row 4 with
  another text; row 2 shows it resized. So does the evaluation set show that of row 3."""
  path = tmp_path_factory.mktemp('set')
  for i in range(5):
    picture(i).save(path / f'{i}.png')
  picture(1).resize((84, 84)).save(path / 'small.jpg', quality=80)
  for i in (1, 2):
    cut = picture(i, 140).crop((12, 12, 128, 128)).resize((84, 84))
    cut.save(path / f'cut{i}.jpg', quality=80)
    one, other = (looks.look('image', np.asarray(Image.open(path / name))) for name in (f'{i}.png', f'cut{i}.jpg'))
    assert not looks.alike(one, other)
  rows = [row(name, 'what is it?', answer) for name, answer in (
      ('1.png', 'a'), ('cut1.jpg', 'a'), ('small.jpg', 'a'), ('2.png', 'a'), ('cut1.jpg', 'b'), ('3.png', 'a'),
      ('4.png', 'a'))]
  (path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  (path / 'eval.jsonl').write_text(json.dumps(row('cut2.jpg', 'is it?', 'no')) + '\n')
  models.tiny_tokenizer().save(path)
  return path


def with_tower(folder, model, out, **more):
  tower = embed.tower(model)
  return build(folder, out, embed=tower, similar=SIMILAR, model=tower.digest, **more)


@pytest.fixture(scope='module')
def built(folder, model, tmp_path_factory):
  out = tmp_path_factory.mktemp('built') / 'corpus'
  return out, with_tower(folder, model, out)


def test_copies_are_found_and_others_kept(folder, built, model, tmp_path):
  out, made = built
  at = lambda i: f'{folder}/rows.jsonl:{i + 1}'
  lines = map(json.loads, (out / 'dropped.jsonl').read_text().splitlines())
  gone = {r['row']: (r['reason'], r['message']) for r in lines}
  reason, message = gone.pop(at(3))
  assert reason == 'medium of an evaluation set'
  assert message.startswith(f'{at(3)}: its picture is like that of {folder}/eval.jsonl:1 to the model (cosine ')
  assert gone == {at(1): ('duplicate by embedding', f'{at(1)}: like {at(0)} to the model'),
                  at(2): ('near duplicate', f'{at(2)}: looks and reads like {at(0)}')}
  assert made['rows'] == 4 and made['made']['similar'] == SIMILAR
  with pytest.raises(InputError, match=r'made otherwise \(differs in: embed, similar\)'):
    build(folder, out)
  made = with_tower(folder, model, tmp_path / 'medium', same='medium')
  assert made['dropped']['duplicate by embedding'] == 2 and made['rows'] == 3


@pytest.mark.slow
def test_processes_drop_the_same(folder, model, built, tmp_path):
  with_tower(folder, model, tmp_path / 'two', runner=functools.partial(local.run, workers=2))
  assert bytes_of(tmp_path / 'two') == bytes_of(built[0])


@pytest.mark.beam
def test_beam_drops_the_same(folder, model, built, tmp_path):
  from data_pipelines.corpus import beam
  with_tower(folder, model, tmp_path / 'beam', runner=functools.partial(beam.run, runner='DirectRunner', args=''))
  assert bytes_of(tmp_path / 'beam') == bytes_of(built[0])


def test_the_command(folder, model, tmp_path, capsys):
  arguments = ['data', 'build', str(folder / 'rows.jsonl'), '--workers', '1', '--out', str(tmp_path / 'a')]
  assert cli.main([*arguments, '--embed', model, '--similar', str(SIMILAR)]) == 0
  assert 'dropped: duplicate by embedding 1, near duplicate 1' in capsys.readouterr().out
  assert cli.main([*arguments, '--similar', '1.5']) == 2
  assert cli.main([*arguments, '--embed', str(tmp_path)]) == 2
  assert '--similar 1.5 must be above 0 and at most 1' in capsys.readouterr().err
