"""A GPU kernel's launch as it is repeated: what does not change is prepared once.

Triton's own way takes 70 us of host time a launch, to look at every argument. A launch here looks
at the addresses alone, after a first call by Triton's way.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Buffers", "Launch", "aligned"]

_ALIGNED = 256  # bytes; Triton compiles for addresses that are multiples of 16


class Buffers:
    """Tensors of one call that lie in one allocation, which takes as long as several launches."""

    def __init__(self, **parts: tuple[torch.dtype, tuple[int, ...]] | None) -> None:
        """Lays them out.

        Args:
            parts: dtype and shape by name, or None for what is not needed.
        """
        self._parts, self.size = parts, 0
        self._starts: list[int | None] = []
        for part in parts.values():
            self._starts.append(None if part is None else self.size)
            if part is not None:
                size = math.prod(part[1]) * part[0].itemsize
                self.size += -(-size // _ALIGNED) * _ALIGNED

    def tensors(self, storage: Tensor) -> dict[str, Tensor | None]:
        """Views of `storage`, uint8 [size]."""
        found: dict[str, Tensor | None] = {}
        for (name, part), start in zip(self._parts.items(), self._starts, strict=True):
            found[name] = None
            if part is not None and start is not None:
                dtype, shape = part
                end = start + math.prod(shape) * dtype.itemsize
                found[name] = storage[start:end].view(dtype).view(shape)
        return found

    def addresses(self, start: int) -> list[int | None]:
        """Where they begin, if their allocation begins at `start`."""
        return [None if one is None else start + one for one in self._starts]


class Launch:
    """A kernel, its grid and all of its arguments but the addresses, which come first.

    `repeats`: whether launches go past Triton; false where its launcher takes other arguments.
    """

    repeats = True

    def __init__(
        self, function: Any, grid: tuple[int, int, int], options: dict[str, int], **values: Any
    ) -> None:
        """Compiles nothing yet.

        Args:
            function: a Triton kernel.
            grid: numbers of programs.
            options: of the compiler.
            values: of every argument that is no address, by name.
        """
        self.function, self.grid, self.options, self.values = function, grid, options, values
        names = list(inspect.signature(function.fn).parameters)
        self._ordered = tuple(values[name] for name in names[len(names) - len(values) :])
        self._compiled: Any = None

    @property
    def ready(self) -> bool:
        """Whether `at` can be called."""
        return self._compiled is not None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launches Triton's way, and keeps what was compiled for aligned addresses."""
        compiled = self.function[self.grid](*tensors, **self.values, **self.options)
        if compiled is None or not self.repeats:
            return
        if aligned([one.data_ptr() for one in tensors if one is not None]):
            self._compiled = compiled[self.grid]

    def at(self, addresses: Sequence[int | None]) -> None:
        """Launches with aligned addresses of tensors like those of an earlier call."""
        self._compiled(*addresses, *self._ordered)


def aligned(addresses: Sequence[int]) -> bool:
    """Whether kernels compiled for aligned addresses take these."""
    together = 0
    for address in addresses:
        together |= address
    return together % 16 == 0
