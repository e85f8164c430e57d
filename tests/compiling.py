"""How XLA compiles the tests' programs. Compiling is most of their time."""
import importlib.metadata


def flags(level: int, devices: int) -> str:
  """XLA_FLAGS of so many CPU devices. level: of LLVM's optimisation.

  XLA's former code generator for loops compiles in half the time of the one that replaced it; from jaxlib 0.11 on
  there is only the latter.
  """
  former = importlib.metadata.version('jaxlib').startswith('0.10.')
  return ' '.join([f'--xla_force_host_platform_device_count={devices}', f'--xla_backend_optimization_level={level}',
                   *['--xla_cpu_use_fusion_emitters=false'] * former])
