"""Weights to integers: per-group ranges chosen by lowest L_p error, rounding to nearest, and back.

Legend: O out_features, I in_features, L group length, G = ceil(I / L) groups; the last group may be
short. Scales are rounded to bfloat16 BEFORE the integers are chosen, because that is what is
stored. The caller folds a static per-channel input scale into the columns first (W' = W diag(s),
docs/format.md), so that rounding sees the error that counts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm_hf.format.scheme import QuantScheme

__all__ = [
    "QuantizedWeight",
    "chosen_clip",
    "group_expand",
    "grouped_weight",
    "not_finite",
    "quantize_weight",
]

# Factors on a group's min-max range that are tried.
_SHRINK = tuple(1.0 - 0.04 * step for step in range(11))
_NORM = 2.4  # the exponent p of the L_p error that chooses a range: larger errors count more than in squares


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers of one weight and what turns them back.

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
        """float32 [O, I]: scale * (value - zero_point)."""
        length = self.values.shape[1]
        shifted = self.values.to(torch.float32) - group_expand(
            self.zero_point, self.group_length, length
        ).to(torch.float32)
        return shifted * group_expand(self.scale, self.group_length, length).to(torch.float32)


def group_expand(per_group: Tensor, group_length: int, in_features: int) -> Tensor:
    """[O, G] -> [O, I]: input k gets the value of group k // group_length."""
    return per_group.repeat_interleave(group_length, dim=1)[:, :in_features]


def not_finite(dtype: torch.dtype) -> str:
    """What is wrong with a weight of that dtype that is not finite, for messages."""
    wider = ", or load it in a wider dtype than float16," if dtype == torch.float16 else ""
    return f"holds NaN or infinity: repair the checkpoint{wider} before quantizing it."


def quantize_weight(
    weight: Tensor, scheme: QuantScheme, clip: Tensor | None = None
) -> QuantizedWeight:
    """Rounds a weight to nearest on per-group grids whose ranges have the lowest L_2.4 error.

    Args:
        weight: [O, I], already multiplied by the input scale where the input is quantized per
            channel.
        scheme: gives weight_bits, group_size and symmetric.
        clip: [O, G], factors on the groups' ranges that are used instead of those of the lowest
            error.

    Returns:
        The integers and their parameters.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight {not_finite(weight.dtype)}")
    grouped = grouped_weight(weight.float(), scheme)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low, dtype=torch.bfloat16), torch.zeros_like(low)
    for shrink in _SHRINK if clip is None else (clip,):
        scale, zero = _range_to_grid(low * shrink, high * shrink, scheme)
        error = (
            (
                _round(grouped, scale, zero, scheme.weight_bits)
                .sub_(zero.unsqueeze(-1))
                .mul_(scale.float().unsqueeze(-1))
                - grouped
            )
            .abs_()
            .pow_(_NORM)
            .sum(-1)
        )
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = (
            torch.where(better, scale, best_scale),
            torch.where(better, zero, best_zero),
        )
    values = _round(grouped, best_scale, best_zero, scheme.weight_bits).flatten(1)[
        :, : weight.shape[1]
    ]
    return QuantizedWeight(
        values.to(torch.uint8).contiguous(),
        best_scale,
        best_zero.to(torch.uint8),
        scheme.group_length(weight.shape[1]),
    )


def chosen_clip(weight: Tensor, quantized: QuantizedWeight, scheme: QuantScheme) -> Tensor:
    """The factors on the groups' ranges, float32 [O, G], with which `quantize_weight` made `quantized` of `weight`."""
    grouped = grouped_weight(weight.float(), scheme)
    full, _ = _range_to_grid(grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), scheme)
    tried = torch.tensor(_SHRINK, device=weight.device)
    return tried[((quantized.scale.float() / full.float()).unsqueeze(-1) - tried).abs().argmin(-1)]


def grouped_weight(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """[O, I] -> [O, G, L], the last group filled with zeros: 0 is in every range and always exact, so they change nothing."""
    length, groups = scheme.group_length(weight.shape[1]), scheme.groups(weight.shape[1])
    return torch.nn.functional.pad(weight, (0, groups * length - weight.shape[1])).unflatten(
        1, (groups, length)
    )


def _range_to_grid(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """bfloat16 scales and float32 zero points (whole numbers), both [O, G]."""
    top = 2**scheme.weight_bits - 1
    half = 2 ** (scheme.weight_bits - 1)
    # levels -half ... half-1 when symmetric: the positive side has one level less
    scale = (
        torch.maximum(-low / half, high / (half - 1)) if scheme.symmetric else (high - low) / top
    )
    scale = scale.to(torch.bfloat16)
    # below the smallest normal float a scale would be 0 or lose its precision; such a group is all
    # but zero
    scale = torch.where(scale >= torch.finfo(torch.bfloat16).tiny, scale, torch.ones_like(scale))
    zero = (
        torch.full_like(low, half)
        if scheme.symmetric
        else torch.round(-low / scale.float()).clamp_(0, top)
    )
    return scale, zero


def _round(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest integers 0 ... 2^bits - 1 as float32 [O, G, L]."""
    return (
        torch.div(grouped, scale.float().unsqueeze(-1))
        .round_()
        .add_(zero.unsqueeze(-1))
        .clamp_(0, 2**bits - 1)
    )
