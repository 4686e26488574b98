"""Plain PyTorch: the arithmetic of docs/format.md written out once, on every device.

The oracle that each kernel is tested against.

It multiplies true integers. They travel in float32 as long as every partial sum stays below 2^24,
where float32 holds each integer exactly, and in float64 (exact up to 2^53) beyond; so the
accumulators equal int32 ones bit for bit. Not built for speed: it unpacks the weight at every call.

Legend: M tokens, K in_features, N out_features, G groups of `group_length` inputs, the last one may
be short.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvlm_hf.format.grids import QParams, QuantizedWeight, dynamic_token_qparams, shift_quantize
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.packing import unpack
from qvlm_hf.ops.schema import LIBRARY, check_sizes

__all__ = [
    "dequantize_weight",
    "exact_products",
    "linear",
    "linear_input_grad",
    "linears",
    "per_module",
    "rms_norm",
]

_EXACT_FLOAT32 = 2**24


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    weight_bits: int,
    activation_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> Tensor:
    """The reference of `qvlm_hf::linear`; arguments and errors as in `ops.schema.linear`."""
    check_sizes(in_features, weight_bits, activation_bits, group_length, granularity, hadamard)
    if not x.dim() or x.shape[-1] != in_features:
        raise ValueError(
            f"an input of shape {tuple(x.shape)} does not end in in_features={in_features}."
        )
    shape = (weight.shape[0], -(-in_features // group_length))
    for name, tensor in (("weight_scale", weight_scale), ("weight_zero_point", weight_zero_point)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, not [out_features, groups] = {shape}."
            )
    values = block_hadamard(x.float(), hadamard) if hadamard else x.float()
    a, row_scale = _quantize_input(
        values, input_scale, input_zero_point, activation_bits, granularity
    )
    weight_zero_point = _zero_point(weight_scale, weight_zero_point, weight_bits)
    integers = unpack(weight, weight_bits, in_features)
    # A floating point input has no exact sums to keep.
    bound = group_length * (2**activation_bits - 1) * (2**weight_bits - 1)
    dtype = torch.float64 if granularity != "none" and bound >= _EXACT_FLOAT32 else torch.float32
    y = a.new_zeros((*a.shape[:-1], weight.shape[0]))
    for group in range(weight_scale.shape[1]):
        part = slice(group * group_length, (group + 1) * group_length)
        shifted = integers[:, part].to(dtype) - weight_zero_point[:, group, None].to(dtype)
        with exact_products(x):
            sums = a[..., part].to(dtype) @ shifted.T
        y += sums.float() * weight_scale[:, group].float()
    if row_scale is not None:
        y *= row_scale
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


def linears(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Sequence[Tensor],
    in_features: int,
    weight_bits: int,
    activation_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> list[Tensor]:
    """The reference of `qvlm_hf::linears`, one module after the other; arguments and errors as in `ops.schema.linears`."""
    modules = per_module(weight, weight_scale, weight_zero_point, bias)
    sizes = (in_features, weight_bits, activation_bits, group_length, granularity, hadamard)
    return [
        linear(x, one, scale, zero, input_scale, input_zero_point, offset, *sizes)
        for one, scale, zero, offset in modules
    ]


def per_module(
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """The tensors of each module from lists of them, an empty list being None for every module.

    Raises:
        ValueError: the lists have different lengths.
    """
    count = len(weight)
    if (
        len(weight_scale) != count
        or len(weight_zero_point) not in (0, count)
        or len(bias) not in (0, count)
    ):
        raise ValueError(
            f"{count} weights, {len(weight_scale)} weight_scales, {len(weight_zero_point)} "
            f"weight_zero_points and {len(bias)} biases:"
            " each list must have one tensor per module (the last two may be empty)."
        )
    nothing = (None,) * count
    return list(
        zip(weight, weight_scale, weight_zero_point or nothing, bias or nothing, strict=True)
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of the last dimension in float32, rounded to x's dtype before and after `weight`, as LlamaRMSNorm does.

    Args:
        x: [..., K].
        weight: [K].
        epsilon: added to the mean square.
    """
    values = x.float()
    return weight * (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)).to(
        x.dtype
    )


def linear_input_grad(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    in_features: int,
    weight_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> Tensor:
    """grad [..., N] times the dequantized weight, [..., K] in grad's dtype: the straight-through gradient of the input."""
    dequantized = dequantize_weight(
        weight,
        weight_scale,
        weight_zero_point,
        input_scale,
        in_features,
        weight_bits,
        group_length,
        granularity,
        hadamard,
    )
    with exact_products(grad):
        return (grad.float() @ dequantized).to(grad.dtype)


def exact_products(x: Tensor) -> torch.autocast:
    """Products in the dtype they are written in on x's device: the caller's `torch.autocast` would make them bfloat16 or float16."""
    return torch.autocast(x.device.type, enabled=False)


def dequantize_weight(
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    in_features: int,
    weight_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> Tensor:
    """float32 [N, K]: weight_scale (w - zero_point), a folded input scale divided out, the input transform undone."""
    zero_point = _zero_point(weight_scale, weight_zero_point, weight_bits)
    dequantized = QuantizedWeight(
        unpack(weight, weight_bits, in_features), weight_scale, zero_point, group_length
    ).dequantize()
    if input_scale is not None and granularity in ("channel", "none"):
        dequantized = dequantized / input_scale
    return block_hadamard(dequantized, hadamard) if hadamard else dequantized


def _quantize_input(
    x: Tensor,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bits: int,
    granularity: str,
) -> tuple[Tensor, Tensor | None]:
    """a (integers as float32, or `x` itself) of x's shape, and r, broadcastable against [..., N], or None for 1."""
    if granularity == "none":
        return (x if input_scale is None else x / input_scale), None
    if granularity == "dynamic_token":
        qparams = dynamic_token_qparams(x, bits)
        return shift_quantize(x, qparams), qparams.scale
    if input_scale is None or input_zero_point is None:
        raise ValueError(
            f"granularity {granularity!r} needs input_scale and input_zero_point: the module was "
            f"not calibrated."
        )
    if granularity == "channel":
        return shift_quantize(x, QParams(input_scale, input_zero_point, bits)), None
    if x.dim() < 2 or x.shape[-2] != input_scale.shape[0]:
        raise ValueError(
            f"an input of shape {tuple(x.shape)} does not have the {input_scale.shape[0]} "
            f"positions that 'token' was calibrated for."
        )
    return shift_quantize(
        x, QParams(input_scale[:, None], input_zero_point[:, None], bits)
    ), input_scale[:, None]


def _zero_point(weight_scale: Tensor, weight_zero_point: Tensor | None, bits: int) -> Tensor:
    if weight_zero_point is not None:
        return weight_zero_point
    return torch.full(
        weight_scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=weight_scale.device
    )


LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")
LIBRARY.impl("linear_reference", linear, "CompositeExplicitAutograd")
LIBRARY.impl("linears", linears, "CompositeExplicitAutograd")
LIBRARY.impl("linear_input_grad", linear_input_grad, "CompositeExplicitAutograd")
