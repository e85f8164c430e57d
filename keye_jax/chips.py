"""What the makers publish of the devices that a program is planned for or runs on."""
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """One device as jax counts them. Bandwidths in bytes a second."""
  flops: float                 # bfloat16 peak, a second
  hbm: int                     # bytes; a compiler leaves a little of it unused
  hbm_bandwidth: float
  ici_bandwidth: float         # sent by a device over all its links, one direction
  dimensions: int              # of the torus; 1 where a switch joins the devices
  host: int = 0                # devices that these links join, where it is not all of them
  network: float = 0.0         # sent by a device to other hosts, one direction


def part(of: Chip, n: int) -> Chip:
  """One of the n devices that jax sees in a chip."""
  return Chip(of.flops / n, of.hbm // n, of.hbm_bandwidth / n, of.ici_bandwidth / n, of.dimensions)


# docs.cloud.google.com/tpu/docs/v5p-training, /v6e, /tpu7x: "Peak compute per chip (BF16)", "HBM capacity per chip",
# "HBM bandwidth per chip", "Bidirectional inter-chip interconnect (ICI) bandwidth per chip", half of it one direction.
CHIPS = {
    'v5p': Chip(459e12, 95 * GIB, 2765e9, 600e9, 3),
    'v6e': Chip(918e12, 32 * GIB, 1638e9, 400e9, 2),
    'tpu7x': part(Chip(2307e12, 192 * GIB, 7380e9, 600e9, 3), 2),
    # NVIDIA's data sheets of H100 SXM (dense, not "with sparsity") and DGX H100: NVLink 900 GB/s of both directions,
    # 8 x 400 Gb/s a host. Of the 84,942,979,072 bytes that XLA sees, the 95% that a run should be given
    # (XLA_PYTHON_CLIENT_MEM_FRACTION=.95): CUDA, its libraries and NCCL take the rest.
    'h100': Chip(989e12, int(0.95 * 84942979072), 3350e9, 450e9, 1, host=8, network=50e9),
}

# Dense bfloat16 FLOP/s of what jax calls a device, by the start of its name; the rest from the makers' data sheets.
PEAKS = {'TPU v5': CHIPS['v5p'].flops, 'TPU v6': CHIPS['v6e'].flops, 'TPU7x': CHIPS['tpu7x'].flops, 'TPU v4': 275e12,
         'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12}


def peak(kind: str) -> float | None:
  """bfloat16 FLOP/s of a device by its `device_kind`; None when it is not known."""
  return next((PEAKS[name] for name in sorted(PEAKS, key=len, reverse=True) if kind.startswith(name)), None)
