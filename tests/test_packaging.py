"""setup.py against the tested sets of constraints/ and the tree."""
import pathlib
import re
import runpy
from unittest import mock

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
SETS = {path.stem: path for path in sorted((ROOT / 'constraints').glob('*.txt'))}
BROKEN_JAX = ('0.10.0', '0.10.2', '0.11.0', '0.13')


@pytest.fixture(scope='module')
def metadata() -> dict:
  with mock.patch('setuptools.setup') as setup:
    runpy.run_path(str(ROOT / 'setup.py'))
  return setup.call_args.kwargs


def normal(name: str) -> str:
  return re.sub('[-_.]+', '-', name).lower()


def pins(name: str) -> dict[str, str]:
  lines = [line for line in SETS[name].read_text().splitlines() if line and not line.startswith('#')]
  return {normal(k): v for k, v in (line.split('==') for line in lines)}


def test_tested_sets_exist():
  assert set(SETS) == {'py311', 'py311-data', 'py312', 'py312-gpu'}


@pytest.mark.parametrize('name', SETS)
def test_tested_set_pins_what_make_installs_inside_the_ranges(name, metadata):
  wanted = metadata['install_requires'] + metadata['extras_require']['demo'] + metadata['extras_require']['test']
  if name.endswith('gpu'):
    wanted = wanted + metadata['extras_require']['gpu']
  if name.endswith('data'):
    wanted = wanted + metadata['extras_require']['data']
  pinned = pins(name)
  for requirement in map(Requirement, wanted):
    version = pinned.get(normal(requirement.name))
    assert version, f'{name}: {requirement.name} has no pin'
    assert requirement.specifier.contains(version), f'{name}: {requirement.name}=={version} is outside {requirement}'
  assert pinned['jax'] == pinned['jaxlib']


def test_jax_range_leaves_out_the_broken_releases(metadata):
  ranges = [Requirement(line) for group in (metadata['install_requires'], *metadata['extras_require'].values())
            for line in group if re.match(r'jax\b', line)]
  assert len(ranges) >= 5
  for requirement in ranges:
    assert not [v for v in BROKEN_JAX if requirement.specifier.contains(v)], str(requirement)


def test_every_package_of_the_tree_is_installed(metadata):
  top = ('pallas_kernels', 'data_pipelines', 'keye_jax', 'configs', 'launch')
  folders = {path.parent.relative_to(ROOT).as_posix().replace('/', '.')
             for name in top for path in (ROOT / name).rglob('*.py')}
  assert folders == set(metadata['packages'])


def test_extras_and_entry_point(metadata):
  assert set(metadata['extras_require']) == {'test', 'aot', 'parity', 'tpu', 'gpu', 'cluster', 'demo', 'data'}
  assert metadata['entry_points'] == {'console_scripts': ['keye = launch.cli:entry']}
  from launch import cli
  assert callable(cli.entry)
