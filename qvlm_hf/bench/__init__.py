"""Measurements that users run on their own machine: how fast the kernels are, beside what PyTorch offers instead."""

from qvlm_hf.bench.kernels import KernelRow, measure_kernels, read_bandwidth

__all__ = ["KernelRow", "measure_kernels", "read_bandwidth"]
