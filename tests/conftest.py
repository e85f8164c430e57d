"""Eight forced CPU devices, float32 matmuls at full precision, one compilation cache for all tests.

LLVM's level 1 compiles in two thirds of the time of its usual one. Level 0 would be faster still, but rounds so
differently between two programs that a top-k of nearly equal scores picks other keys.
"""
import os
import pathlib

from tests import compiling

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The environment has the last word.
os.environ['XLA_FLAGS'] = f'{compiling.flags(1, 8)} {os.environ.get("XLA_FLAGS", "")}'

import jax

jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / '.jax_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
