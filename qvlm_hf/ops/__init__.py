"""`torch.ops.qvlm_hf.*`: one schema per operator, a plain PyTorch reference, and the kernels that must agree with it."""

from qvlm_hf.ops import reference as _reference  # registers the implementation
from qvlm_hf.ops.schema import linear

__all__ = ["linear"]

del _reference
