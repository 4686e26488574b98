"""A call of quantized linear modules, declared once: `Packed` and `CallScheme`.

The operators' schemas and their flat arguments follow from the fields of these two. A kernel takes
`(x, weights, scheme)` and returns an output for each weight.

Legend: M tokens (all leading dimensions), K in_features, N out_features, G weight groups, W packed
words of a row.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qvlm_hf.format.scheme import QuantScheme

__all__ = [
    "SCHEMA_OF_MANY",
    "SCHEMA_OF_ONE",
    "CallScheme",
    "Compute",
    "Loaded",
    "Packed",
    "has_format",
    "int32_overflow",
    "lists_of_one",
    "numbers_of",
    "packed_call",
    "parse",
]


class Packed(NamedTuple):
    """The tensors of one module as they lie on disk (docs/format.md), those of its input apart.

    Attributes:
        weight: int32 [N, W], packed unsigned integers (format/packing.py).
        weight_scale: bfloat16 [N, G].
        weight_zero_point: uint8 [N, G]; None is 2^(weight_bits - 1).
        bias: [N] or None.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    bias: Tensor | None


class CallScheme(NamedTuple):
    """What all modules of a call share: the grid of their input, and the numbers of their scheme.

    Attributes:
        input_scale: float32 [K] for "channel" (and, optionally, "none"), [positions] for "token",
            else None.
        input_zero_point: int32, like `input_scale`; None for "none" and "dynamic_token".
        in_features: K.
        weight_bits: bits of a weight.
        activation_bits: bits of an input value.
        group_length: inputs of a full weight group.
        granularity: of the input.
        hadamard: block of the input transform, 0 for none.
    """

    input_scale: Tensor | None
    input_zero_point: Tensor | None
    in_features: int
    weight_bits: int
    activation_bits: int
    group_length: int
    granularity: str
    hadamard: int


Compute = Callable[[Tensor, Sequence[Packed], CallScheme], list[Tensor]]
Loaded = tuple[str, Compute | None]  # the kernel's name, or "reference (why)" and None

_OWN, _SHARED = Packed._fields, CallScheme._fields
_ORDER = ("x", *_OWN[:3], *_SHARED[:2], "bias", *_SHARED[2:])  # the one of cpu_direct.cpp, too
_ONE = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", str: "str"}
_TYPES = {"x": Tensor} | Packed.__annotations__ | CallScheme.__annotations__


def _schema(types: Mapping[str, str], result: str) -> str:
    return f"({', '.join(f'{types[name]} {name}' for name in _ORDER)}) -> {result}"


_ONE_MODULE = {name: _ONE[kind] for name, kind in _TYPES.items()}
SCHEMA_OF_ONE = _schema(_ONE_MODULE, "Tensor")
SCHEMA_OF_MANY = _schema(_ONE_MODULE | dict.fromkeys(_OWN, "Tensor[]"), "Tensor[]")


def numbers_of(in_features: int, scheme: QuantScheme) -> tuple[int, int, int, int, str, int]:
    """The fields of `CallScheme` that are no tensors."""
    return (
        in_features,
        scheme.weight_bits,
        scheme.activation_bits,
        scheme.group_length(in_features),
        scheme.granularity,
        scheme.hadamard or 0,
    )


def packed_call(
    tensors: Mapping[str, Tensor | None], in_features: int, scheme: QuantScheme
) -> tuple[Packed, CallScheme]:
    """A module's own tensors and its scheme, from its tensors by their names on disk."""
    grid = map(tensors.get, _SHARED[:2])
    numbers = numbers_of(in_features, scheme)
    return Packed._make(map(tensors.get, _OWN)), CallScheme._make((*grid, *numbers))


def lists_of_one(arguments: Sequence[Any]) -> list[Any]:
    """The flat arguments of one module as those of many: own tensors in lists, empty for None."""
    return [
        argument if name not in _OWN else [] if argument is None else [argument]
        for name, argument in zip(_ORDER, arguments, strict=True)
    ]


def parse(arguments: Sequence[Any]) -> tuple[Tensor, list[Packed], CallScheme]:
    """The call behind the flat arguments of many modules.

    Raises:
        ValueError: lists have different lengths, or the numbers are those of no scheme.
    """
    given = dict(zip(_ORDER, arguments, strict=True))
    x, lists = given.pop("x"), [given.pop(name) for name in _OWN]
    count, scales, zero_points, biases = map(len, lists)
    if scales != count or zero_points not in (0, count) or biases not in (0, count):
        raise ValueError(
            f"{count} weights, {scales} weight_scales, {zero_points} weight_zero_points and "
            f"{biases} biases: each list must have one tensor per module (the last two may be "
            f"empty)."
        )
    scheme = CallScheme(**given)
    _check_numbers(scheme[2:])
    nothing = [None] * count
    return (
        x,
        [Packed._make(own) for own in zip(*(one or nothing for one in lists), strict=True)],
        scheme,
    )


@functools.cache
def _check_numbers(numbers: tuple[Any, ...]) -> None:
    """Refuses numbers that no `QuantScheme` has: anyone may call an operator, kernels trust it."""
    in_features, weight_bits, activation_bits, group_length, granularity, hadamard = numbers
    QuantScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        granularity=granularity,
        hadamard=hadamard or None,
    )
    if in_features < 1:
        raise ValueError(f"in_features={in_features} must be at least 1.")
    if not 1 <= group_length <= in_features:
        raise ValueError(
            f"group_length={group_length} must be from 1 to in_features={in_features}, which is "
            f"one group per row."
        )


def has_format(x: Tensor, weights: Sequence[Packed], scheme: CallScheme) -> bool:
    """Whether all tensors have the dtypes and shapes of docs/format.md, on which kernels rely."""
    k, bits, granularity = scheme.in_features, scheme.weight_bits, scheme.granularity
    if not (x.is_floating_point() and x.dim() and x.shape[-1] == k):
        return False
    words, groups = -(-k * bits // 32), -(-k // scheme.group_length)

    def has(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> bool:
        return tensor is not None and tensor.dtype == dtype and tensor.shape == shape

    for weight, scale, zero_point, bias in weights:
        rows = weight.shape[0] if weight.dim() else 0
        if not (
            has(weight, torch.int32, rows, words)
            and has(scale, torch.bfloat16, rows, groups)
            and (zero_point is None or has(zero_point, torch.uint8, rows, groups))
            and (bias is None or bias.shape == (rows,))
        ):
            return False
    if granularity == "none":
        return scheme.input_scale is None or scheme.input_scale.shape == (k,)
    if granularity == "dynamic_token":
        return True
    if granularity == "token" and x.dim() < 2:
        return False
    length = k if granularity == "channel" else x.shape[-2]
    return has(scheme.input_scale, torch.float32, length) and has(
        scheme.input_zero_point, torch.int32, length
    )


def int32_overflow(scheme: CallScheme) -> str | None:
    """Why two integer sums over a group, added by kernels, do not fit into int32; or None."""
    levels = (2**scheme.weight_bits - 1) * (2**scheme.activation_bits - 1)
    if scheme.activation_bits <= 8 and scheme.group_length * levels >= 2**30:
        return f"a sum over {scheme.group_length} inputs can leave int32"
    return None
