"""The affine grid of integers, from ranges: of input values, and of weights group by group.

q = clamp(round(x / scale) + zero_point, 0, 2^bits - 1), x_hat = scale * (q - zero_point). Rounding
is half to even, division is no multiplication by a reciprocal, all in float32. Every range is
widened to include 0, so that the zero point is a level.

Weight scales are rounded to bfloat16 before the integers are chosen, because that is what is
stored. The caller folds a static input scale per channel into the columns first (W' = W diag(s),
docs/format.md), so that rounding sees the error that counts.

Legend: O out_features, I in_features, L group length, G = ceil(I / L) groups; the last group may be
short.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm_hf.format.scheme import QuantScheme

__all__ = [
    "CLIPS",
    "QParams",
    "QuantizedWeight",
    "choose_qparams",
    "chosen_clip",
    "dequantize",
    "dynamic_group_quantize",
    "dynamic_token_qparams",
    "fake_quantize",
    "grid_bounds",
    "group_expand",
    "grouped_weight",
    "not_finite",
    "quantize",
    "quantize_weight",
    "shift_quantize",
    "split_groups",
]

CLIPS = tuple(1.0 - 0.04 * step for step in range(11))  # factors on a group's range that are tried
_CACHED = 2**15  # weights per thread that are rounded at once
_NORM = 2.4  # of the error that chooses a range (and in csrc/cpu_round.cpp): large ones count more


@dataclass(frozen=True)
class QParams:
    """A grid.

    Attributes:
        scale: float32, > 0; broadcasts against the values.
        zero_point: int32, 0 ... 2^bits - 1, of the scale's shape.
        bits: of one integer.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int


def choose_qparams(low: Tensor, high: Tensor, bits: int) -> QParams:
    """Lays 2^bits levels over [min(low, 0), max(high, 0)].

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
    """Lays a grid over the range of each token.

    Args:
        x: [..., tokens, channels]; empty tokens are allowed.
        bits: 3 to 8.

    Returns:
        QParams of shape [..., tokens, 1].
    """
    x = x.float()
    return _grid(x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0), bits)


def dynamic_group_quantize(x: Tensor, bits: int, group_length: int) -> tuple[Tensor, Tensor]:
    """Rounds each group of a token on a grid over its own range.

    Args:
        x: [..., tokens, channels]; empty tokens are allowed.
        bits: 3 to 8.
        group_length: channels of a full group; the last one may be short.

    Returns:
        q - zero_point, float32 [..., tokens, channels], and scales, float32 [..., tokens, groups].
    """
    grouped = split_groups(x, group_length)
    qparams = dynamic_token_qparams(grouped, bits)
    shifted = shift_quantize(grouped, qparams).flatten(-2)[..., : x.shape[-1]]
    return shifted, qparams.scale.squeeze(-1)


def _grid(low: Tensor, high: Tensor, bits: int) -> QParams:
    scale = _divide(high - low, 2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return QParams(scale, torch.round(-low / scale).clamp(0, 2**bits - 1).to(torch.int32), bits)


def _divide(values: Tensor, number: int) -> Tensor:
    """Rounded to nearest; CUDA multiplies by the reciprocal of what is no CUDA tensor."""
    return values / values.new_full((), number)


def grid_bounds(qparams: QParams) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest value of a grid, float32 of the scale's shape."""
    zero_point = qparams.zero_point.float()
    return -zero_point * qparams.scale, (2**qparams.bits - 1 - zero_point) * qparams.scale


def shift_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Returns q - zero_point as float32, of the shape of `x`: factors of the integer product."""
    zero_point = qparams.zero_point.to(torch.float32)
    # clamp(r + z, 0, top) - z == clamp(r, -z, top - z): the same integers, one pass fewer
    return (
        torch.div(x.float(), qparams.scale)
        .round_()
        .clamp_(-zero_point, 2**qparams.bits - 1 - zero_point)
    )


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Returns integers 0 ... 2^bits - 1 as uint8, of the shape of `x`."""
    return (shift_quantize(x, qparams) + qparams.zero_point).to(torch.uint8)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Returns scale * (q - zero_point) in float32, of the shape of `q`."""
    return (q.to(torch.float32) - qparams.zero_point) * qparams.scale


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Returns the nearest points of the grid, in float32: dequantize(quantize(x))."""
    return shift_quantize(x, qparams) * qparams.scale


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers of one weight and the grids of its groups.

    Attributes:
        values: uint8 [O, I], 0 ... 2^bits - 1.
        scale: bfloat16 [O, G], > 0.
        zero_point: uint8 [O, G]; 2^(bits - 1) everywhere for a symmetric scheme.
        group_length: L.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    group_length: int

    def dequantize(self) -> Tensor:
        """Returns scale * (value - zero_point), float32 [O, I]."""
        scale, zero_point = (
            group_expand(part, self.group_length, self.values.shape[1]).to(torch.float32)
            for part in (self.scale, self.zero_point)
        )
        return (self.values.to(torch.float32) - zero_point) * scale


def quantize_weight(
    weight: Tensor, scheme: QuantScheme, clip: Tensor | None = None
) -> QuantizedWeight:
    """Rounds a weight to nearest, on the grids per group that have the lowest L_2.4 error.

    Args:
        weight: [O, I], times the input scale where the input is quantized per channel.
        scheme: gives weight_bits, group_size and symmetric.
        clip: [O, G], factors on the groups' ranges to use instead of the best ones.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight {not_finite(weight.dtype)}")
    length = weight.shape[1]
    values = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grids = []
    step = _rows_at_once(weight)
    for begin in range(0, max(1, len(weight)), step):
        rows = slice(begin, begin + step)
        grouped = grouped_weight(weight[rows].float(), scheme)
        grid = _best_grid(grouped, scheme, None if clip is None else clip[rows])
        rounded = _round(grouped, *grid, scheme.weight_bits)
        values[rows] = rounded.flatten(1)[:, :length].to(torch.uint8)
        grids.append(grid)
    scale, zero = (torch.cat(parts) for parts in zip(*grids, strict=True))
    return QuantizedWeight(values, scale, zero.to(torch.uint8), scheme.group_length(length))


def _rows_at_once(weight: Tensor) -> int:
    """As many as a processor's caches hold with all that is computed of them."""
    if weight.device.type != "cpu":
        return max(1, len(weight))
    return max(1, _CACHED * torch.get_num_threads() // max(1, weight.shape[1]))


def _best_grid(grouped: Tensor, scheme: QuantScheme, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and zero points [O, G]: of `clip`, or of the first factor with the lowest error."""
    low, high = _range(grouped)
    if clip is not None:
        return _weight_grid(low * clip, high * clip, scheme)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low, dtype=torch.bfloat16), torch.zeros_like(low)
    for factor in CLIPS:
        tried_scale, tried_zero = _weight_grid(low * factor, high * factor, scheme)
        error = _round(grouped, tried_scale, tried_zero, scheme.weight_bits)
        error.sub_(tried_zero.unsqueeze(-1)).mul_(tried_scale.float().unsqueeze(-1))
        sums = error.sub_(grouped).abs_().pow_(_NORM).sum(-1)
        better = sums < best
        best = torch.where(better, sums, best)
        scale = torch.where(better, tried_scale, scale)
        zero = torch.where(better, tried_zero, zero)
    return scale, zero


def chosen_clip(weight: Tensor, quantized: QuantizedWeight, scheme: QuantScheme) -> Tensor:
    """Finds the factors on the groups' ranges that made `quantized` of `weight`, float32 [O, G]."""
    full, _ = _weight_grid(*_range(grouped_weight(weight.float(), scheme)), scheme)
    tried = torch.tensor(CLIPS, dtype=torch.float32, device=weight.device)
    return tried[((quantized.scale.float() / full.float()).unsqueeze(-1) - tried).abs().argmin(-1)]


def grouped_weight(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Splits rows into groups, [O, I] -> [O, G, L], as `split_groups`."""
    return split_groups(weight, scheme.group_length(weight.shape[1]))


def split_groups(x: Tensor, group_length: int) -> Tensor:
    """[..., I] -> [..., G, L]; zeros, always exact and in every range, fill the last group."""
    groups = -(-x.shape[-1] // group_length)
    filled = torch.nn.functional.pad(x, (0, groups * group_length - x.shape[-1]))
    return filled.unflatten(-1, (groups, group_length))


def group_expand(per_group: Tensor, group_length: int, in_features: int) -> Tensor:
    """Repeats values of groups, [..., G] -> [..., I]: input k is in group k // group_length."""
    return per_group.repeat_interleave(group_length, dim=-1)[..., :in_features]


def not_finite(dtype: torch.dtype) -> str:
    """Says what is wrong with a weight of that dtype that is not finite, for messages."""
    wider = ", or load it in a wider dtype than float16," if dtype == torch.float16 else ""
    return f"holds NaN or infinity: repair the checkpoint{wider} before quantizing it."


def _range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def _weight_grid(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """bfloat16 scales and float32 zero points (whole numbers), both [O, G]."""
    top, half = 2**scheme.weight_bits - 1, 2 ** (scheme.weight_bits - 1)
    # symmetric levels are -half ... half - 1: the positive side has one less
    scale = (
        torch.maximum(-low / half, _divide(high, half - 1))
        if scheme.symmetric
        else _divide(high - low, top)
    ).to(torch.bfloat16)
    # below the smallest normal float a scale is 0 or imprecise, and such a group all but zero
    scale = torch.where(scale >= torch.finfo(torch.bfloat16).tiny, scale, torch.ones_like(scale))
    if scheme.symmetric:
        return scale, torch.full_like(low, half)
    return scale, torch.round(-low / scale.float()).clamp_(0, top)


def _round(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest integers 0 ... 2^bits - 1 as float32 [O, G, L]."""
    ratio = torch.div(grouped, scale.float().unsqueeze(-1)).round_()
    return ratio.add_(zero.unsqueeze(-1)).clamp_(0, 2**bits - 1)
