"""Ahead-of-time compilation of every op for devices that are not here: `python -m pallas_kernels.aot`."""
