"""What a quantized model computes together in inference: modules that read one input, and the operators of a norm. Files hold nothing of it.

Of a norm only the class changes: parameters, names, hooks and `isinstance` stay. A forward pass that somebody else put on the module
(accelerate's offloading, `kernelize`) goes first, as on any module.
"""

from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qvlm_hf.core.architectures import shared_inputs
from qvlm_hf.nn.norm import FusedRMSNorm
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.nn.shared_input import share_inputs

__all__ = ["FusedLlamaRMSNorm", "fuse", "unfuse_norms"]


class FusedLlamaRMSNorm(FusedRMSNorm, LlamaRMSNorm):
    """LlamaRMSNorm, computed by `qvlm_hf::rms_norm`."""


_FUSED: dict[type[nn.Module], type[nn.Module]] = {LlamaRMSNorm: FusedLlamaRMSNorm}


def fuse(model: nn.Module) -> None:
    """Prepares a quantized model; leaves one without quantized modules alone.

    Args:
        model: on its devices. Norms of exactly the known classes are fused: a subclass may compute something else.
    """
    if next(quantized_modules(model), None) is not None:
        share_inputs(model, shared_inputs(model))
        _change_classes(model, _FUSED)


def unfuse_norms(model: nn.Module) -> None:
    """Gives the norms their own class again."""
    _change_classes(model, {fused: own for own, fused in _FUSED.items()})


def _change_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
