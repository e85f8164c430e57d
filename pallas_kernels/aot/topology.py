"""Devices that are not here, by name: 'v5p:4x4x8' as the maker names slices of TPUs, 'h100:64' by the number of GPUs.

Of GPUs, 8 make a host: they reach each other by NVLink, hosts by the network.
"""
import re

import jax
from jax.experimental import topologies

HOST = 8               # GPUs

# An H100 SXM as XLA describes it.
H100 = '''
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
'''
GPUS = {'h100': H100}


def devices(name: str) -> list[jax.Device]:
  """The devices of a topology, those of a host next to each other. Needs the compiler of their platform.

  Raises ValueError for a number of GPUs that fills no whole hosts, and the compiler's own error for a name that it does
  not know.
  """
  gpu, _, size = name.partition(':')
  if gpu not in GPUS:
    return topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  return topologies.get_topology_desc(platform='cuda', topology_name='', target_config=GPUS[gpu],
                                      topology=shape(size)).devices


def shape(size: str) -> str:
  """The number of GPUs as XLA wants it: groups joined by NVLink, hosts of a group, GPUs of a host."""
  n = int(size) if re.fullmatch('[1-9][0-9]*', size) else 0
  if not n or n > HOST and n % HOST:
    raise ValueError(f'write the number of GPUs, at most {HOST} or a multiple of {HOST}, as in h100:8')
  return f'{-(-n // HOST)}x1x{min(n, HOST)}'
