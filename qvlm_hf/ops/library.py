"""The library `qvlm_hf` of PyTorch operators, and who may be watching when they are called."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["can_fuse", "define", "define_gradient", "is_traced", "is_transformed"]

# torch.library.define + impl costs about 3 us a call, custom_op about 14: 200 linears per token
# feel it.
_LIBRARY = torch.library.Library("qvlm_hf", "DEF")


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    kernels: Mapping[str, Callable[..., Any]],
    instead: str | None = None,
) -> None:
    """Registers an operator.

    Args:
        name: without "qvlm_hf::".
        schema: arguments and results, as PyTorch writes them.
        fake: gives results of the right shape without computing.
        kernels: by dispatch key.
        instead: what to do where a gradient is wanted, for an operator that has none.
    """
    _LIBRARY.define(name + schema)
    torch.library.register_fake(f"qvlm_hf::{name}", fake, lib=_LIBRARY)
    for key, kernel in kernels.items():
        _LIBRARY.impl(name, kernel, key)
    if instead is not None:

        def refuse(*_: object, **__: object) -> None:
            raise ValueError(f"qvlm_hf::{name} has no gradient: {instead}.")

        # Only reached where a gradient is wanted: the call raises, no result is silently detached.
        define_gradient(name, refuse, refuse)


def define_gradient(name: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """Registers how an operator is differentiated."""
    torch.library.register_autograd(f"qvlm_hf::{name}", backward, setup_context=setup, lib=_LIBRARY)


def is_transformed() -> bool:
    """Whether torch.jit.trace or torch.func (vmap, grad) is at work: they follow each operator."""
    return torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


def is_traced() -> bool:
    """The same, or torch.compile, or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
    )


def can_fuse(x: Tensor) -> bool:
    """Whether a fused CPU operator may take x: no gradient is recorded, only a compiler watches."""
    # `is not True`: torch.fx traces with stand-ins that are neither
    if x.is_cpu is not True or torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or not (is_traced() or forward_ad._current_level >= 0)
