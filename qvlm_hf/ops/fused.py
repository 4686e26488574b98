"""`qvlm_hf::rms_norm` and `rotary`: what stands before most quantized modules, as one operator instead of PyTorch's six to fourteen.

A decoding step spends about as long on each small operator as on a small matrix. For inference in eager mode alone: where a
gradient is recorded, a compiler or another mode watches, or no kernel takes the call, it is PyTorch's operators (a compiler fuses them itself,
with what stands before and behind).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qvlm_hf.ops import cpu_operator, reference
from qvlm_hf.ops.schema import watched

__all__ = ["fusible", "rms_norm", "rotary"]


def fusible(x: Tensor) -> bool:
    """Whether fused operators may take x now."""
    if torch.is_grad_enabled() or watched() or forward_ad._current_level >= 0:
        return False
    if x.is_cpu is True:  # torch.fx traces with stand-ins
        cpu_operator.load()  # at once: an equal call later must give equal bits
        return True
    return x.is_cuda is True


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of the last dimension in float32, rounded to x's dtype before and after `weight`, as LlamaRMSNorm does.

    Args:
        x: [..., K].
        weight: [K].
        epsilon: added to the mean square.

    Returns:
        [..., K]; a kernel's sum has another order, which the last bit may show.
    """
    found = _called(torch.ops.qvlm_hf.rms_norm.default, x, weight, epsilon) if fusible(x) else []
    return found[0] if found else reference.rms_norm(x, weight, epsilon)


def rotary(x: Sequence[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Rotary position embedding: the same bits as Transformers' `apply_rotary_pos_emb` with unsqueeze_dim=2.

    Args:
        x: queries and keys, each [B, T, heads, D], D even.
        cos: [B or 1, T, D].
        sin: [B or 1, T, D].

    Returns:
        Each [B, T, heads, D].
    """
    found = _called(torch.ops.qvlm_hf.rotary.default, list(x), cos, sin) if fusible(cos) else []
    return found or reference.rotary(x, cos, sin)


def _called(operator: Any, *arguments: object) -> list[Tensor]:  # noqa: ANN401 - an operator
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
