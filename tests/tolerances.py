"""The one table of tolerances: relative L2 error by dtype. Never loosened to make a test pass."""
import numpy as np

RELATIVE = {'float32': 1e-5, 'bfloat16': 1e-2}
LOSS = 1e-4         # nats: two training loops in float32 after the same number of steps


def relative_error(actual, expected) -> float:
  """||actual - expected|| / ||expected||, in float64."""
  a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert a.shape == b.shape, f'shapes differ: {a.shape} and {b.shape}'
  return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def assert_close(actual, expected, dtype: str = 'float32', what: str = '') -> None:
  error = relative_error(actual, expected)
  assert error <= RELATIVE[dtype], f'{what}: relative error {error:.2e} > {RELATIVE[dtype]:.0e}'
