"""`qvlm_hf::rms_norm` and `rotary`: what stands before most quantized modules, as one operator instead of PyTorch's six to fourteen.

A decoding step on a CPU spends as long on each small operator as on a small matrix. For inference alone; a graph of torch.compile gets the
same operators, so that it rounds where eager PyTorch does. Where no kernel takes a call, they are PyTorch's operators.

Left out: GPUs. Triton's launches in eager mode cost what several of PyTorch's do, so that needs measuring first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qvlm_hf.ops import cpu_direct, cpu_operator, reference
from qvlm_hf.ops.schema import LIBRARY, watched

__all__ = ["fusible", "rms_norm", "rotary"]


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


def rotary(x: Sequence[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Rotary position embedding: the same bits as Transformers' `apply_rotary_pos_emb` with unsqueeze_dim=2.

    Args:
        x: queries and keys, each [B, T, heads, D], D even.
        cos: [B or 1, T, D].
        sin: [B or 1, T, D].

    Returns:
        Each [B, T, heads, D].
    """
    x = list(x)
    if torch.compiler.is_compiling():
        return (torch.ops.qvlm_hf.rotary.default if fusible(cos) else reference.rotary)(x, cos, sin)
    if cos.is_cpu is True and (found := cpu_direct.rotary(x, cos, sin)) is not None:
        return found
    return _rotary(x, cos, sin) if fusible(cos) else reference.rotary(x, cos, sin)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    cpu_operator.load()  # at once: an equal call later must give equal bits
    with torch.no_grad():  # the operator stands below what records gradients
        found = cpu_direct.rms_norm(x, weight, epsilon)
    return reference.rms_norm(x, weight, epsilon) if found is None else found


def _rotary(x: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    cpu_operator.load()
    with torch.no_grad():
        found = cpu_direct.rotary(x, cos, sin)
    return reference.rotary(x, cos, sin) if found is None else found


# Contiguous, as their fakes say: PyTorch's operators keep the strides of a permuted input.
LIBRARY.impl("rms_norm", lambda *arguments: _rms_norm(*arguments).contiguous(), "CPU")
LIBRARY.impl("rotary", lambda *arguments: [one.contiguous() for one in _rotary(*arguments)], "CPU")


@torch.library.register_fake("qvlm_hf::rms_norm", lib=LIBRARY)
def _rms_norm_fake(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    del epsilon
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


@torch.library.register_fake("qvlm_hf::rotary", lib=LIBRARY)
def _rotary_fake(x: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(cos.dtype, sin.dtype)
    return [one.new_empty(one.shape, dtype=torch.promote_types(one.dtype, dtype)) for one in x]


def _no_gradient(*_: object, **__: object) -> None:
    raise ValueError("qvlm_hf::rms_norm and rotary have no gradient: call qvlm_hf.ops.rms_norm or rotary, or use torch.no_grad().")


# Only reached where a gradient is wanted of the operators themselves: the call raises, so that no result is silently detached.
for _name in ("rms_norm", "rotary"):
    torch.library.register_autograd(f"qvlm_hf::{_name}", _no_gradient, setup_context=_no_gradient, lib=LIBRARY)
