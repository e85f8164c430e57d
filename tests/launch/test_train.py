"""The last line of `keye train`."""
from keye_jax.loop import Result
from launch import train


def test_the_last_line_says_how_it_ended():
  assert train.ending(Result(200, 0, {}), 200) == 'done: step 200 of 200, saved'
  assert train.ending(Result(40, 15, {}), 200) == ('stopped by SIGTERM after step 40 of 200, saved; the same command '
                                                   'goes on')
