"""How XLA compiles the tests' programs, in this process and those it starts. Compiling is most of their time."""
import importlib.metadata
import os
import pathlib
import platform

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / '.jax_cache'


def flags(devices: int) -> str:
  """XLA_FLAGS of so many CPU devices.

  At its level 0 LLVM compiles in a third of the time of its usual level, but with fused multiply-adds copies of one
  expression can differ by a rounding. A score that is computed again, beside the threshold of a top-k, must be the same
  bits, or the last key is lost (tests/nn/test_keye.py, meshes). AVX has no such instruction; other processors than x86
  take level 1.

  XLA's former code generator for loops compiles in half the time of the one that replaced it; from jaxlib 0.11 on
  there is only the latter.
  """
  level = ['--xla_backend_optimization_level=1']
  if platform.machine() == 'x86_64':
    level = ['--xla_backend_optimization_level=0', '--xla_cpu_max_isa=AVX']
  former = importlib.metadata.version('jaxlib').startswith('0.10.')
  return ' '.join([f'--xla_force_host_platform_device_count={devices}', *level,
                   *['--xla_cpu_use_fusion_emitters=false'] * former])


def environment() -> dict[str, str]:
  """Of a process that runs a command of this checkout as conftest.py sets this one up. Even its small programs are kept
  for the next process."""
  return dict(os.environ, PYTHONPATH=str(ROOT), JAX_COMPILATION_CACHE_DIR=str(CACHE),
              JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0', JAX_DEFAULT_MATMUL_PRECISION='highest')
