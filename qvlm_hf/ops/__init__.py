"""`torch.ops.qvlm_hf.*`: one schema per operator, a plain PyTorch reference, and the kernels that must agree with it."""

from qvlm_hf.ops import cpu_operator as _cpu  # these register the implementations
from qvlm_hf.ops import gpu as _gpu
from qvlm_hf.ops import reference as _reference
from qvlm_hf.ops.fused import rms_norm, rotary
from qvlm_hf.ops.schema import linear, linears

__all__ = ["linear", "linears", "rms_norm", "rotary"]

del _cpu, _gpu, _reference
