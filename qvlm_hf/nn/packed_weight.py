"""`module.weight` of a quantized module, for readers that may take its integers for a float weight.

Adapters (PEFT) read `module.weight` and compute with it. On packed integers that fails in words
about shapes, or breaks the model in silence. So arithmetic raises one line here; reading stays
free. Kernels, files, offloading and compilers use `module._parameters`, whose weight is ordinary.

Some adapters (LoHa, LoKr) take the float weight's shape and dtype from the same attribute from
which accelerate and Transformers take the integers' while they load or offload. Nothing but the
reader differs: PEFT tells a module nothing when it wraps it, and has no registry for adapters other
than LoRA. So `read_by_adapters` looks at the caller, and PEFT gets a `FloatForm`.
"""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = [
    "FloatForm",
    "PackedWeight",
    "alias_of",
    "check_replacement",
    "freeze",
    "plain",
    "read_by_adapters",
    "refuse_removal",
]

_REFUSAL = "a quantized module's packed weight takes no arithmetic: call model.dequantize() first."
_NO_TRAINING = (
    "a quantized module's packed weight cannot be trained: train an adapter, or quantize without "
    "the module (quantize_projector=False, modules_to_not_convert), or call model.dequantize() "
    "first."
)
_NO_REPLACEMENT = (
    "a quantized module's packed weight cannot be replaced, pruned or parametrized: call "
    "model.dequantize() first."
)
_ARITHMETIC = {"add", "sub", "mul", "div", "truediv", "multiply", "divide", "matmul", "mm", "norm"}
_ATTRIBUTES: Any = Tensor  # as descriptors
_SAME_FORM = {_ATTRIBUTES.data.__get__, _ATTRIBUTES.T.__get__, Tensor.t, Tensor.detach, torch.t}
_SAME_INTEGERS = _SAME_FORM | {
    *(getattr(Tensor, name) for name in ("transpose", "reshape", "view", "clone", "contiguous")),
    *(getattr(torch, name) for name in ("transpose", "reshape", "detach", "clone")),
    *(Tensor.__getitem__, Tensor.new_empty),
}
_TELLS_FORM = {  # methods; so do all attributes
    *(Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.element_size, Tensor.__repr__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.get_device),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}


class PackedWeight(nn.Parameter):
    """An alias of a packed weight: ValueError if it is computed with, replaced or trained."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls `func`, unless it computes."""
        del types
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in (Tensor.requires_grad_, _ATTRIBUTES.requires_grad.__set__):
                _refuse_training(*args[1:], **kwargs)
                return func(*args, **kwargs)
            return cls._call(func, args, kwargs)

    @classmethod
    def _call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if str(func).startswith("qvlm_hf"):  # an operator that knows what the integers mean
            return func(*args, **kwargs)
        if func == _ATTRIBUTES.data.__set__ or _computes(func, tree_leaves((args, kwargs))):
            raise ValueError(_REFUSAL)
        result = func(*args, **kwargs)
        if any(map(_is_floating, tree_leaves(result))):
            raise ValueError(_REFUSAL)
        return alias_of(result) if func in _SAME_INTEGERS else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


class FloatForm(PackedWeight):
    """Shape and dtype of the float weight that a packed one replaces; it has no values."""

    @classmethod
    def of(cls, weight: Tensor, out_features: int, in_features: int) -> "FloatForm":
        """Makes one that takes no memory and shares the device and attributes of `weight`.

        float32 is the adapters' own dtype beside packed weights.
        """
        with torch._C.DisableTorchFunctionSubclass():
            value = weight.new_full((), torch.nan, dtype=torch.float32)
            form = Tensor._make_subclass(cls, value.expand(out_features, in_features), False)
        form.__dict__ = weight.__dict__
        return form

    @classmethod
    def _call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _SAME_FORM:
            return Tensor._make_subclass(cls, func(*args, **kwargs), False)
        if func in _TELLS_FORM or func.__name__ == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        raise ValueError(_REFUSAL)


def alias_of(weight: Tensor) -> PackedWeight:
    """Makes a `PackedWeight` of the memory and attributes of `weight`: integers of any shape."""
    with torch._C.DisableTorchFunctionSubclass():
        alias = Tensor._make_subclass(PackedWeight, weight.detach(), False)
    alias.__dict__ = weight.__dict__
    return alias


def read_by_adapters(depth: int) -> bool:
    """Tells whether PEFT reads an attribute, `depth` calls above the one that asks."""
    name: str = sys._getframe(depth + 1).f_globals.get("__name__", "")
    return name.partition(".")[0] == "peft"


def plain(weight: Any) -> Any:
    """Returns the ordinary parameter behind an alias; anything else as it is.

    Raises:
        ValueError: `weight` is a `FloatForm`, behind which nothing lies.
    """
    if isinstance(weight, FloatForm):
        raise ValueError(_REFUSAL)
    if not isinstance(weight, PackedWeight):
        return weight
    with torch._C.DisableTorchFunctionSubclass():
        ordinary = nn.Parameter(weight.as_subclass(Tensor), requires_grad=False)
    vars(ordinary).update(_state(weight))
    return ordinary


def check_replacement(name: str, old: Tensor | None, new: Any) -> None:
    """Checks what a quantized module registers as its parameter `name`.

    Pruning registers the packed weight under another name. A weight on the meta device is being
    loaded: it may become the float one, which waits to be rounded.

    Raises:
        ValueError: it is one of these, or a float weight in place of packed integers.
    """
    moved = isinstance(new, PackedWeight) and name != "weight"
    packed = name == "weight" and old is not None and not (old.is_meta or _is_floating(old))
    if moved or (packed and _is_floating(new)):
        raise ValueError(_NO_REPLACEMENT)


def refuse_removal() -> NoReturn:
    """Raises the ValueError for a weight that is taken out: parametrizations begin so."""
    raise ValueError(_NO_REPLACEMENT)


def freeze(weight: nn.Parameter) -> None:
    """Lets `weight.requires_grad_()` raise one line: PEFT calls it for `modules_to_save`."""
    frozen = _Frozen(weight)
    # the second, so that a file holds nothing of the first
    vars(weight).update(requires_grad_=frozen, __getstate__=frozen.state)


class _Frozen:
    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weakref.ref(weight)

    def __call__(self, requires_grad: bool = True) -> Tensor | None:
        _refuse_training(requires_grad)
        return self._weight()

    def state(self) -> dict[str, Any]:
        """Attributes of the weight, without those of `freeze`."""
        return _state(self._weight())


def _state(weight: Tensor | None) -> dict[str, Any]:
    hidden = ("requires_grad_", "__getstate__")
    return {name: value for name, value in vars(weight).items() if name not in hidden}


def _refuse_training(requires_grad: bool = True) -> None:
    if requires_grad:
        raise ValueError(_NO_TRAINING)


def _computes(func: Callable[..., Any], arguments: Sequence[Any]) -> bool:
    """Whether it is arithmetic, also in place or reflected, or has a float among its arguments."""
    name = func.__name__.strip("_")
    if {name, name[1:]} & _ARITHMETIC or name.startswith(("linalg", "foreach", "norm", "rand")):
        return True
    in_place = func.__name__ == f"{name}_"  # a plain number may be a tolerance elsewhere
    return any(_is_floating(one) or (in_place and isinstance(one, float)) for one in arguments)


def _is_floating(value: object) -> bool:
    if isinstance(value, torch.dtype):
        return value.is_floating_point
    return isinstance(value, Tensor) and value.is_floating_point()
