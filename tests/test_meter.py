"""The limit that a step's loss is compared with."""
import math

from keye_jax import meter
from keye_jax.meter import Meter


def step(loss, skipped=0.0):
  weight = 1.0 - skipped
  return {'loss': (loss * weight, weight), 'skipped': (skipped, 1.0), 'spikes': (0.0, 1.0)}


def run(losses, factor=2.0, before=None):
  books = Meter(3, factor)
  if before:
    books.restore(before.saved())
  for number, loss in losses:
    books.add(number, step(loss), 1, [])
  books.settle()
  return books


def test_limit_is_a_multiple_of_the_median_of_steps_that_have_ended():
  first = [(n, float(n)) for n in range(1, meter.SPIKE_AFTER + 1)]
  books = run(first)
  assert books.limit(meter.SPIKE_AFTER + 1) == math.inf                 # step 16 may still be under way
  assert books.limit(meter.SPIKE_AFTER + 2) == 2 * 8.5
  assert run(first, factor=0.0).limit(99) == math.inf
  assert run([(n, -1.0) for n in range(99)]).limit(200) == math.inf     # a multiple says nothing here
  resumed = run([(17, 17.0)], before=books)
  assert resumed.limit(18) == 2 * 8.5 and resumed.limit(19) == 2 * 9.0


def test_skipped_steps_and_old_ones_do_not_count():
  books = run([(n, 1.0) for n in range(40)] + [(n, 3.0) for n in range(40, 40 + meter.SPIKE_WINDOW)])
  assert books.limit(200) == 6.0
  books.add(150, step(99.0, skipped=1.0), 1, [])
  books.settle()
  assert books.limit(200) == 6.0
