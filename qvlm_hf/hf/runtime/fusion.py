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

import copy
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
from qvlm_hf.ops.attention import attend_with_pytorch

__all__ = ["FusedLlamaRMSNorm", "fuse", "leave_to_transformers", "unfuse"]

_CACHE_NAMES = ("cache", "past_key_values")  # from Transformers 5.24 on, and before
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST = 8192  # positions that are tried, however many a model has


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
    share_inputs(shared_inputs(model))
    norms = {own: _unknown_norm(model, own, fused) for own, fused in _NORMS.items()}
    _change_classes(model, {own: _NORMS[own] for own, reason in norms.items() if reason is None})
    decoder = model.get_decoder()
    attention = _unknown_attention(decoder)
    cache = attention or unknown_cache(_longest(model.config.get_text_config(decoder=True)))
    if cache is None:
        grow_caches(decoder)
    if attention is not None:
        _change_attention(model)
    reasons = {own.__name__: reason for own, reason in norms.items()}
    reasons |= {"key-value cache": cache, "attention of one token": attention}
    _step_aside(model, {part: reason for part, reason in reasons.items() if reason})


def unfuse(model: Any) -> None:
    """Gives norms their own class and attention to `sdpa` again, and leaves caches alone."""
    _change_classes(model, {fused: own for own, fused in _NORMS.items()})
    leave_caches(model.get_decoder())
    _change_attention(model)
    model.stepped_aside = ()


def leave_to_transformers(model: Any, reason: str) -> None:
    """Lets Transformers compute everything but the quantized linear modules, and says why."""
    unfuse(model)
    parts = ("norms", "key-value cache", "attention of one token")
    _step_aside(model, dict.fromkeys(parts, reason))


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


def _unknown_norm(model: nn.Module, own: type[nn.Module], fused: type[nn.Module]) -> str | None:
    """How a norm class differs from what `fused` computes, or None: both must give the same bits.

    They are compared once for every size, epsilon, dtype and other setting that `model` has of it.
    """
    names = [list(inspect.signature(one.forward).parameters) for one in (own, fused)]
    if names[0] != names[1]:
        return f"forward takes {', '.join(names[0][1:])}"
    try:
        norms = [module for module in model.modules() if type(module) in (own, fused)]
        for norm in {_settings(module): module for module in norms}.values():
            held = {*norm._parameters, *norm._buffers}
            if held != {"weight"}:
                return f"holds {', '.join(sorted(held))}"
            if not _same_norm(norm, own, fused):
                return "forward computes something else"
    except Exception as error:  # another Transformers: whatever it raises is the reason
        return f"{type(error).__name__}: {error}"
    return None


@torch.no_grad()
def _same_norm(norm: Any, own: Any, fused: Any) -> bool:
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
    for kind in {dtype, *_FLOATS}:
        limit = torch.finfo(kind).max
        states = x.clamp(-limit, limit).to(kind)
        for one in (states, states[:1, 2:3], states[1, 3], states.transpose(0, 1)[None]):
            expected, found = own.forward(module, one), fused.forward(module, one)
            alike = (expected.dtype, expected.shape) == (found.dtype, found.shape)
            if not alike or not torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True):
                return False
    return True


def _longest(config: Any) -> int:
    return min(getattr(config, "max_position_embeddings", None) or _LONGEST, _LONGEST)


def _settings(module: nn.Module) -> tuple[object, ...]:
    """What a module computes by, besides the values of its tensors; hashable."""
    plain = (bool, int, float, str, type(None))
    values = {name: value for name, value in vars(module).items() if isinstance(value, plain)}
    for name in ("training", "layer_idx"):
        values.pop(name, None)
    tensors = (module._parameters | module._buffers).items()
    forms = {(name, one if one is None else (one.shape, one.dtype)) for name, one in tensors}
    return type(module), frozenset(values.items()), frozenset(forms)


def _unknown_attention(decoder: nn.Module) -> str | None:
    """How attention differs from what is known, or None.

    The decoder's must take a cache under a known name, and Transformers' `sdpa` must give what
    `decode_attention` gives for one token of each kind of attention module.
    """
    attentions = [module for module in decoder.modules() if hasattr(module, "layer_idx")]
    for kind in {type(module) for module in attentions}:
        names = list(inspect.signature(kind.forward).parameters)
        if not any(name in names for name in _CACHE_NAMES):
            return f"{kind.__name__}.forward takes {', '.join(names[1:])}"
    attentions = [module for module in attentions if hasattr(module, "num_key_value_groups")]
    if not attentions:
        return "no module has layer_idx and num_key_value_groups"
    try:
        for module in {_settings(module): module for module in attentions}.values():
            if not _same_attention(module):
                return "sdpa computes something else"
    except Exception as error:  # another Transformers: whatever it raises is the reason
        return f"{type(error).__name__}: {error}"
    return None


@torch.no_grad()
def _same_attention(module: Any) -> bool:
    """Whether `sdpa` gives what `decode_attention` does for a token of `module`.

    With few keys and with as many as the model has positions (these with short heads: quick),
    without a mask and with both kinds of one, with small scores and with large ones.
    """
    generator = torch.Generator().manual_seed(0)
    text = module.config.get_text_config(decoder=True)
    dtype = text.dtype if text.dtype in _FLOATS else torch.float32
    sizes = ((module.head_dim, 5, torch.float32), (module.head_dim, 5, dtype))
    for size, length, kind in (*sizes, (8, _longest(text), torch.float32)):
        heads = 2 * module.num_key_value_groups
        query = torch.randn(2, heads, 1, size, generator=generator, device="cpu")
        if kind == torch.float32:
            query[1] *= 30  # scores that a cap would change
        # cheaper than random numbers, and no two positions alike
        states = torch.arange(4 * length * size, device="cpu").mul(0.7).sin()
        states = states.view(2, 1, 2, length, size).expand(-1, 2, -1, -1, -1)
        query, key, value = (one.to(kind) for one in (query, *states))
        shown = torch.arange(length, device="cpu").expand(2, 1, 1, length) > 1
        added = torch.randn(2, 1, 1, length, generator=generator, device="cpu").to(kind)
        tolerance = 1e-4 if kind == torch.float32 else 3e-2
        for mask in (None, shown, added):
            arguments, scale = (query, key, value, mask), module.scaling
            found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *arguments, scaling=scale)
            expected = attend_with_pytorch(*arguments, scale)
            if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance / 10):
                return False
    return True


def _change_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
