"""Swapping modules: float to quantized and back.

Names come from the family table; this file only moves modules.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from qvlm_hf.nn.linear import QVLMLinear

__all__ = ["dequantize_modules", "quantized_modules", "replace_modules"]


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts each module in its place, in `model` itself."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
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
