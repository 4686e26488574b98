"""Key-value caches that grow in place: Transformers' `DynamicCache` copies all keys and values of a layer for every new token.

    LLaVA-1.5-7B at 640 positions: 0.34 GB copied for a token, beside 3.8 GB of W4 weights that it reads; at 4096 positions 2.1 GB

Keys and values become the beginning of larger tensors, which take what comes next. Only a tensor that is exactly what was handed out last
is continued: whatever else happened to a layer (cropped, reordered, repeated, copied, assigned) left another tensor in it, which is copied
once, as Transformers would, and nothing that somebody holds is written to. The classes of cache and layers stay Transformers' own.

Left out: gradients, compilers, offloading, devices other than a CPU and other classes of caches keep Transformers' way.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import DynamicCache, DynamicLayer

__all__ = ["updated"]

_LEAST = 64  # positions of room at least
_SHARE = 8  # and an eighth of what is there: however long a text gets, a position is copied about eight times

# Keys or values as handed out last -> the tensor [B, H, positions, D] that they begin, and their own positions. It goes when they do.
_WHOLE = WeakTensorKeyDictionary()


def updated(cache: Any, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - any Transformers cache
    """What `cache.update(key, value, layer)` gives, with room for more.

    Args:
        cache: of the model; changed.
        key: [B, H, T, D], the new positions.
        value: likewise.
        layer: its index.

    Returns:
        Keys and values [B, H, S, D], which the layer holds too; a position's values lie side by side, its neighbours may not.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(cache) is not DynamicCache or cache.offloading:
        return cache.update(key, value, layer)
    place: Any = cache.layers[layer] if layer < len(cache.layers) else None
    if type(place) is not DynamicLayer or not (_continues(place.keys, key) and _continues(place.values, value)):
        return cache.update(key, value, layer)
    place.keys, place.values = _appended(place.keys, key), _appended(place.values, value)  # type: ignore[arg-type]  # Optional
    return place.keys, place.values


def _continues(old: Tensor | None, new: Tensor) -> bool:
    """Whether `new` can be written behind `old`, both [B, H, S, D]."""
    return (
        old is not None
        and old.is_cpu
        and new.is_cpu
        and old.dim() == new.dim() == 4
        and old.dtype == new.dtype
        and (old.shape[:2], old.shape[3]) == (new.shape[:2], new.shape[3])
    )


def _appended(old: Tensor, new: Tensor) -> Tensor:
    length, total = old.shape[-2], old.shape[-2] + new.shape[-2]
    whole, positions = _WHOLE.pop(old, (None, 0))  # taken out before it is written to: of two who hold `old`, one continues it
    if whole is None or positions != length or total > whole.shape[-2] or not _begins(old, whole):
        positions = total + max(_LEAST, total // _SHARE)
        whole = new.new_empty((*new.shape[:2], positions, new.shape[3]))
        whole[:, :, :length].copy_(old)
        whole[:, :, total:].zero_()  # a saved view takes the whole along
    # .data: a view that autograd keeps shares the count of writes, but none of what is written
    whole.data[:, :, length:total].copy_(new)
    grown = whole[:, :, :total]
    _WHOLE[grown] = whole, total
    return grown


def _begins(old: Tensor, whole: Tensor) -> bool:
    """Whether `old` still lies at the beginning of `whole` (`.data =` moves it), and may be written behind here."""
    there = old.data_ptr() == whole.data_ptr() and old.stride() == whole.stride()
    return there and (torch.is_inference_mode_enabled() or not whole.is_inference())
