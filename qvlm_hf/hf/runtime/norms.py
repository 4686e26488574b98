"""RMSNorm as one operator (nn/fused.py), by a change of class.

Only modules of exactly the known class change: a subclass may compute something else.
"""

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qvlm_hf.hf.runtime.probing import FLOATS, one_of_each
from qvlm_hf.nn.fused import FusedRMSNorm

__all__ = ["NAME", "FusedLlamaRMSNorm", "difference", "plug_in", "take_back"]

NAME = "LlamaRMSNorm"


class FusedLlamaRMSNorm(FusedRMSNorm, LlamaRMSNorm):
    """LlamaRMSNorm by `qvlm_hf::rms_norm`."""


def plug_in(model: nn.Module) -> None:
    """Gives every LlamaRMSNorm the fused class."""
    _change_class(model, LlamaRMSNorm, FusedLlamaRMSNorm)


def take_back(model: nn.Module) -> None:
    """Gives every norm its own class again."""
    _change_class(model, FusedLlamaRMSNorm, LlamaRMSNorm)


def _change_class(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new


def difference(model: nn.Module) -> str | None:
    """How Transformers' norm differs from the fused one, or None: both must give the same bits.

    They are compared once for every size, epsilon, dtype and other setting that `model` has of it.
    """
    kinds = (LlamaRMSNorm, FusedLlamaRMSNorm)
    names, known = (list(inspect.signature(kind.forward).parameters) for kind in kinds)
    if names != known:
        return f"forward takes {', '.join(names[1:])}"
    for norm in one_of_each(module for module in model.modules() if type(module) in kinds):
        held = {*norm._parameters, *norm._buffers}
        if held != {"weight"}:
            return f"holds {', '.join(sorted(held))}"
        if not _same_bits(norm):
            return "forward computes something else"
    return None


@torch.no_grad()
def _same_bits(norm: Any) -> bool:
    """Whether both classes give the same bits with the settings of `norm`.

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
            expected = LlamaRMSNorm.forward(module, one)
            found = FusedLlamaRMSNorm.forward(module, one)
            alike = (expected.dtype, expected.shape) == (found.dtype, found.shape)
            if not alike or not torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True):
                return False
    return True
