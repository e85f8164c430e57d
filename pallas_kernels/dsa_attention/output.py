"""What sparse attention returns. B batch, T query time, H query heads, K head dim."""
from typing import NamedTuple

import jax

from pallas_kernels.index_select.selection import Selection


class DSAOutput(NamedTuple):
  o_BTHK: jax.Array
  lse_BTH: jax.Array             # float32
  kl_BT: jax.Array | None        # float32
  selection: Selection
