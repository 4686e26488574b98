"""Siblings: modules that read one input tensor (q/k/v, gate/up), computed by one operator.

The module that is called first computes all of them. The others hand out their result when they are
called with the very same tensor. No module, parameter or saved name changes, and adapters work as
always. With a hook on one of them each computes by itself. If the results of a few calls wait in
vain, the group dissolves: an adapter feeds one of them another tensor, or only one is used.

A group knows its modules by weak references: a module that is copied or saved alone takes no other
along. Copies that are made together find one another again.

Every module computes by itself with gradients, in `torch.jit.trace` and `torch.func`, and under
`torch.inference_mode`, where nothing tells that x was written to between two modules.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.ops.library import is_transformed
from qvlm_hf.ops.linear import linears

__all__ = ["Siblings", "share_inputs"]

_PATIENCE = 3  # calls in a row whose results wait in vain, before the group dissolves


class Siblings:
    """The modules of one site. `module.shared` of each is this and the module's place in it."""

    _members: list[Callable[[], QVLMLinear | None]]  # by place
    _agreed: list[tuple[Tensor | None, ...]]  # what each had when they were found to agree
    _waiting: tuple[Tensor, int, dict[int, Tensor]] | None  # input, its version, results by place
    _in_vain: int

    def __init__(self, modules: Sequence[QVLMLinear]) -> None:
        """Makes a group.

        Args:
            modules: of one scheme, with equal activation grids.
        """
        self._clear(len(modules))
        for place, module in enumerate(modules):
            module.shared = (self, place)
            self._take(place, module)

    @property
    def modules(self) -> list[QVLMLinear]:
        """Those that are (still) there."""
        found = [member() for member in self._members]
        return [module for module in found if module is not None]

    def output(self, place: int, module: QVLMLinear, x: Tensor) -> Tensor | None:
        """Returns the output of the module at `place`, or None if it has to compute by itself."""
        if _alone(x) or _records_gradient((module,), x) or not self._ready(place, module, x):
            return None
        version, waiting = _version(x), self._waiting  # one read: another thread may replace it
        if waiting is not None and waiting[0] is x and waiting[1] == version:
            result = waiting[2].pop(place, None)
            if not waiting[2]:
                self._waiting, self._in_vain = None, 0
            if result is not None:
                return result
        modules = self.modules
        if len(modules) < len(self._members):  # one was replaced, or this is a lone copy
            self.dissolve()
            return None
        ready = (self._ready(other, one, x) for other, one in enumerate(modules))
        if _records_gradient(modules, x) or not all(ready):
            return None
        if waiting is not None:
            self._in_vain += 1
            if self._in_vain >= _PATIENCE:
                self.dissolve()
                return None
        results = dict(enumerate(_compute(modules, x)))
        result = results.pop(place)
        self._waiting = (x, version, results)
        return result

    def dissolve(self) -> None:
        """From now on every module computes by itself."""
        self._waiting = None
        for module in self.modules:
            module.shared = None

    def rejoin(self, place: int, module: QVLMLinear) -> None:
        """Takes in the copy of the module at `place`; the last to come finds out if all agree."""
        if self._members[place]() is not None:  # a shallow copy: the group is the original's
            module.shared = None
            return
        self._take(place, module)
        modules = self.modules
        if len(modules) == len(self._members) and not _agree(modules):
            self.dissolve()

    def __getstate__(self) -> int:
        return len(self._members)  # no module or activation is part of a copy or a file

    def __setstate__(self, size: int) -> None:
        self._clear(size)

    def _clear(self, size: int) -> None:
        self._members, self._agreed = [_nobody] * size, [()] * size
        self._waiting, self._in_vain = None, 0

    def _take(self, place: int, module: QVLMLinear) -> None:
        self._members[place], self._agreed[place] = weakref.ref(module), _statics(module)

    def _ready(self, place: int, module: QVLMLinear, x: Tensor) -> bool:
        """Whether a module takes part now: where it was, as it was, and without a hook.

        A hook may write to x between two modules.
        """
        return (
            module.tensors["weight"].device == x.device
            and not module.reference
            and not module._forward_pre_hooks
            and not module._forward_hooks
            and all(a is b for a, b in zip(_statics(module), self._agreed[place], strict=True))
        )


def _nobody() -> None:
    """The member whose module has not come yet."""


def _records_gradient(modules: Iterable[QVLMLinear], x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    biases = (module.bias for module in modules)
    return x.requires_grad or any(bias is not None and bias.requires_grad for bias in biases)


def _compute(modules: Sequence[QVLMLinear], x: Tensor) -> list[Tensor]:
    first = modules[0]
    return linears(x, [module.tensors for module in modules], first.in_features, first.scheme)


def _statics(module: QVLMLinear) -> tuple[Tensor | None, ...]:
    """The tensors that must stay the same objects for the modules to agree."""
    tensors = module.tensors
    return tensors.get("input_scale"), tensors.get("input_zero_point"), tensors["bias"]


def share_inputs(sites: Iterable[Sequence[nn.Module]]) -> None:
    """Lets the quantized modules of each site be computed together if schemes and grids agree.

    Modules on the meta device (offloaded) are left alone.
    """
    for site in sites:
        modules = [module for module in site if isinstance(module, QVLMLinear)]
        if len(site) == len(modules) > 1 and _agree(modules):
            Siblings(modules)


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
    return a is b or (
        a is not None and b is not None and a.device == b.device and torch.equal(a, b)
    )


def _alone(x: Tensor) -> bool:
    """Whether single calls are followed, or nothing tells of writes to x between two."""
    return not torch.compiler.is_compiling() and (x.is_inference() or is_transformed())


def _version(x: Tensor) -> int:
    """Changes when x is written to; a compiler sees writes by itself."""
    return 0 if torch.compiler.is_compiling() else x._version
