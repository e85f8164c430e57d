"""Eight forced CPU devices, float32 matmuls at full precision, one compilation cache for all tests.

Compiling is most of the tests' time, and at LLVM's level 1 takes two thirds of it. Level 0 would be faster still, but
rounds so differently between two programs that a top-k of nearly equal scores picks other keys. XLA's former code
generator for loops compiles in half the time of the one that replaced it; from jaxlib 0.11 on there is only the latter.
"""
import importlib.metadata
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
FLAGS = ['--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=1']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([*FLAGS, os.environ.get('XLA_FLAGS', '')])       # the environment has the last word

import jax

jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.jax_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
