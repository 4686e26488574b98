"""Measurements that users run on their own machine: kernels and whole models, beside full precision and what else there is."""

from qvlm_hf.bench.kernels import KernelRow, measure_kernels
from qvlm_hf.bench.machine import read_bandwidth
from qvlm_hf.bench.models import ModelRow, Way, measure_models

__all__ = ["KernelRow", "ModelRow", "Way", "measure_kernels", "measure_models", "read_bandwidth"]
