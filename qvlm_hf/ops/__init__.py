"""`torch.ops.qvlm_hf.*`: one schema per operator, a plain PyTorch reference, and the kernels that must agree with it."""

from qvlm_hf.ops import cpu_operator as _cpu  # these register the implementations
from qvlm_hf.ops import gpu as _gpu
from qvlm_hf.ops import reference as _reference
from qvlm_hf.ops.attention import decode_attention
from qvlm_hf.ops.fused import rms_norm
from qvlm_hf.ops.schema import linear, linears

__all__ = ["decode_attention", "linear", "linears", "rms_norm"]

del _cpu, _gpu, _reference
