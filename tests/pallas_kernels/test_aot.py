import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import dispatch
from pallas_kernels.aot import __main__ as aot
from pallas_kernels.aot import gpu_kernels, rows, topology
from pallas_kernels.aot.programs import program


def test_every_row_is_a_program_whose_gradients_have_the_shapes_of_its_inputs():
  for row in rows.rows(targets=['v5p'], lengths=[256]):
    fn, arguments = program(row)
    out = jax.tree.leaves(jax.eval_shape(fn, *arguments))
    if row.direction == 'backward':
      assert [x.shape for x in out] == [x.shape for x in arguments[:len(out)]]
      assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in out)


def test_the_requirement_is_a_row_with_a_limit():
  limits = {(r.op, r.direction, r.target, r.length, r.shards): r.limit for r in rows.rows(targets=['v5p', 'v6e'])}
  assert limits['dsa_attention', 'forward', 'v6e', 262144, 8] == 2 * 2**30
  assert limits['dsa_attention', 'backward', 'v5p', 262144, 8] == 4 * 2**30
  assert sum(x is not None for x in limits.values()) == 4
  assert limits['dsa_attention', 'backward', 'v5p', 262144, 1] is None


def test_filters():
  kept = rows.rows(['index_select', 'dsa_attention'], ['backward'], ['v5p'], [32768])
  assert kept == [('dsa_attention', 'backward', 'v5p', 32768, 1)]


@pytest.mark.parametrize('results, code', [
  ([{'temp bytes': 9 * 2**30}, {'temp bytes': 2 * 2**30}], 0),         # one device may need more than a shared one
  ([{'temp bytes': 1}, {'temp bytes': 2 * 2**30 + 1}], 1),
  ([{'temp bytes': 1}, {'error': 'RESOURCE_EXHAUSTED: vmem'}], 1),
])
def test_exit_code_and_json(monkeypatch, capsys, results, code):
  whole = {'implementation': 'xla', 'seconds': 1.0, 'argument bytes': 1, 'output bytes': 1}
  monkeypatch.setattr(aot, 'installed', lambda target: True)
  monkeypatch.setattr(aot, 'compiled', lambda specs, shared: [r if 'error' in r else whole | r for r in results])
  words = ['--op', 'dsa_attention', '--target', 'v5p', '--length', '262144', '--direction', 'forward', '--json']
  assert aot.main(words) == code
  said = json.loads(capsys.readouterr().out)
  assert [r['shards'] for r in said['rows']] == [1, 8]
  assert said['command'].endswith('--direction forward --json') and said['versions']['jax'] == jax.__version__


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
  monkeypatch.setattr(aot, 'installed', lambda target: False)
  assert aot.main(['--target', 'v5p']) == 2
  assert capsys.readouterr().err == ("pallas_kernels.aot: v5p needs the package libtpu, which is not installed; "
                                     "pip install 'keye_jax[aot]'\n")


def test_a_child_that_dies_is_an_error_of_its_row(monkeypatch):
  monkeypatch.setattr(aot.sys, 'executable', '/bin/false')
  found = list(aot.compiled(rows.rows(['index_select'], targets=['v5p'], lengths=[8, 16])))
  assert [r['error'].startswith('the compiler ended its process with code 1') for r in found] == [True, True]


SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_kth_1' for 'sm_90a'
ptxas info    : Function properties for _kth_1
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compiling entry function '_scores' for 'sm_90a'
ptxas info    : Function properties for _scores
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compiling entry function 'input_reduce_fusion_1' for 'sm_90a'
ptxas info    : Function properties for input_reduce_fusion_1
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_registers_spills_and_shared_memory_of_each_kernel(tmp_path):
  found = gpu_kernels.registers(SAID)
  assert found == {'_kth_1': {'registers': 128, 'spill bytes': 16}, '_scores': {'registers': 168, 'spill bytes': 0}}
  passes = '// Before allocation\nmodule {}\n// Before the next pass\nmodule attributes {ttg.shared = 40960 : i32} {}\n'
  (tmp_path / 'jit_f._scores.triton-to-llvm.txt').write_text(passes)
  (tmp_path / 'jit_f._scores_1.triton-to-llvm.txt').write_text(passes.replace('40960', '8'))
  assert gpu_kernels.shared(str(tmp_path), '_scores') == {'shared bytes': 40960}
  assert gpu_kernels.shared(str(tmp_path), '_kth_1') == {}
  row = rows.rows(['index_select'], targets=['h100'], lengths=[4096])[0]._asdict()
  sizes = {'implementation': 'gpu', 'seconds': 1.0, 'limit bytes': None,
           **{f'{name} bytes': 2**20 for name in ('argument', 'output', 'temp')}}
  found['_scores']['shared bytes'] = 40960
  assert aot.line(row | sizes | {'gpu kernels': found}).splitlines()[1:] == [
    '  _kth_1: 128 registers, 16 bytes spilled', '  _scores: 168 registers, 0 bytes spilled, 40,960 bytes shared']


@pytest.mark.parametrize('size, shape', [('1', '1x1x1'), ('8', '1x1x8'), ('64', '8x1x8')])
def test_gpus_are_counted_by_hosts(size, shape):
  assert topology.shape(size) == shape


@pytest.mark.parametrize('name', ['h100', 'h100:0', 'h100:12', 'h100:2x4'])
def test_gpus_that_fill_no_whole_hosts(name):
  with pytest.raises(ValueError, match='write the number of GPUs, at most 8 or a multiple of 8, as in h100:8'):
    topology.devices(name)


class TestDispatch:

  def test_the_context_mesh_decides_and_not_the_host(self, monkeypatch):
    monkeypatch.setitem(dispatch.KERNELS, 'tpu', ('some_op',))
    assert dispatch.choose('some_op', None) == 'xla' and dispatch.platform() == 'cpu'
    device = type(jax.make_mesh((1,), ('x',)).abstract_mesh.abstract_device)
    for platform, chosen in (('tpu', 'tpu'), ('cuda', 'xla'), ('cpu', 'xla')):
      there = AbstractMesh((1,), ('x',), (AxisType.Explicit,), abstract_device=device('a device', 1, platform))
      with jax.sharding.use_abstract_mesh(there):
        assert dispatch.choose('some_op', None) == chosen
        assert dispatch.choose('another_op', None) == 'xla'

  def test_a_name_that_does_not_exist(self):
    with pytest.raises(ValueError, match="dense_attention: there is no implementation 'npu'; use one of reference"):
      dispatch.choose('dense_attention', 'npu')


@pytest.mark.slow
@pytest.mark.skipif(not rows.installed('v5p'), reason='needs libtpu, of the extra `aot`')
def test_compiles_for_a_tpu_that_is_not_here(capfd):
  assert aot.main(['--op', 'index_select', '--target', 'v5p', '--length', '4096', '--json']) == 0
  row, = json.loads(capfd.readouterr().out)['rows']
  assert row['implementation'] == 'tpu' and row['temp bytes'] > 0
