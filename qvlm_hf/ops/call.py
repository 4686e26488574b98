"""A call of quantized linear modules, declared once: `Packed` and `CallScheme`.

The operators' schemas and their flat arguments follow from the fields of these two. A kernel takes
`(x, weights, scheme)` and returns an output for each weight.

Legend: M tokens (all leading dimensions), K in_features, N out_features, G weight groups, W packed
words of a row.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
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
    "numbers_of",
    "packed_call",
    "parse_many",
    "parse_one",
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
        input_zero_point: int32, like `input_scale`; None for "none" and the dynamic ones.
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
_own_of, _shared_of = (itemgetter(*map(_ORDER.index, names)) for names in (_OWN, _SHARED))
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


def parse_one(arguments: Sequence[Any]) -> tuple[list[Packed], CallScheme]:
    """The weights (one) and the scheme behind the flat arguments of one module.

    Raises:
        ValueError: the numbers are those of no scheme.
    """
    scheme = CallScheme._make(_shared_of(arguments))
    _check_numbers(scheme[2:])
    return [Packed._make(_own_of(arguments))], scheme


def parse_many(arguments: Sequence[Any]) -> tuple[list[Packed], CallScheme]:
    """The same for many modules.

    Raises:
        ValueError: as `parse_one`, or the lists have different lengths.
    """
    lists = _own_of(arguments)
    count, scales, zero_points, biases = map(len, lists)
    if scales != count or zero_points not in (0, count) or biases not in (0, count):
        raise ValueError(
            f"{count} weights, {scales} weight_scales, {zero_points} weight_zero_points and "
            f"{biases} biases: each list must have one tensor per module (the last two may be "
            f"empty)."
        )
    scheme = CallScheme._make(_shared_of(arguments))
    _check_numbers(scheme[2:])
    nothing = [None] * count
    own = zip(*(one or nothing for one in lists), strict=True)
    return list(map(Packed._make, own)), scheme


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
    if hadamard and in_features % hadamard:
        raise ValueError(
            f"a Hadamard block of {hadamard} must be a power of two that divides {in_features}."
        )


def has_format(x: Tensor, weights: Sequence[Packed], scheme: CallScheme) -> bool:
    """Whether all tensors lie on x's device, with the dtypes and shapes of docs/format.md.

    Kernels rely on it.
    """
    k, bits, device = scheme.in_features, scheme.weight_bits, x.device
    own = (tensor for packed in weights for tensor in packed)
    if any(tensor is not None and tensor.device != device for tensor in (*scheme[:2], *own)):
        return False
    if not (x.is_floating_point() and x.dim() and x.shape[-1] == k):
        return False
    words, groups = -(-k * bits // 32), -(-k // scheme.group_length)
    for weight, scale, zero_point, bias in weights:
        rows = weight.shape[0]
        if weight.dtype != torch.int32 or weight.shape != (rows, words):
            return False
        if scale.dtype != torch.bfloat16 or scale.shape != (rows, groups):
            return False
        if zero_point is not None and (
            zero_point.dtype != torch.uint8 or zero_point.shape != scale.shape
        ):
            return False
        if bias is not None and bias.shape != (rows,):
            return False
    return _grid_has_format(x, scheme)


def _grid_has_format(x: Tensor, scheme: CallScheme) -> bool:
    scale, zero_point, k, granularity = *scheme[:3], scheme.granularity
    if granularity == "none":
        return scale is None or scale.shape == (k,)
    if granularity in ("dynamic_token", "dynamic_group"):
        return True
    if scale is None or zero_point is None or (granularity == "token" and x.dim() < 2):
        return False
    length = k if granularity == "channel" else x.shape[-2]
    return (
        scale.shape == zero_point.shape == (length,)
        and scale.dtype == torch.float32
        and zero_point.dtype == torch.int32
    )


def int32_overflow(scheme: CallScheme) -> str | None:
    """Why two integer sums over a group, added by kernels, do not fit into int32; or None."""
    levels = (2**scheme.weight_bits - 1) * (2**scheme.activation_bits - 1)
    if scheme.activation_bits <= 8 and scheme.group_length * levels >= 2**30:
        return f"a sum over {scheme.group_length} inputs can leave int32"
    return None
