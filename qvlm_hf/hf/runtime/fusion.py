"""What a quantized model computes faster in inference; saved files do not change.

Forward passes of attention, MLP and decoder layers stay Transformers' own. These parts plug in:

    siblings     linear modules that read one input share an operator   nn/siblings.py
    norms        RMSNorm as one operator, by a change of class          nn/fused.py
    cache        grows in place, by a change of its layers' class       growing_cache.py
    attention    of one token, as an attention function                 attention.py

Each part first checks that Transformers still computes what it knows. One that does not is left to
Transformers: `precision_table` and a warning say so. A forward pass that somebody else put on a
module (accelerate's offloading, `kernelize`) goes first, as on any module.
"""

import inspect
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qvlm_hf.hf.runtime.attention import ATTENTION
from qvlm_hf.hf.runtime.growing_cache import grow_caches, leave_caches, unknown_cache
from qvlm_hf.models.graph import shared_inputs
from qvlm_hf.nn.fused import FusedRMSNorm, SteppedAside
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.nn.siblings import share_inputs
from qvlm_hf.ops.attention import composed

__all__ = ["FusedLlamaRMSNorm", "fuse", "leave_to_transformers", "unfuse"]

_CACHE_NAMES = ("cache", "past_key_values")  # from Transformers 5.24 on, and before
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class FusedLlamaRMSNorm(FusedRMSNorm, LlamaRMSNorm):
    """LlamaRMSNorm by `qvlm_hf::rms_norm`."""


_NORMS: dict[type[nn.Module], type[nn.Module]] = {LlamaRMSNorm: FusedLlamaRMSNorm}


def fuse(model: Any) -> None:
    """Prepares a quantized model; leaves one without quantized modules alone.

    Norms of exactly the known classes are changed: a subclass may compute something else.

    Args:
        model: on its devices.
    """
    if next(quantized_modules(model), None) is None:
        return
    share_inputs(model, shared_inputs(model))
    norms = {own: _unknown_norm(own, fused) for own, fused in _NORMS.items()}
    _change_classes(model, {own: _NORMS[own] for own, reason in norms.items() if reason is None})
    decoder = model.get_decoder()
    attention = _unknown_attention(decoder)
    cache = attention or unknown_cache()
    if cache is None:
        grow_caches(decoder)
    if attention is not None:
        _change_attention(model)
    reasons = {own.__name__: reason for own, reason in norms.items()}
    reasons |= {"key-value cache": cache, "attention of one token": attention}
    _step_aside(model, {part: reason for part, reason in reasons.items() if reason})


def unfuse(model: Any) -> None:
    """Gives norms their own class again, and leaves caches alone."""
    _change_classes(model, {fused: own for own, fused in _NORMS.items()})
    leave_caches(model.get_decoder())
    model.stepped_aside = ()


def leave_to_transformers(model: Any, reason: str) -> None:
    """Lets Transformers compute everything but the quantized linear modules, and says why."""
    unfuse(model)
    _change_attention(model)
    _step_aside(model, dict.fromkeys(("norms", "key-value cache", "attention of one token"), reason))


def _step_aside(model: Any, reasons: dict[str, str]) -> None:
    """Writes down, and warns once, what Transformers computes that this package would."""
    model.stepped_aside = tuple(SteppedAside(part, reason) for part, reason in reasons.items())
    if reasons:
        warnings.warn(
            f"Transformers {transformers.__version__} is not as this version of qvlm_hf knows it: "
            f"{'; '.join(map(str, model.stepped_aside))}. Transformers alone computes these parts, "
            "which is slower. A newer qvlm_hf may know them.",
            stacklevel=3,
        )


def _change_attention(model: Any) -> None:
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation == ATTENTION:
        text._attn_implementation = "sdpa"


def _unknown_norm(own: type[nn.Module], fused: type[nn.Module]) -> str | None:
    """How a norm class differs from what `fused` computes, or None: both must give the same bits."""
    known: Any = fused
    names = [list(inspect.signature(one.forward).parameters) for one in (own, fused)]
    if names[0] != names[1]:
        return f"forward takes {', '.join(names[0][1:])}"
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), torch.device("cpu"):
            module: Any = own(8, eps=1e-3)
            x = torch.randn(3, 8, generator=generator)
            module.weight.normal_(generator=generator)
            for dtype in _FLOATS:
                expected = module.to(dtype)(x.to(dtype))
                if not torch.equal(expected, known.forward(module, x.to(dtype))):
                    return "forward computes something else"
    except Exception as error:  # another Transformers: whatever it raises is the reason
        return f"{type(error).__name__}: {error}"
    return None


def _unknown_attention(decoder: nn.Module) -> str | None:
    """How attention differs from what is known, or None.

    The decoder's must take a cache under a known name, and Transformers' `sdpa` must give what
    `decode_attention` gives for one token, with grouped queries, with a mask and without.
    """
    for kind in {type(module) for module in decoder.modules() if hasattr(module, "layer_idx")}:
        names = list(inspect.signature(kind.forward).parameters)
        if not any(name in names for name in _CACHE_NAMES):
            return f"{kind.__name__}.forward takes {', '.join(names[1:])}"
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), torch.device("cpu"):
            query, key, value = (
                torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float32) for heads, tokens in ((4, 1), (2, 5), (2, 5))
            )
            module: Any = nn.Module()
            module.num_key_value_groups, module.is_causal = 2, True
            hidden = torch.arange(5).expand(2, 1, 1, 5) > 1
            for mask in (None, hidden):
                states = (query, key, value, mask)
                found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, scaling=0.3)
                if not torch.allclose(found, composed(*states, 0.3), rtol=1e-4, atol=1e-5):
                    return "sdpa computes something else"
    except Exception as error:  # another Transformers: whatever it raises is the reason
        return f"{type(error).__name__}: {error}"
    return None


def _change_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
