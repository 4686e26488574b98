"""Plain PyTorch: the arithmetic of docs/format.md written out once, on every device.

The oracle that each kernel is tested against.

It multiplies true integers. They travel in float32 as long as every partial sum stays below 2^24,
where float32 holds each integer exactly, and in float64 (exact up to 2^53) beyond. So the
accumulators equal int32 ones bit for bit. It is slow: it unpacks the weight at every call.

Legend: M tokens, K in_features, N out_features, G groups of `group_length` inputs, the last one may
be short.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qvlm_hf.format.grids import (
    QParams,
    QuantizedWeight,
    dynamic_group_quantize,
    dynamic_token_qparams,
    shift_quantize,
)
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.packing import pack, unpack
from qvlm_hf.format.scheme import is_per_channel, is_per_position, is_static, unknown_granularity
from qvlm_hf.ops.call import CallScheme, Compute, Packed

__all__ = [
    "Case",
    "dequantize",
    "exact_products",
    "find_wrong_case",
    "input_gradient",
    "linears",
    "rms_norm",
]

_EXACT_FLOAT32 = 2**24


def linears(x: Tensor, weights: Sequence[Packed], scheme: CallScheme) -> list[Tensor]:
    """The outputs of modules that read the same input; errors as in `ops.linear.linear`."""
    return [_linear(x, packed, scheme) for packed in weights]


def _linear(x: Tensor, packed: Packed, scheme: CallScheme) -> Tensor:
    k, bits, length = scheme.in_features, scheme.weight_bits, scheme.group_length
    if not x.dim() or x.shape[-1] != k:
        raise ValueError(f"an input of shape {tuple(x.shape)} does not end in in_features={k}.")
    if not x.is_floating_point():
        raise ValueError(
            f"an input of {x.dtype} is no floating point: convert it, as by x.float()."
        )
    shape = (packed.weight.shape[0], -(-k // length))
    for name in ("weight_scale", "weight_zero_point"):
        tensor = getattr(packed, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, not [out_features, groups] = {shape}."
            )
    a, input_scale = _quantize_input(_transform(x.float(), scheme), scheme)
    if scheme.granularity != "none":  # an integer cannot say that it was NaN
        a = a.masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)
    zero_point = _zero_point(packed, bits)
    integers = unpack(packed.weight, bits, k)
    # A floating point input has no exact sums to keep.
    bound = length * (2**scheme.activation_bits - 1) * (2**bits - 1)
    exact64 = scheme.granularity != "none" and bound >= _EXACT_FLOAT32
    dtype = torch.float64 if exact64 else torch.float32
    grouped = scheme.granularity == "dynamic_group"
    y = a.new_zeros((*a.shape[:-1], shape[0]))
    for group in range(shape[1]):
        part = slice(group * length, (group + 1) * length)
        shifted = integers[:, part].to(dtype) - zero_point[:, group, None].to(dtype)
        with exact_products(x):
            sums = a[..., part].to(dtype) @ shifted.T
        scaled = sums.float() * packed.weight_scale[:, group].float()
        if grouped and input_scale is not None:
            scaled *= input_scale[..., group, None]
        y += scaled
    if not grouped and input_scale is not None:
        y *= input_scale
    if packed.bias is not None:
        y += packed.bias.float()
    return y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in float32, rounded to x's dtype before and after `weight`, as LlamaRMSNorm does.

    `x` is [..., K], `weight` [K].
    """
    values = x.float()
    factor = torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return weight * (values * factor).to(x.dtype)


def input_gradient(grad: Tensor, packed: Packed, scheme: CallScheme) -> Tensor:
    """grad [..., N] times the dequantized weight, [..., K] in grad's dtype: straight-through."""
    dequantized = dequantize(packed, scheme)
    with exact_products(grad):
        return (grad.float() @ dequantized).to(grad.dtype)


def exact_products(x: Tensor) -> torch.autocast:
    """Switches the caller's `torch.autocast` off on x's device: it would make products 16-bit."""
    return torch.autocast(x.device.type, enabled=False)


def dequantize(packed: Packed, scheme: CallScheme) -> Tensor:
    """float32 [N, K]: weight_scale (w - zero_point), input scale divided out, transform undone."""
    integers = unpack(packed.weight, scheme.weight_bits, scheme.in_features)
    zero_point = _zero_point(packed, scheme.weight_bits)
    quantized = QuantizedWeight(integers, packed.weight_scale, zero_point, scheme.group_length)
    dequantized = quantized.dequantize()
    if scheme.input_scale is not None and scheme.granularity in ("channel", "none"):
        dequantized = dequantized / scheme.input_scale
    return _transform(dequantized, scheme)


def _transform(values: Tensor, scheme: CallScheme) -> Tensor:
    """Times the block Hadamard matrix, which is its own inverse."""
    return block_hadamard(values, scheme.hadamard) if scheme.hadamard else values


def _quantize_input(x: Tensor, scheme: CallScheme) -> tuple[Tensor, Tensor | None]:
    """a of x's shape (integers as float32, or `x`), and its scales r, or None for 1.

    They are broadcastable to [..., N]; for "dynamic_group" they are [..., G].
    """
    scale, zero_point, bits = scheme.input_scale, scheme.input_zero_point, scheme.activation_bits
    if scheme.granularity == "none":
        return (x if scale is None else x / scale), None
    if scheme.granularity == "dynamic_token":
        qparams = dynamic_token_qparams(x, bits)
        return shift_quantize(x, qparams), qparams.scale
    if scheme.granularity == "dynamic_group":
        return dynamic_group_quantize(x, bits, scheme.group_length)
    if not is_static(scheme.granularity):
        raise unknown_granularity(scheme.granularity)
    if scale is None or zero_point is None:
        raise ValueError(
            f"granularity {scheme.granularity!r} needs input_scale and input_zero_point: the "
            f"module was not calibrated."
        )
    if is_per_channel(scheme.granularity):
        return shift_quantize(x, QParams(scale, zero_point, bits)), None
    if not is_per_position(scheme.granularity):
        raise unknown_granularity(scheme.granularity)
    if x.dim() < 2 or x.shape[-2] != scale.shape[0]:
        raise ValueError(
            f"an input of shape {tuple(x.shape)} does not have the {scale.shape[0]} positions that "
            f"'token' was calibrated for."
        )
    qparams = QParams(scale[:, None], zero_point[:, None], bits)
    return shift_quantize(x, qparams), qparams.scale


def _zero_point(packed: Packed, bits: int) -> Tensor:
    if packed.weight_zero_point is not None:
        return packed.weight_zero_point
    return torch.full_like(packed.weight_scale, 2 ** (bits - 1), dtype=torch.uint8)


class Case(NamedTuple):
    """A small random call that kernels are checked with.

    Attributes:
        weight_bits: of a weight.
        activation_bits: of an input.
        granularity: of the inputs.
        tokens: M.
        in_features: K.
        group_length: L.
        out_features: N of each module that reads the input.
        hadamard: block of the input transform, 0 for none.
    """

    weight_bits: int
    activation_bits: int
    granularity: str
    tokens: int
    in_features: int = 300
    group_length: int = 128
    out_features: tuple[int, ...] = (70, 5)
    hadamard: int = 0

    def __str__(self) -> str:
        """The call in words."""
        sizes = f"{self.in_features} inputs in groups of {self.group_length}"
        bits = f"W{self.weight_bits}A{self.activation_bits}"
        transform = f", Hadamard blocks of {self.hadamard}" if self.hadamard else ""
        return f"{bits} {self.granularity}, {self.tokens} tokens, {sizes}{transform}"


def find_wrong_case(
    compute: Compute,
    cases: Sequence[Case],
    *,
    device: torch.device | str = "cpu",
    floating: torch.dtype = torch.float32,
) -> str | None:
    """Checks a kernel: the first case that it computes otherwise, in words, or None.

    `floating`: dtype of inputs that are not quantized.
    """

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    generator = torch.Generator().manual_seed(0)
    for case in cases:
        x, weights, scheme = _random_call(case, generator)
        x = x.to(floating if case.granularity == "none" else torch.float32)
        there = CallScheme._make((*map(move, scheme[:2]), *scheme[2:]))
        found = compute(x.to(device), [Packed._make(map(move, one)) for one in weights], there)
        rtol = 1e-4 if x.dtype == torch.float32 else 2**-7
        for y, expected in zip(found, linears(x.float(), weights, scheme), strict=True):
            atol = 1e-5 * float(expected.abs().max())
            if not torch.allclose(y.float().cpu(), expected, rtol=rtol, atol=atol):
                return str(case)
    return None


def _random_call(case: Case, generator: torch.Generator) -> tuple[Tensor, list[Packed], CallScheme]:
    """Random arguments of it."""

    def integers(bits: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator, dtype=dtype)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32)

    k, bits, groups = case.in_features, case.weight_bits, -(-case.in_features // case.group_length)
    weights = [
        Packed(
            pack(integers(bits, rows, k), bits),
            floats(rows, groups).add(0.5).bfloat16(),
            integers(bits, rows, groups),
            floats(rows) - 0.5,
        )
        for rows in case.out_features
    ]
    length = {"channel": k, "token": case.tokens}.get(case.granularity)
    scale = zero_point = None
    if length is not None:
        scale = floats(length).add(0.1)
        zero_point = integers(case.activation_bits, length, dtype=torch.int32)
    numbers = (k, bits, case.activation_bits, case.group_length, case.granularity, case.hadamard)
    x = torch.randn(case.tokens, k, generator=generator, dtype=torch.float32)
    return x, weights, CallScheme(scale, zero_point, *numbers)
