"""What a quantized model refuses: a broken result, or one that hides what full precision shows.

- NaN may be turned into a number (by kernels of GPUs), and says nothing of where it came from. So
  NaN and infinity are looked for where they enter, once per call: pixels, picture features,
  `inputs_embeds`, and what the language model gives its head.
  A single token is not looked at unless the head is quantized too: its NaN shows in the logits.
  Compiled and traced calls are not looked at.
- Packed weights cannot be loaded without their configuration, so a part is not saved alone.
- A quantized output head cannot take up tokens.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from qvlm_hf.models.families import has_row
from qvlm_hf.models.find_parts import find_parts
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.ops.library import is_traced

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["add_refusals", "remove_refusals"]

_OF_THE_WHOLE = ("save_pretrained", "push_to_hub", "dequantize")


def add_refusals(model: PreTrainedModel) -> None:
    """Puts the refusals into a model and its copies; leaves one without packed weights alone."""
    from transformers import PreTrainedModel  # not at the top: it takes a second

    if next(quantized_modules(model), None) is None:
        return
    for part in model.modules():
        is_part = isinstance(part, PreTrainedModel) and part is not model
        if is_part and next(quantized_modules(part), None):
            for method in _OF_THE_WHOLE:
                setattr(part, method, partial(_refuse_part, method))
    base, head = model.base_model, model.get_output_embeddings()
    base.register_forward_pre_hook(_check_embeddings, with_kwargs=True)
    base.register_forward_hook(_check_hidden_states, with_kwargs=True)
    if has_row(model):
        parts = find_parts(model)
        parts.vision.register_forward_pre_hook(_check_pixels, with_kwargs=True)
        for projector in parts.projectors:
            projector.register_forward_pre_hook(_check_features, with_kwargs=True)
    if isinstance(head, QVLMLinear):
        head.register_forward_pre_hook(_check_head)
        # holds no model: a cycle would keep it alive
        embeddings: Any = model.get_input_embeddings()
        vars(model)["resize_token_embeddings"] = partial(_keep_vocabulary, embeddings)


def remove_refusals(model: nn.Module) -> None:
    """Takes them out again."""
    for module in model.modules():
        for name in (*_OF_THE_WHOLE, "resize_token_embeddings"):
            found = vars(module).get(name)
            if isinstance(found, partial) and found.func in (_refuse_part, _keep_vocabulary):
                delattr(module, name)
        _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        _remove(module._forward_hooks, module._forward_hooks_with_kwargs)


def _remove(hooks: dict[int, Any], with_kwargs: dict[int, bool]) -> None:
    ours = (_check_embeddings, _check_hidden_states, _check_pixels, _check_features, _check_head)
    for key in [key for key, hook in hooks.items() if hook in ours]:
        del hooks[key]
        with_kwargs.pop(key, None)


def _refuse_part(method: str, *_: object, **__: object) -> NoReturn:
    raise ValueError(f"a part of a quantized model has no {method}(): call it on the whole model.")


def _keep_vocabulary(
    embeddings: nn.Embedding,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *_: object,
    **__: object,
) -> nn.Embedding:
    """`resize_token_embeddings` where nothing is to be resized."""
    now = embeddings.num_embeddings
    count = now if new_num_tokens is None else new_num_tokens
    if count != now or (pad_to_multiple_of is not None and count % pad_to_multiple_of):
        raise ValueError(
            "resize_token_embeddings cannot resize the quantized output head: "
            "call model.dequantize() first, or quantize with lm_head_bits=None."
        )
    return embeddings


def _check_pixels(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _finite(args[0] if args else kwargs.get("pixel_values")):
        raise ValueError("pixel_values hold NaN or infinity: check the picture and its processing.")


def _check_features(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    features: Any = args[0] if args else kwargs.get("image_features")
    if not module.training and not _finite(features):
        reason = f"{_overflow(features)}, or an adapter of the vision encoder holds NaN"
        raise ValueError(f"the picture features hold NaN or infinity: {reason}.")


def _check_embeddings(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del args  # ids, pixels and masks come first
    if not _finite(kwargs.get("inputs_embeds")):
        raise ValueError("inputs_embeds hold NaN or infinity: check what computes them.")


def _check_hidden_states(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    hidden = output[0]
    if not isinstance(hidden, Tensor) or hidden.dim() < 2:  # of a model that is its own base
        return
    if hidden.shape[-2] == 1 or module.training or _finite(hidden):
        return
    mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
    if isinstance(mask, Tensor) and mask.dim() == 2:  # what stands at padding reaches nothing
        hidden = hidden[mask[:, -hidden.shape[1] :].bool().to(hidden.device)]
    elif mask is not None:
        hidden = hidden[:, -1]
    _check_language(hidden)


def _check_head(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not module.training and args and args[0].shape[-2] == 1:
        _check_language(args[0])


def _check_language(hidden: Tensor) -> None:
    if not _finite(hidden):
        reason = f"{_overflow(hidden)}, or an adapter or passed features hold NaN"
        raise ValueError(f"the language model's hidden states hold NaN or infinity: {reason}.")


def _overflow(values: Tensor) -> str:
    narrow = values.dtype == torch.float16
    remedy = " (load the model in bfloat16 or float32)" if narrow else ""
    return f"a value left the range of {values.dtype}{remedy}"


def _finite(values: Any) -> bool:
    """False if a tensor that may be looked at holds NaN or infinity. On a GPU this waits for it."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.is_meta:
        return True
    if is_traced() or (values.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    # a sum takes a fortieth of the time; it is infinite by itself only for huge numbers
    total = values.detach().sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())
