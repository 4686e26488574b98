"""What the probes of several parts share: which modules to try, and how far."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["FLOATS", "longest", "one_of_each"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST = 8192  # positions that are tried, however many a model has


def longest(config: Any) -> int:
    """Positions to try: those of the language model, up to a limit."""
    text = config.get_text_config(decoder=True)
    return min(getattr(text, "max_position_embeddings", None) or _LONGEST, _LONGEST)


def one_of_each(modules: Iterable[nn.Module]) -> Collection[Any]:
    """One module of each class and setting."""
    return {_settings(module): module for module in modules}.values()


def _settings(module: nn.Module) -> tuple[object, ...]:
    """What a module computes by, besides the values of its tensors; hashable."""
    plain = (bool, int, float, str, type(None))
    values = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name not in ("training", "layer_idx")
    }
    tensors = (module._parameters | module._buffers).items()
    forms = {(name, one if one is None else (one.shape, one.dtype)) for name, one in tensors}
    return type(module), frozenset(values.items()), frozenset(forms)
