"""`qvlm_hf::rms_norm`: the norm before most quantized modules, one operator for PyTorch's eight.

A decoding step on a CPU spends as long on a small operator as on a small matrix. The operator is
for inference. torch.compile gets it in its graph, so that it rounds where eager PyTorch does.

Left out: GPUs. Triton's launches in eager mode cost what several of PyTorch's do, so that needs
measuring first.
"""

import torch
from torch import Tensor

from qvlm_hf.ops import fast_path, reference
from qvlm_hf.ops.library import can_fuse, define

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in float32, rounded to x's dtype before and after `weight`, as LlamaRMSNorm does.

    Args:
        x: [..., K].
        weight: [K].
        epsilon: added to the mean square.

    Returns:
        [..., K], the same bits as LlamaRMSNorm.
    """
    if torch.compiler.is_compiling():
        compute = torch.ops.qvlm_hf.rms_norm.default if can_fuse(x) else reference.rms_norm
        return compute(x, weight, epsilon)
    # `is True`: torch.fx traces with stand-ins that are neither
    if x.is_cpu is True and (found := fast_path.rms_norm(x, weight, epsilon)) is not None:
        return found
    return _compute(x, weight, epsilon) if can_fuse(x) else reference.rms_norm(x, weight, epsilon)


def _compute(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """By the kernel if it takes the call."""
    fast_path.load()  # at once: an equal call later must give equal bits
    with torch.no_grad():  # the operator stands below what records gradients
        found = fast_path.rms_norm(x, weight, epsilon)
    return reference.rms_norm(x, weight, epsilon) if found is None else found


define(
    "rms_norm",
    "(Tensor x, Tensor weight, float epsilon) -> Tensor",
    fake=lambda x, weight, _: x.new_empty(
        x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)
    ),
    # Contiguous, as the fake says: PyTorch's operators keep the strides of a permuted input.
    kernels={"CPU": lambda *arguments: _compute(*arguments).contiguous()},
    instead="call qvlm_hf.ops.rms_norm, or use torch.no_grad()",
)
