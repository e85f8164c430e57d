"""Registers, spills and shared memory of the Pallas kernels in a program that was compiled for a GPU."""
import importlib.metadata
import pathlib
import re
import subprocess

ASSEMBLER = 'nvidia-cuda-nvcc-cu12', 'nvidia/cuda_nvcc/bin/ptxas'
KERNEL = re.compile(r"entry function '(_\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.S)
PASSES = '.triton-to-llvm.txt'             # what XLA writes about Triton's passes, a file a kernel
SHARED = re.compile(r'ttg\.shared = (\d+)')
DUMP = {'xla_dump_emitter_re': 'triton'}   # compiler options for these files, whose writing takes minutes


def assembled(folder: str) -> dict[str, dict[str, int]]:
  """{kernel: {registers, spill bytes, and shared bytes where XLA wrote about passes}} of a folder into which XLA dumped
  a program."""
  package, path = ASSEMBLER
  ptxas = importlib.metadata.distribution(package).locate_file(path)
  found = {}
  for file in sorted(pathlib.Path(folder).glob('*.ptx')):
    arch = re.search(r'^\.target (\w+)', file.read_text(), re.M)[1]
    run = subprocess.run([ptxas, f'-arch={arch}', '-v', file, '-o', '/dev/null'], capture_output=True, text=True,
                         check=True)
    found |= registers(run.stderr)
  return {name: kernel | shared(folder, name) for name, kernel in found.items()}


def registers(said: str) -> dict[str, dict[str, int]]:
  """From what `ptxas -v` said. XLA's own kernels have names that do not begin with '_'."""
  return {name: {'registers': int(used), 'spill bytes': int(spilled)}
          for part in said.split('Compiling ')[1:] for name, spilled, used in KERNEL.findall(part)}


def shared(folder: str, kernel: str) -> dict[str, int]:
  """{shared bytes}: what Triton's allocation gives a kernel at its launch; `ptxas` knows static ones only."""
  files = pathlib.Path(folder).glob(f'*.{kernel}{PASSES}')
  sizes = [int(n) for file in files for n in SHARED.findall(file.read_text())]
  return {'shared bytes': max(sizes)} if sizes else {}
