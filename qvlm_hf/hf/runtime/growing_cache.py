"""A key-value cache that grows in place; Transformers' `DynamicLayer` copies all of it per token.

    LLaVA-1.5-7B, 640 positions: 0.34 GB copied a token, beside 3.8 GB of W4 weights that it reads;
    4096 positions: 2.1 GB

Keys and values are the beginning of larger tensors, which take the positions that follow. Only a
tensor that is exactly the one handed out last is continued. Whatever else happened to a layer
(cropped, reordered, copied, assigned) left another tensor there. That one is copied once, as
Transformers would, so nothing that somebody else holds is written to.

Left out: gradients, compilers, offloading and devices other than CPUs and CUDA devices go
Transformers' way, and so does every other class of cache or layer. So does a CUDA graph: each
replay would write to the positions of its capture. torch.export takes no cache that has grown, only
new ones: Transformers lists the classes of layers that it flattens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from qvlm_hf.hf.runtime.probing import FLOATS, longest

__all__ = ["NAME", "GrowingLayer", "compare_caches", "difference", "plug_in", "take_back"]

NAME = "key-value cache"
_LEAST = 64  # positions of room at least
_SHARE = 8  # and an eighth of the length: a position is copied about eight times, however long


class Room(NamedTuple):
    """A tensor [B, H, length, D] that was handed out, and the larger one whose beginning it is."""

    handed: Tensor
    whole: Tensor
    length: int


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with room behind its keys and values."""

    _rooms: tuple[Room, Room] | None = None  # of keys and values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [B, H, T, D] to the layer; returns all keys and values, [B, H, S, D]."""
        rooms, self._rooms = self._rooms, None
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.keys is None
            or self.values is None
            or not (_continues(self.keys, key_states) and _continues(self.values, value_states))
        ):
            return super().update(key_states, value_states, *args, **kwargs)
        of_keys, of_values = rooms or (None, None)
        self._rooms = (
            _appended(self.keys, key_states, of_keys),
            _appended(self.values, value_states, of_values),
        )
        self.keys, self.values = (room.handed for room in self._rooms)
        return self.keys, self.values

    def reset(self) -> None:
        """As Transformers' own; the room goes too."""
        self._rooms = None
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold keys and values alone: of two layers, only one may use a room."""
        return {name: value for name, value in vars(self).items() if name != "_rooms"}


def plug_in(model: Any) -> None:
    """Lets every `DynamicCache` that the decoder is called with grow in place.

    The cache is found among the arguments by its class, so its name there does not matter.
    """
    decoder = model.get_decoder()
    if _prepare not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_prepare, with_kwargs=True)


def take_back(model: Any) -> None:
    """Takes the hook away; found by itself, since a copied model has no handle."""
    decoder = model.get_decoder()
    for key in [key for key, hook in decoder._forward_pre_hooks.items() if hook is _prepare]:
        del decoder._forward_pre_hooks[key], decoder._forward_pre_hooks_with_kwargs[key]


def _prepare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for value in (*args, *kwargs.values()):
        if type(value) is DynamicCache and not value.offloading:
            for layer in value.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = GrowingLayer


def difference(model: Any) -> str | None:
    """How Transformers' cache differs from the one that `GrowingLayer` knows, or None."""
    return compare_caches(longest(model.config))


@torch.no_grad()
def compare_caches(positions: int = 256) -> str | None:
    """Gives Transformers' cache and a growing one the same, in several dtypes, up to `positions`.

    They are reordered and shortened in between, and must agree on everything.
    """
    for dtype in FLOATS:
        own, grown = DynamicCache(), DynamicCache()
        for step, tokens in enumerate((1, 2, 1, 0, positions, 1, 0, 1)):
            keys = torch.arange(4 * tokens, device="cpu").view(2, 1, tokens, 2).to(dtype) + step
            _prepare(nn.Identity(), (grown,), {})
            results = [_changed(cache, keys) for cache in (own, grown)]
            if not all(map(torch.equal, *results)):
                return "DynamicCache.update returns something else"
            if (problem := _unlike(own, grown)) is not None:
                return problem
        if type(grown.layers[0]) is not GrowingLayer:
            return "DynamicCache has no layers that can grow"
    return None


def _changed(cache: DynamicCache, keys: Tensor) -> tuple[Tensor, ...]:
    """Appends `keys`, [B, H, T, D]; without positions takes one away and reorders what is left."""
    if keys.shape[-2]:
        return cache.update(keys, -keys, 0)
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([1, 0], device="cpu"))
    return ()


def _unlike(own: DynamicCache, grown: DynamicCache) -> str | None:
    """What a grown cache holds, or says, that Transformers' own does not."""
    layer: Any = own.layers[0]
    ours: Any = grown.layers[0]
    if type(layer) is not DynamicLayer:
        return f"DynamicCache has layers of class {type(layer).__name__}"
    counts = [(one.get_seq_length(), one.get_mask_sizes(1)) for one in (layer, ours)]
    if counts[0] != counts[1]:
        return "DynamicLayer counts its positions in another way"
    held, found = vars(layer), {name: one for name, one in vars(ours).items() if name != "_rooms"}
    tensors = {name for name, value in held.items() if isinstance(value, Tensor)}
    if (
        held.keys() != found.keys()
        or tensors != {"keys", "values"}
        or any(held[name] != found[name] for name in held.keys() - tensors)
        or not all(torch.equal(held[name], found[name]) for name in tensors)
    ):
        return f"DynamicLayer holds {', '.join(sorted(held))}"
    return None


def _continues(old: Tensor, new: Tensor) -> bool:
    """Whether `new` can be written behind `old`, both [B, H, S, D]."""
    return (
        old.device == new.device
        and _grows_on(old.device)
        and old.dim() == new.dim() == 4
        and old.dtype == new.dtype
        and (old.shape[:2], old.shape[3]) == (new.shape[:2], new.shape[3])
    )


def _grows_on(device: torch.device) -> bool:
    """Whether tensors there may grow in place now."""
    if device.type == "cuda":
        return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    return device.type == "cpu"


def _appended(old: Tensor, new: Tensor, room: Room | None) -> Room:
    """`old` and `new` one behind the other, and the tensor that they begin."""
    length, total = old.shape[-2], old.shape[-2] + new.shape[-2]
    whole = None if room is None or not _begins(old, room) else room.whole
    if whole is None or total > whole.shape[-2]:
        positions = total + max(_LEAST, total // _SHARE)
        whole = new.new_empty((*new.shape[:2], positions, new.shape[3]))
        whole[:, :, :length].copy_(old)
        whole[:, :, total:].zero_()  # a saved view takes the whole along
    # .data: a view that autograd keeps shares the count of writes, but none of what is written
    whole.data[:, :, length:total].copy_(new)
    return Room(whole[:, :, :total], whole, total)


def _begins(old: Tensor, room: Room) -> bool:
    """Whether `old` is what was handed out, lies where it was, and may be written behind.

    `.data =` moves a tensor, or makes it shorter.
    """
    whole = room.whole
    return (
        old is room.handed
        and old.shape[-2] == room.length
        and old.data_ptr() == whole.data_ptr()
        and old.stride() == whole.stride()
        and (torch.is_inference_mode_enabled() or not whole.is_inference())
    )
