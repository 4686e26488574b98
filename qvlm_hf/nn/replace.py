"""Swapping modules: float to quantized and back.

Names come from the family table; this file only moves modules.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from qvlm_hf.nn.linear import QVLMLinear

__all__ = ["dequantize_modules", "quantized_modules", "replace_modules"]


# Of nn.Module: what was registered by anyone to see or change inputs, outputs and gradients.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts each module in its place, in `model` itself; hooks of the old one stay there."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        old = vars(model.get_submodule(name))
        # the very dicts, of which the handles that registering returned remove a hook
        vars(module).update({hooks: old[hooks] for hooks in _HOOKS})
        setattr(model.get_submodule(parent), child, module)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QVLMLinear]]:
    """Name and module of every QVLMLinear, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, QVLMLinear):
            yield name, module


def dequantize_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Turns every QVLMLinear of `model` into an ordinary nn.Linear of `dtype`, one at a time."""
    for name, module in list(quantized_modules(model)):
        replace_modules(model, {name: module.to_linear(dtype)})
