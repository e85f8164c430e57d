import numpy as np
import pytest

from data_pipelines import schema
from pallas_kernels import dispatch, mask
from tests.pallas_kernels import cases, independent


def test_the_rule_is_that_of_the_data():
  assert mask.BRANCH_BITS == schema.BRANCH_BITS


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('layout', ['one', 'packed', 'branches'])
def test_visible_equals_plain_loops(layout, causal):
  case = cases.make(0, T=24, layout=layout, shuffle=True)
  got = mask.visible(case.q_segment[:, :, None], case.k_segment[:, None], case.q_order[:, :, None],
                     case.k_order[:, None], causal)
  for b in range(2):
    for t in range(24):
      assert np.flatnonzero(got[b, t]).tolist() == independent.seen(case, b, t, causal)


def test_an_implementation_that_does_not_exist_is_refused_by_name():
  assert dispatch.choose('dense_attention', None) == 'xla'
  assert dispatch.choose('dense_attention', 'reference') == 'reference'
  with pytest.raises(ValueError, match="dense_attention: there is no implementation 'tpu'; use one of reference, xla"):
    dispatch.choose('dense_attention', 'tpu')
