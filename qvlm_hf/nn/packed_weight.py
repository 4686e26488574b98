"""`PackedWeight`: the packed integers of a quantized module for readers that may take them for a float weight.

Adapters (PEFT), initialisers and resizing read `module.weight` and compute with it. On packed integers that fails in words about
shapes, or gives a broken model without any. So such arithmetic raises one line here, and reading stays free.
Kernels, files, offloading and compilers use `module._parameters`, where the weight is an ordinary parameter.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["PackedWeight", "freeze", "guarded", "plain"]

_REFUSAL = "the packed weight of a quantized module takes no arithmetic: call model.dequantize() first (docs/lora.md)."
_NO_TRAINING = (
    "the packed weight of a quantized module cannot be trained: train an adapter, call model.dequantize() first, or keep "
    "the module in full precision when quantizing (quantize_projector=False, modules_to_not_convert)."
)
_ARITHMETIC = {"add", "sub", "mul", "div", "truediv", "multiply", "divide", "matmul", "mm", "norm"}  # and in place, and reflected
# What hands on the same integers: their result is guarded too.
_SAME_INTEGERS = {
    Tensor.data.__get__, Tensor.T.__get__, Tensor.t, Tensor.transpose, Tensor.reshape, Tensor.view, Tensor.contiguous,
    Tensor.detach, Tensor.clone, Tensor.__getitem__, torch.t, torch.transpose, torch.reshape, torch.clone, torch.detach,
}  # fmt: skip


class PackedWeight(nn.Parameter):
    """An alias of a packed weight that raises ValueError where somebody computes floats with it, replaces it or trains it."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - torch's own signature
        """Calls `func`, unless it computes floats."""
        del types
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if str(func).startswith("qvlm_hf"):  # an operator that knows what the integers mean
                return func(*args, **kwargs)
            if func == Tensor.data.__set__ or _computes(func, tree_leaves((args, kwargs))):
                raise ValueError(_REFUSAL)
            if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__):
                _refuse_training(*args[1:], **kwargs)
            result = func(*args, **kwargs)
            if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(result)):
                raise ValueError(_REFUSAL)
            return guarded(result) if func in _SAME_INTEGERS else result

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - as object's
        return plain(self).__reduce_ex__(protocol)


def guarded(weight: Tensor) -> PackedWeight:
    """An alias of `weight` (integers of any shape) that is a `PackedWeight`, with the same attributes."""
    with torch._C.DisableTorchFunctionSubclass():
        alias = Tensor._make_subclass(PackedWeight, weight.detach(), False)
    alias.__dict__ = weight.__dict__
    return alias


def plain(weight: Tensor | None) -> Tensor | None:
    """The ordinary parameter behind an alias; anything else as it is."""
    if not isinstance(weight, PackedWeight):
        return weight
    with torch._C.DisableTorchFunctionSubclass():
        ordinary = nn.Parameter(weight.as_subclass(Tensor), requires_grad=False)
    vars(ordinary).update(_state(weight))
    return ordinary


def freeze(weight: nn.Parameter) -> None:
    """Lets `weight.requires_grad_()` raise one line: PEFT asks for it in a copy of a module in `modules_to_save`."""
    weight.requires_grad_ = _Frozen(weight)  # type: ignore[method-assign]
    weight.__getstate__ = weight.requires_grad_.state  # type: ignore[attr-defined]  # so that a file holds nothing of this


class _Frozen:
    def __init__(self, weight: nn.Parameter) -> None:
        self._weight = weakref.ref(weight)

    def __call__(self, requires_grad: bool = True) -> Tensor | None:
        _refuse_training(requires_grad)
        return self._weight()

    def state(self) -> dict[str, Any]:
        """Of the weight, without what `freeze` put there."""
        return _state(self._weight())


def _state(weight: Tensor | None) -> dict[str, Any]:
    return {name: value for name, value in vars(weight).items() if name not in ("requires_grad_", "__getstate__")}


def _refuse_training(requires_grad: bool = True) -> None:
    if requires_grad:
        raise ValueError(_NO_TRAINING)


def _computes(func: Callable[..., Any], arguments: Sequence[Any]) -> bool:
    """Whether it is arithmetic, or a float tensor, a float dtype or (in place) a float number takes part."""
    name = func.__name__.strip("_")
    if {name, name[1:]} & _ARITHMETIC or name.startswith("linalg"):
        return True
    return any(
        argument.is_floating_point
        if isinstance(argument, torch.dtype)
        else argument.is_floating_point()
        if isinstance(argument, Tensor)
        else func.__name__ == f"{name}_" and isinstance(argument, float)
        for argument in arguments
    )
