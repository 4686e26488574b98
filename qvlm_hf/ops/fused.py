"""`qvlm_hf::rms_norm`: the norm before most quantized modules, one operator for PyTorch's eight.

A decoding step on a CPU spends as long on a small operator as on a small matrix. This is for
inference alone. torch.compile gets the same operator in its graph, so that it rounds where eager
PyTorch does. PyTorch's operators compute what no kernel takes.

Left out: GPUs. Triton's launches in eager mode cost what several of PyTorch's do, so that needs
measuring first.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qvlm_hf.ops import cpu_direct, cpu_operator, reference
from qvlm_hf.ops.schema import LIBRARY, watched

__all__ = ["fusible", "rms_norm"]


def fusible(x: Tensor) -> bool:
    """Whether the operators may take x now: on a CPU, where no gradient is recorded and no mode but a compiler follows single operators."""
    # `is not True`: torch.fx traces with stand-ins that are neither
    if x.is_cpu is not True or torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or not (watched() or forward_ad._current_level >= 0)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of the last dimension in float32, rounded to x's dtype before and after `weight`, as LlamaRMSNorm does.

    Args:
        x: [..., K].
        weight: [K].
        epsilon: added to the mean square.

    Returns:
        [..., K], the same bits as LlamaRMSNorm.
    """
    if torch.compiler.is_compiling():
        compute = torch.ops.qvlm_hf.rms_norm.default if fusible(x) else reference.rms_norm
        return compute(x, weight, epsilon)
    # `is True`: torch.fx traces with stand-ins that are neither
    if x.is_cpu is True and (found := cpu_direct.rms_norm(x, weight, epsilon)) is not None:
        return found
    return _rms_norm(x, weight, epsilon) if fusible(x) else reference.rms_norm(x, weight, epsilon)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    cpu_operator.load()  # at once: an equal call later must give equal bits
    with torch.no_grad():  # the operator stands below what records gradients
        found = cpu_direct.rms_norm(x, weight, epsilon)
    return reference.rms_norm(x, weight, epsilon) if found is None else found


# Contiguous, as the fake says: PyTorch's operators keep the strides of a permuted input.
LIBRARY.impl("rms_norm", lambda *arguments: _rms_norm(*arguments).contiguous(), "CPU")


@torch.library.register_fake("qvlm_hf::rms_norm", lib=LIBRARY)
def _rms_norm_fake(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    del epsilon
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


def _no_gradient(*_: object, **__: object) -> None:
    raise ValueError(
        "qvlm_hf::rms_norm has no gradient: call qvlm_hf.ops.rms_norm, or use torch.no_grad()."
    )


# Only reached where a gradient is wanted: the call raises, so that no result is silently detached.
torch.library.register_autograd(
    "qvlm_hf::rms_norm", _no_gradient, setup_context=_no_gradient, lib=LIBRARY
)
