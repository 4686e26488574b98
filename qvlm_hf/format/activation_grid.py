"""The affine grid: ranges to `QParams`, values to integers and back.

q = clamp(round(x / scale) + zero_point, 0, 2^bits - 1), x_hat = scale * (q - zero_point); rounding
half to even, division (not multiplication by a reciprocal), float32 throughout. Every range is
widened to include 0, so the zero point is a level.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "QParams",
    "choose_qparams",
    "dequantize",
    "dynamic_token_qparams",
    "fake_quantize",
    "grid_bounds",
    "quantize",
    "shift_quantize",
]


@dataclass(frozen=True)
class QParams:
    """Affine parameters; `scale` (float32, > 0) and `zero_point` (int32, 0 ... 2^bits - 1) broadcast against the values."""

    scale: Tensor
    zero_point: Tensor
    bits: int


def choose_qparams(low: Tensor, high: Tensor, bits: int) -> QParams:
    """The grid of 2^bits levels over [min(low, 0), max(high, 0)].

    Args:
        low: smallest values, any shape.
        high: largest values, same shape.
        bits: 2 to 8.

    Returns:
        QParams of that shape; an empty range (both 0) gets scale 1.

    Raises:
        ValueError: a bound is NaN or infinite.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError(
            "a range holds NaN or infinity: the values it was taken from are not finite."
        )
    return _grid(low, high, bits)


def dynamic_token_qparams(x: Tensor, bits: int) -> QParams:
    """One range per token, from the token itself.

    Args:
        x: [..., tokens, channels]; empty tokens are allowed.
        bits: 3 to 8.

    Returns:
        QParams of shape [..., tokens, 1].
    """
    x = x.float()
    return _grid(x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0), bits)


def _grid(low: Tensor, high: Tensor, bits: int) -> QParams:
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return QParams(scale, torch.round(-low / scale).clamp(0, 2**bits - 1).to(torch.int32), bits)


def grid_bounds(qparams: QParams) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of a grid, float32 of the scale's shape."""
    zero_point = qparams.zero_point.float()
    return -zero_point * qparams.scale, (2**qparams.bits - 1 - zero_point) * qparams.scale


def shift_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """q - zero_point as float32, same shape as `x`: the integers that the integer product multiplies."""
    zero_point = qparams.zero_point.to(torch.float32)
    # clamp(r + z, 0, top) - z == clamp(r, -z, top - z): the same integers, one pass fewer
    return (
        torch.div(x.float(), qparams.scale)
        .round_()
        .clamp_(-zero_point, 2**qparams.bits - 1 - zero_point)
    )


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Integers 0 ... 2^bits - 1 as uint8, same shape as `x`."""
    return (shift_quantize(x, qparams) + qparams.zero_point).to(torch.uint8)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """scale * (q - zero_point) in float32, same shape as `q`."""
    return (q.to(torch.float32) - qparams.zero_point) * qparams.scale


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """The nearest point of the grid, in float32: dequantize(quantize(x))."""
    return shift_quantize(x, qparams) * qparams.scale
