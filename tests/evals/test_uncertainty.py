import numpy as np
import pytest

from keye_jax.evals import uncertainty


@pytest.mark.parametrize('hits, n, low, high', [
  (0, 10, 0.0, 0.27753),         # z^2 / (n + z^2)
  (10, 10, 0.72247, 1.0),
  (81, 263, 0.2552911, 0.3661741),   # Newcombe 1998, table I: 0.2553 to 0.3662
  (15, 148, 0.0624, 0.1605),         # Newcombe 1998
])
def test_wilson(hits, n, low, high):
  assert uncertainty.wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_refuses_nonsense():
  for hits, n in ((0, 0), (3, 2), (-1, 4)):
    with pytest.raises(ValueError, match='no share'):
      uncertainty.wilson(hits, n)


def test_bootstrap_is_as_wide_as_the_number_of_clips_says():
  values = np.random.default_rng(1).normal(size=400)
  alone = uncertainty.bootstrap(values, [str(i) for i in range(400)])
  assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
  # Every question asked four times of one clip: no more evidence than 100 questions.
  copied = np.repeat(values[:100], 4)
  clips = [str(i // 4) for i in range(400)]
  together = uncertainty.bootstrap(copied, clips)
  assert together == pytest.approx(uncertainty.bootstrap(values[:100], [str(i) for i in range(100)]))
  assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


def test_bootstrap_of_equal_values_is_a_point_and_repeats_itself():
  assert uncertainty.bootstrap([0.25] * 6, list('aabbcc')) == (0.25, 0.25)
  values, clips = [0.0, 1.0, 1.0, 0.0, 1.0], list('abcde')
  assert uncertainty.bootstrap(values, clips) == uncertainty.bootstrap(values, clips)


def test_paired_difference_by_hand():
  first, second = [1, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]
  got = uncertainty.paired(first, second, list('aabbcd'))
  assert got.value == pytest.approx(2 / 6)
  assert (got.first_better, got.second_better) == (3, 1)
  # Clips a, b, c are won and d is lost: 2 * (C(4,0) + C(4,1)) / 16.
  assert got.p == pytest.approx(10 / 16)
  assert got.low <= got.value <= got.high
  opposite = uncertainty.paired(second, first, list('aabbcd'))
  assert opposite.value == -got.value and opposite.p == got.p


@pytest.mark.parametrize('wins, losses, p', [(0, 0, 1.0), (5, 0, 2 / 32), (5, 5, 1.0), (9, 1, 22 / 1024)])
def test_sign_test(wins, losses, p):
  assert uncertainty.sign_test(wins, losses) == pytest.approx(p)


def test_paired_refuses_lists_of_different_length():
  with pytest.raises(ValueError, match='paired comparison of 2, 3'):
    uncertainty.paired([1, 0], [1, 0, 1], ['a', 'b'])


def test_relative_loss_by_hand():
  """Clip a loses 3 against 2, clip b 5 against 6."""
  found = uncertainty.relative([1.0, 2.0, 5.0], [1.5, 0.5, 6.0], ['a', 'a', 'b'])
  assert found.value == 0.0 and found.low == pytest.approx(5 / 6 - 1) and found.high == pytest.approx(0.5)
  same = uncertainty.relative([1.01, 2.02], [1.0, 2.0], ['a', 'b'])
  assert all(x == pytest.approx(0.01) for x in same)
  with pytest.raises(ValueError, match='relative loss of 1 and 2 values and 2 clips'):
    uncertainty.relative([1.0], [1.0, 2.0], ['a', 'b'])
