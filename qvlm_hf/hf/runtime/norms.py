"""RMSNorm as one operator (nn/fused.py), by a change of class.

Families copy the class under names of their own. Only modules of exactly a class of Transformers
change: a subclass may compute something else.
"""

import copy
import inspect
from functools import cache
from typing import Any

import torch
from torch import nn

from qvlm_hf.hf.runtime.probing import FLOATS, one_of_each
from qvlm_hf.models.layer_kinds import OFFSET_NORMS
from qvlm_hf.nn.fused import FusedRMSNorm

__all__ = ["NAME", "difference", "fused_class", "plug_in", "take_back"]

NAME = "RMSNorm"
_UNLIKE = {"Llama4TextRMSNorm"}  # other names of arguments and attributes


@cache
def fused_class(kind: Any) -> Any:
    """The class of norms of class `kind` that compute by `qvlm_hf::rms_norm`."""
    return type(f"Fused{kind.__name__}", (_Fused, kind), {"plain": kind, "__module__": __name__})


class _Fused(FusedRMSNorm):
    """Copies and pickles name the class that the norm had, as this one has no place of its own."""

    plain: type[Any]

    def __reduce__(self) -> Any:
        return _new_fused, (self.plain,), self.__dict__


def _new_fused(kind: Any) -> Any:
    fused = fused_class(kind)
    return fused.__new__(fused)


def plug_in(model: nn.Module) -> None:
    """Gives every RMSNorm the fused class."""
    for module in model.modules():
        kind: Any = type(module)
        if _is_known(kind):
            module.__class__ = fused_class(kind)


def take_back(model: nn.Module) -> None:
    """Gives every norm its own class again."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = module.plain


def _is_known(kind: type[Any]) -> bool:
    """Whether a class must compute what the operator does, by its name and what rows say of it."""
    name = kind.__name__
    ours = kind.__module__.startswith("transformers.models.") and name.endswith("RMSNorm")
    return ours and name not in OFFSET_NORMS | _UNLIKE


def difference(model: nn.Module) -> str | None:
    """How norms of Transformers differ from the fused ones, or None: both must give the same bits.

    They are compared once for every class, size, epsilon, dtype and other setting in `model`.
    """
    known = (m for m in model.modules() if isinstance(m, _Fused) or _is_known(type(m)))
    for norm in one_of_each(known):
        kind = norm.plain if isinstance(norm, _Fused) else type(norm)
        names, ours = (list(inspect.signature(one.forward).parameters) for one in (kind, _Fused))
        if names != ours:
            return f"{kind.__name__}.forward takes {', '.join(names[1:])}"
        held = {*norm._parameters, *norm._buffers}
        if held != {"weight"}:
            return f"{kind.__name__} holds {', '.join(sorted(held))}"
        if not hasattr(norm, "variance_epsilon") or not _same_bits(norm, kind):
            return f"{kind.__name__}.forward computes something else"
    return None


@torch.no_grad()
def _same_bits(norm: Any, own: Any) -> bool:
    """Whether the operator gives the bits of class `own` with the settings of `norm`.

    Inputs are zero and of sizes from 1e-4 to 1e4, with and without a channel 1000 times as large.
    No more than 8 rows: PyTorch computes them without threads, which are slow beside other work.
    """
    generator = torch.Generator().manual_seed(0)
    size, dtype = norm.weight.numel(), norm.weight.dtype
    module = copy.copy(norm)  # not its weight, which may be elsewhere, or nowhere yet
    module._parameters = {"weight": torch.randn(size, generator=generator, device="cpu").to(dtype)}
    x = torch.randn(2, 4, size, generator=generator, device="cpu")
    x *= torch.tensor([[0, 1e-4, 1, 1e4], [1e-4, 1e-2, 1, 1e2]], device="cpu")[..., None]
    x[1, :, size // 3] = x[1].abs().amax(-1) * torch.tensor([1e3, -1e3, 1e3, -1e3], device="cpu")
    for kind in {dtype, *FLOATS}:
        limit = torch.finfo(kind).max
        states = x.clamp(-limit, limit).to(kind)
        for one in (states, states[:1, 2:3], states[1, 3], states.transpose(0, 1)[None]):
            expected, found = own.forward(module, one), _Fused.forward(module, one)
            alike = (expected.dtype, expected.shape) == (found.dtype, found.shape)
            if not alike or not torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True):
                return False
    return True
