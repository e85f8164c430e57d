"""Registers and spills of the kernels that were compiled for a GPU, as its assembler tells them.

Shared memory is not told: a Triton kernel's is given at its launch. XLA refuses one that asks for too much.
"""
import importlib.metadata
import pathlib
import re
import subprocess

ASSEMBLER = 'nvidia-cuda-nvcc-cu12', 'nvidia/cuda_nvcc/bin/ptxas'
KERNEL = re.compile(r"entry function '(_\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.S)


def assembled(folder: str) -> dict[str, dict[str, int]]:
  """{kernel: {registers, spill bytes}} of the Pallas kernels in a folder into which XLA dumped a program."""
  package, path = ASSEMBLER
  ptxas = importlib.metadata.distribution(package).locate_file(path)
  found = {}
  for file in sorted(pathlib.Path(folder).glob('*.ptx')):
    arch = re.search(r'^\.target (\w+)', file.read_text(), re.M)[1]
    run = subprocess.run([ptxas, f'-arch={arch}', '-v', file, '-o', '/dev/null'], capture_output=True, text=True,
                         check=True)
    found |= kernels(run.stderr)
  return found


def kernels(said: str) -> dict[str, dict[str, int]]:
  """From what `ptxas -v` said. XLA's own kernels have names that do not begin with '_'."""
  return {name: {'registers': int(registers), 'spill bytes': int(spilled)}
          for part in said.split('Compiling ')[1:] for name, spilled, registers in KERNEL.findall(part)}
