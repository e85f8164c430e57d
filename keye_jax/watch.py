"""What a run uses of its devices: model FLOPs against their peak, memory, a trace of a few steps."""
import os
import pathlib

import jax

from keye_jax import chips
from keye_jax.config import RunConfig
from keye_jax.nn import counts

TRACE = 'profile'                # folder in the run folder
TRACE_AFTER, TRACE_STEPS = 3, 3  # steps: the first ones compile


def mfu(config: RunConfig, tokens_per_s: float) -> dict[str, float]:
  """{'mfu': model FLOPs a second over the peak of all devices of the mesh}; {} where that is not known.

  The language model alone, three times its forward pass, attention as if each row were one sample: pictures are left
  out, packed rows are counted too high. Not known on a CPU, on a device without an entry above, when a part is frozen,
  which costs less, and where the vision tower is what learns.
  """
  peak = chips.peak(jax.devices()[0].device_kind)
  if peak is None or config.train.freeze or config.model.contrast:
    return {}
  flops = counts.flops_per_token(config.model, config.data.tokens)
  each = 3 * sum(v for name, v in flops.items() if name not in ('vision', 'projector'))
  devices = config.mesh.data * config.mesh.context * config.mesh.expert
  return {'mfu': each * tokens_per_s / (peak * devices)}


def memory() -> dict[str, float]:
  """{'device_gib': the most that the first device of this process held at once}; {} where jax does not say (CPU)."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return {'device_gib': stats['peak_bytes_in_use'] / 2**30} if 'peak_bytes_in_use' in stats else {}


class Trace:
  """Writes a trace of `TRACE_STEPS` steps to RUN/profile, of process 0; `tensorboard --logdir RUN/profile` and xprof
  show it."""

  def __init__(self, run: str | os.PathLike, wanted: bool):
    self._folder, self._wanted = pathlib.Path(run) / TRACE, wanted and not jax.process_index()
    self._steps, self._running = 0, False

  def step(self) -> None:
    """Before each step."""
    if self._wanted and self._steps == TRACE_AFTER:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    elif self._steps == TRACE_AFTER + TRACE_STEPS:
      self.close()
    self._steps += 1

  def close(self) -> None:
    """Also writes what there is when the run ends before the last step of the trace."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
