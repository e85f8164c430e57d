"""Eight forced CPU devices, float32 matmuls at full precision, one compilation cache for all tests."""
import gc
import os

from tests import compiling

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The environment has the last word.
os.environ['XLA_FLAGS'] = f'{compiling.flags(8)} {os.environ.get("XLA_FLAGS", "")}'

import jax

jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_compilation_cache_dir', str(compiling.CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

# Tracing makes many objects that stay: looking among them for garbage after every 700 took 6% of the time.
gc.set_threshold(100_000, 20, 20)
