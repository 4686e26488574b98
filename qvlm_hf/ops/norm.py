"""`qvlm_hf::rms_norm`: the norm before most quantized modules as one operator instead of PyTorch's six.

For inference in eager mode alone. Where a gradient is recorded, a compiler or another mode watches, or no kernel takes the call, it is
the six operators: a compiler fuses them itself, with what stands before and behind.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qvlm_hf.ops import cpu_operator, reference
from qvlm_hf.ops.schema import LIBRARY, watched

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, reference_only: bool = False) -> Tensor:
    """RMSNorm of the last dimension in float32, rounded to x's dtype before and after `weight`, as LlamaRMSNorm does.

    Args:
        x: [..., K].
        weight: [K].
        epsilon: added to the mean square.
        reference_only: take no kernel.

    Returns:
        [..., K]; a kernel's sum has another order, which the last bit may show.
    """
    if not (reference_only or torch.is_grad_enabled() or watched() or forward_ad._current_level >= 0):
        if x.is_cpu is True:  # torch.fx traces with stand-ins
            cpu_operator.load()  # now: an equal call later must give equal bits
        with torch._C._AutoDispatchBelowAutograd():
            if found := torch.ops.qvlm_hf.rms_norm.default(x, weight, epsilon):
                return found[0]
    return reference.rms_norm(x, weight, epsilon)
