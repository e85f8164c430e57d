"""What an evidence file says of the machine and the commit."""
import types

import jax
import pytest

from launch import results


@pytest.fixture(autouse=True)
def asked_anew():
  results.commit.cache_clear()
  yield
  results.commit.cache_clear()


def test_hardware_names_the_accelerators(monkeypatch):
  alone = results.hardware()
  assert 'cores' in alone and ';' not in alone               # computations run on the processor here
  card = types.SimpleNamespace(platform='gpu', device_kind='NVIDIA H100 80GB HBM3')
  monkeypatch.setattr(jax, 'devices', lambda: [card])
  assert results.hardware() == f'NVIDIA H100 80GB HBM3; {alone}'
  monkeypatch.setattr(jax, 'devices', lambda: [card, card])
  assert results.hardware() == f'2 x NVIDIA H100 80GB HBM3; {alone}'


@pytest.mark.parametrize('cpuinfo, said', [
  ('processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: other\n',
   'AMD EPYC (family 26, model 2)'),
  ('processor\t: 0\nmodel name\t: ARMv8\n', 'ARMv8'),
  ('processor\t: 0\nBogoMIPS\t: 50.00\n', '')])
def test_processors_of_one_name_differ_by_family(cpuinfo, said):
  assert results.processor(cpuinfo) == said


def test_a_copy_without_history_is_told_its_commit(monkeypatch, tmp_path):
  monkeypatch.setattr(results, 'FOLDER', tmp_path / 'docs' / 'results')
  results.FOLDER.mkdir(parents=True)
  monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
  assert results.commit() == ''
  results.commit.cache_clear()
  monkeypatch.setenv(results.COMMIT, '0123456789abcdef')
  assert results.commit() == '0123456789abcdef'
