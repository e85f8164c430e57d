"""Import order of the project: a module imports only lower layers. Walks the sources with ast."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Low to high. A module belongs to the longest prefix listed; modules of one layer may import each other,
# except across the two packages of the lowest layer, which know nothing of each other.
LAYERS = [
  ['pallas_kernels', 'data_pipelines'],
  ['keye_jax.config', 'keye_jax.sharding', 'keye_jax.balance', 'keye_jax.jaxpr_costs', 'keye_jax.chips',
   'keye_jax.temporaries'],
  ['keye_jax.nn'],
  ['keye_jax.objectives'],
  ['keye_jax.steps'],
  ['keye_jax.checkpoint', 'keye_jax.metrics', 'keye_jax.run_folder', 'keye_jax.adapters', 'keye_jax.hf'],
  ['keye_jax.rollout', 'keye_jax.evals'],
  ['keye_jax.loop', 'keye_jax.begin', 'keye_jax.feed', 'keye_jax.heldout', 'keye_jax.meter', 'keye_jax.api',
   'keye_jax.planning', 'keye_jax.watch', 'keye_jax.retrieval', 'keye_jax.answer_losses'],
  ['configs'],
  ['launch'],
]
RANK = {prefix: rank for rank, layer in enumerate(LAYERS) for prefix in layer}
OURS = ('pallas_kernels', 'data_pipelines', 'keye_jax', 'configs', 'launch')

# What the lowest layers may use besides the standard library. None: anything.
ALLOWED = {
  'pallas_kernels': {'jax', 'pallas_kernels'},
  'data_pipelines': None,
}
FORBIDDEN = {
  'data_pipelines': {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'keye_jax', 'pallas_kernels', 'configs', 'launch'},
  'keye_jax.evals': {'jax', 'flax'},      # scores are computed from decoded records, on the host
  'configs': {'jax', 'flax'},             # a config is read without starting a device
}


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def sources() -> list[pathlib.Path]:
  return sorted(path for top in OURS for path in (ROOT / top).rglob('*.py'))


def prefix_of(module: str, table) -> str | None:
  matches = [p for p in table if module == p or module.startswith(p + '.')]
  return max(matches, key=len) if matches else None


def imports(path: pathlib.Path, known: set[str]) -> list[tuple[int, str]]:
  """(line, module) of every import in a file, also those inside functions; `from a import b` is a.b if that is one."""
  found = []
  package = module_name(path).split('.') if path.name == '__init__.py' else module_name(path).split('.')[:-1]
  for node in ast.walk(ast.parse(path.read_text(), str(path))):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = '.'.join(package[:len(package) - node.level + 1] + ([node.module] if node.module else [])) \
          if node.level else node.module
      found += [(node.lineno, f'{base}.{a.name}' if f'{base}.{a.name}' in known else base) for a in node.names]
  return found


def violations(path: pathlib.Path, known: set[str]) -> list[str]:
  module = module_name(path)
  own = prefix_of(module, RANK)
  if own is None and module != 'keye_jax':
    return [f'{module}: belongs to no layer of {pathlib.Path(__file__).name}']
  bad = []
  for line, target in imports(path, known):
    where = f'{path.relative_to(ROOT)}:{line} imports {target}'
    top = target.split('.')[0]
    if module == 'keye_jax' and target != 'keye_jax.api' and top not in sys.stdlib_module_names:
      bad.append(f'{where}: keye_jax/__init__.py holds a lazy route to keye_jax.api only')
    other = prefix_of(target, RANK)
    if own and other and RANK[other] > RANK[own]:
      bad.append(f'{where}: a higher layer')
    if own and other and own != other and RANK[own] == RANK[other] == 0:
      bad.append(f'{where}: the two lowest packages know nothing of each other')
    if module != 'keye_jax' and target == 'keye_jax':
      bad.append(f'{where}: name the module that is meant')
    if (allowed := ALLOWED.get(own)) and top not in allowed and top not in sys.stdlib_module_names:
      bad.append(f'{where}: {own} imports only {", ".join(sorted(allowed))}')
    if top in FORBIDDEN.get(own, ()):
      bad.append(f'{where}: {own} never imports {top}')
  return bad


def test_a_module_imports_only_lower_layers():
  known = {module_name(path) for path in sources()}
  assert len(known) > 20
  assert not (bad := [line for path in sources() for line in violations(path, known)]), '\n'.join(bad)


@pytest.mark.parametrize('source, message', [
  ('from keye_jax import loop', 'a higher layer'),
  ('def f():\n  import launch.cli', 'a higher layer'),
  ('from .. import api', 'a higher layer'),
  ('import data_pipelines.video', None),
])
def test_the_walk_sees_a_violation(tmp_path, monkeypatch, source, message):
  monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
  path = tmp_path / 'keye_jax' / 'nn' / 'layers.py'
  path.parent.mkdir(parents=True)
  path.write_text(source)
  bad = violations(path, {'keye_jax.loop', 'keye_jax.api', 'launch.cli', 'data_pipelines.video'})
  assert (message is None and not bad) or (len(bad) == 1 and message in bad[0]), bad


FRESH = """
import importlib, multiprocessing, sys

def first(name):
  importlib.import_module(name)
  heavy = sorted({m.split('.')[0] for m in sys.modules} & {'jax', 'flax', 'torch', 'tensorflow', 'transformers'})
  print(name, *heavy, flush=True)

if __name__ == '__main__':
  for name in sys.argv[1:]:        # a fork of this bare interpreter is a fresh one, without its start-up
    process = multiprocessing.get_context('fork').Process(target=first, args=(name,))
    process.start(); process.join()
    if process.exitcode:
      sys.exit(f'import {name} failed as the first import')
"""


def test_first_imports_work_and_stay_light():
  names = ['keye_jax', 'data_pipelines', 'data_pipelines.schema', 'configs', 'launch', 'launch.cli', 'keye_jax.config',
           'pallas_kernels', 'keye_jax.nn', 'keye_jax.evals', 'keye_jax.api']
  names += sorted(module_name(path) for path in (ROOT / 'data_pipelines').glob('*.py') if path.stem != '__init__')
  run = subprocess.run([sys.executable, '-c', FRESH, *dict.fromkeys(names)], cwd=ROOT, capture_output=True, text=True,
                       timeout=120)
  assert run.returncode == 0, run.stderr[-2000:]
  loaded = {line.split()[0]: set(line.split()[1:]) for line in run.stdout.splitlines()}
  assert set(loaded) == set(names)
  for name in ('keye_jax', 'configs', 'launch', 'launch.cli', 'keye_jax.config', 'keye_jax.evals'):
    assert not loaded[name], f'import {name} loads {loaded[name]}'
  for name in loaded:
    if name.startswith('data_pipelines') and name not in {
          f'data_pipelines.{grain}' for grain in ('pipeline', 'mixture', 'streams')}:
      # those import grain, which imports jax
      assert 'jax' not in loaded[name], f'{name} loads jax'
    assert not loaded[name] & {'torch', 'tensorflow', 'transformers'}, f'import {name} loads {loaded[name]}'
