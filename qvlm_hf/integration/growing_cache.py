"""Key-value caches that grow in place: Transformers' `DynamicLayer` copies all keys and values of a layer for every new token.

    LLaVA-1.5-7B at 640 positions: 0.34 GB copied for a token, beside 3.8 GB of W4 weights that it reads; at 4096 positions 2.1 GB

A layer takes room for further positions and hands out views of what is filled. Whatever else happens to it (cropped, reordered, repeated,
copied, assigned) leaves other tensors in it than those last handed out; then it takes room anew, and nothing that somebody holds is
written to.

Left out: gradients, compilers and devices other than a CPU keep Transformers' way; static caches and sliding windows need none of this.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

__all__ = ["GrowingLayer", "grow_in_place"]

_LEAST = 64  # positions of room at least
_SHARE = 8  # and an eighth of what is there: however long a text gets, a position is copied about eight times


@dataclass
class _Room:
    """`held`, what was handed out last, is the beginning of `whole` [B, H, positions, D].

    Shallow copies of a layer share it: the first to write moves `held` on, and the others find that they do not hold it.
    """

    whole: Tensor
    held: Tensor

    def takes(self, old: Tensor, total: int) -> bool:
        """Whether positions up to `total` can be written behind `old`; what `torch.inference_mode` made takes no writes elsewhere."""
        inside = self.held is old and total <= self.whole.shape[-2]
        return inside and (torch.is_inference_mode_enabled() or not self.whole.is_inference())


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values [B, H, S, D] are views of larger tensors."""

    _layer_type = None  # the parent's would enter this class into Transformers' tables
    _rooms: tuple[_Room, _Room] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Appends [B, H, T, D] to keys and to values and returns all of them; arguments as of DynamicLayer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old: Any = (self.keys, self.values)
        if not all(map(_appendable, old, (key_states, value_states))):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._rooms or (None, None)
        self._rooms = keys, values = _appended(keys, old[0], key_states), _appended(values, old[1], value_states)
        self.keys, self.values = keys.held, values.held
        return keys.held, values.held


def grow_in_place(cache: Any, layer: int) -> None:  # noqa: ANN401 - any Transformers cache
    """Lets a layer of a cache grow in place if it is exactly a `DynamicLayer`; others know better.

    Args:
        cache: of the model.
        layer: its index; a layer that is not there yet is left to the next call.
    """
    layers = getattr(cache, "layers", ())
    if layer < len(layers) and type(layers[layer]) is DynamicLayer:
        layers[layer].__class__ = GrowingLayer


def _appendable(old: Tensor, new: Tensor) -> bool:
    """Whether `new` is written behind `old` [B, H, S, D], or `old` is empty, where `torch.cat` would give the same."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not (old.is_cpu and new.is_cpu)
        or new.dim() != 4
        or old.dtype != new.dtype
    ):
        return False
    return not old.numel() or (old.shape[:2], old.shape[3]) == (new.shape[:2], new.shape[3])


def _appended(room: _Room | None, old: Tensor, new: Tensor) -> _Room:
    length = old.shape[-2] if old.numel() else 0
    total = length + new.shape[-2]
    if room is None or not room.takes(old, total):
        room = _Room(new.new_empty((*new.shape[:2], total + max(_LEAST, total // _SHARE), new.shape[3])), old)
        if length:
            room.whole[:, :, :length].copy_(old)
    room.whole[:, :, length:total].copy_(new)
    room.held = room.whole[:, :, :total]
    return room
