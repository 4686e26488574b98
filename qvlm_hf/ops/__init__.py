"""`torch.ops.qvlm_hf.*`: a schema, a PyTorch reference and checked kernels for each operator."""

from qvlm_hf.ops import linear as _linear  # registers the operators of linear.py
from qvlm_hf.ops.attention import decode_attention
from qvlm_hf.ops.norm import rms_norm

__all__ = ["decode_attention", "rms_norm"]

del _linear
