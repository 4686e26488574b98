"""What a quantized model refuses to do, because the result would be broken or hide what full precision shows.

- Integer kernels turn NaN into a number. NaN and infinity are looked for once per call where they enter: pixels, picture
  features, `inputs_embeds`, and what the language model hands to its head. A single token costs no look, unless the head
  is quantized too: its NaN shows in the logits. Compiled and traced calls are not looked at.
- Packed weights that are saved without their configuration cannot be loaded, so a part of the model is not saved alone.
- A quantized output head cannot take up tokens.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.ops.schema import watched

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["guard", "unguard"]

_WHOLE = ("save_pretrained", "dequantize")


def guard(model: PreTrainedModel) -> None:
    """Puts the refusals into a quantized model; leaves one without quantized modules alone. They travel with copies."""
    from transformers import PreTrainedModel  # not at the top: it imports Transformers' modeling code

    if next(quantized_modules(model), None) is None:
        return
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model and next(quantized_modules(part), None):
            for method in _WHOLE:
                setattr(part, method, partial(_refuse_part, method))
    base, head = model.base_model, model.get_output_embeddings()
    base.register_forward_pre_hook(_check_embeddings, with_kwargs=True)
    base.register_forward_hook(_check_hidden_states, with_kwargs=True)
    for name, hook in (("vision_tower", _check_pixels), ("multi_modal_projector", _check_features)):
        if isinstance(module := getattr(base, name, None), nn.Module):
            module.register_forward_pre_hook(hook, with_kwargs=True)
    if isinstance(head, QVLMLinear):
        head.register_forward_pre_hook(_check_head)
        # holds no model: a cycle would keep it alive
        model.resize_token_embeddings = partial(_keep_vocabulary, model.get_input_embeddings())  # type: ignore[method-assign]


def unguard(model: nn.Module) -> None:
    """Takes them out again."""
    ours = {_check_embeddings, _check_hidden_states, _check_pixels, _check_features, _check_head}
    for module in model.modules():
        for name in (*_WHOLE, "resize_token_embeddings"):
            if isinstance(found := vars(module).get(name), partial) and found.func in (_refuse_part, _keep_vocabulary):
                delattr(module, name)
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]
                with_kwargs.pop(key, None)


def _refuse_part(method: str, *_: object, **__: object) -> NoReturn:
    raise ValueError(
        f"a part of a quantized model cannot {method}() alone: call save_pretrained() or dequantize() of the whole model."
    )


def _keep_vocabulary(
    embeddings: nn.Embedding, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: object, **__: object
) -> nn.Embedding:
    count = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
    if count != embeddings.num_embeddings or (pad_to_multiple_of is not None and count % pad_to_multiple_of):
        raise ValueError(
            "resize_token_embeddings cannot resize the quantized output head: call model.dequantize() first, "
            "or quantize with lm_head_bits=None."
        )
    return embeddings


def _check_pixels(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _finite(args[0] if args else kwargs.get("pixel_values")):
        raise ValueError("pixel_values hold NaN or infinity: check the picture and its preprocessing.")


def _check_features(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    features = args[0] if args else kwargs.get("image_features")
    if not module.training and not _finite(features):
        raise ValueError(
            f"the picture features hold NaN or infinity: {_range(features)}, or an adapter of the vision encoder holds NaN."
        )


def _check_embeddings(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del args  # ids, pixels and masks come first
    if not _finite(kwargs.get("inputs_embeds")):
        raise ValueError("inputs_embeds hold NaN or infinity: check what computes them.")


def _check_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
    hidden = output[0]
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
        raise ValueError(
            f"the language model's hidden states hold NaN or infinity: {_range(hidden)}, or an adapter or passed features hold NaN."
        )


def _range(values: Tensor) -> str:
    remedy = " (load the model with dtype=torch.bfloat16 or torch.float32)" if values.dtype == torch.float16 else ""
    return f"a value left the range of {values.dtype}{remedy}"


def _finite(values: Any) -> bool:  # noqa: ANN401 - whatever a caller passes
    """False if `values` is a tensor that holds NaN or infinity and may be looked at. On a GPU this waits for it."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.is_meta or watched():
        return True
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    # a sum takes a fortieth of the time; only of huge numbers it is infinite by itself
    return bool(torch.isfinite(values.detach().sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())
