"""Modules that read one input tensor (q/k/v, gate/up), computed by one operator although each is called by itself.

The module that is called first computes all of them; the others hand out their result when they are called with the very same tensor. No
module, parameter or saved name changes, and adapters work as they always do; with a hook on one of them each computes by itself. Where
the modules do not follow one another (an adapter feeds one of them another tensor, only one is used) results wait in vain; after a
few such calls the group dissolves.

Left out: gradients. With a graph to build, every module computes by itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.ops.schema import linears

__all__ = ["SharedInput", "share_inputs"]

_PATIENCE = 3  # calls in a row whose results nobody asked for, after which the modules compute by themselves


class SharedInput:
    """The modules of one site. `module.shared` of each is this and the module's place in `modules`.

    Attributes:
        modules: of one scheme, with equal activation grids.
    """

    def __init__(self, modules: Sequence[QVLMLinear]) -> None:
        self.modules = tuple(modules)
        self._waiting: tuple[Tensor, int, dict[int, Tensor]] | None = None  # input, its version, results by place
        self._in_vain = 0
        self._agreed = tuple(_statics(module) for module in self.modules)
        for place, module in enumerate(self.modules):
            module.shared = (self, place)

    def output(self, place: int, x: Tensor) -> Tensor | None:
        """What module `place` returns for x, or None if it has to compute by itself."""
        if self._records_gradient(x) or not self._ready(place, x):
            return None
        version, waiting = _version(x), self._waiting  # one read: another thread may replace it
        if waiting is not None and waiting[0] is x and waiting[1] == version and place in waiting[2]:
            result = waiting[2].pop(place)
            if not waiting[2]:
                self._waiting, self._in_vain = None, 0
            return result
        if not all(self._ready(other, x) for other in range(len(self.modules))):
            return None
        if waiting is not None:
            self._in_vain += 1
            if self._in_vain >= _PATIENCE:
                self.dissolve()
                return None
        results = dict(enumerate(self._compute(x)))
        result = results.pop(place)
        self._waiting = (x, version, results)
        return result

    def dissolve(self) -> None:
        """From now on every module computes by itself."""
        self._waiting = None
        for module in self.modules:
            module.shared = None

    def _records_gradient(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        biases = (module.bias for module in self.modules)
        return x.requires_grad or any(bias is not None and bias.requires_grad for bias in biases)

    def _ready(self, place: int, x: Tensor) -> bool:
        """Whether a module can take part now.

        Not where offloading or the user took it elsewhere, gave it other grids or the reference, or hung a hook on it, which may write to
        x between two modules.
        """
        module = self.modules[place]
        return (
            module.tensors["weight"].device == x.device
            and not module.reference
            and not module._forward_pre_hooks
            and not module._forward_hooks
            and all(a is b for a, b in zip(_statics(module), self._agreed[place], strict=True))
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_waiting": None}  # somebody's activations: no part of a copy or a file

    def _compute(self, x: Tensor) -> list[Tensor]:
        first, held = self.modules[0], [module.tensors for module in self.modules]
        return linears(
            x,
            [tensors["weight"] for tensors in held],
            [tensors["weight_scale"] for tensors in held],
            [tensors["weight_zero_point"] for tensors in held if "weight_zero_point" in tensors],
            held[0].get("input_scale"),
            held[0].get("input_zero_point"),
            [tensors["bias"] for tensors in held if tensors["bias"] is not None],
            first.in_features,
            first.scheme,
        )


def _statics(module: QVLMLinear) -> tuple[Tensor | None, ...]:
    """What must stay as it was when the modules were found to agree."""
    tensors = module.tensors
    return tensors.get("input_scale"), tensors.get("input_zero_point"), tensors["bias"]


def share_inputs(model: nn.Module, sites: Iterable[Sequence[str]]) -> None:
    """Lets the quantized modules of each site be computed together where schemes and activation grids agree.

    Args:
        model: its modules may be quantized or not; tensors on the meta device (offloaded) are left alone.
        sites: names of modules that read the same tensor.
    """
    for names in sites:
        modules = [model.get_submodule(name) for name in names]
        if len(modules) > 1 and all(isinstance(module, QVLMLinear) for module in modules) and _agree(modules):  # type: ignore[arg-type]
            SharedInput(modules)  # type: ignore[arg-type]


def _agree(modules: Sequence[QVLMLinear]) -> bool:
    first = modules[0]
    return not first.weight.is_meta and all(
        module.scheme == first.scheme
        and module.in_features == first.in_features
        and (module.bias is None) == (first.bias is None)
        and module.weight.device == first.weight.device
        and _equal(module.input_scale, first.input_scale)
        and _equal(module.input_zero_point, first.input_zero_point)
        for module in modules
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))


def _version(x: Tensor) -> int:
    """Changes when x is written to; inference tensors do not count, and a compiler sees writes by itself."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
