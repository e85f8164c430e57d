"""The check that runs on a device, at tiny shapes, and with an implementation that is wrong."""
import pytest

from pallas_kernels import check

SMALL = check.Case('float32', 8, 24, 5, first=6, H=4, G=2, K=8, I=2, J=8)


@pytest.mark.slow
def test_a_row_for_each_op_and_quantity_within_its_limit(monkeypatch):
  monkeypatch.setattr(check, 'PAGE', 4)
  found = list(check.rows((SMALL,)))
  assert {row.op for row in found} == {'dsa_attention', 'dense_attention', 'indexer_warmup', 'routed_swiglu',
                                       'dsa_decode', 'dsa_decode 8 bits'}
  assert {row.what for row in found} >= {'o', 'lse', 'kl', 'dq', 'dk', 'dv', 'diq', 'dik', 'dgate', 'selection'}
  assert all(row.error <= row.limit for row in found), found


def test_a_wrong_implementation_is_over_its_limit(monkeypatch):
  wrong = check.attention(SMALL, 'xla')
  make = lambda case, name: wrong_q if name == 'xla' else check.attention(case, name)
  wrong_q = lambda do, *x: wrong(do, x[0] * 1.01, *x[1:])
  x = check.inputs(SMALL)
  found = {row.what: row for row in check.compare('dsa_attention', SMALL, ('o', 'lse'), make, (x[0], *x))}
  assert found['o'].error > found['o'].limit and found['lse'].error > found['lse'].limit
