"""A quantized site with gradients: rounding passes them on unchanged (straight-through estimator).

The values equal `QuantizedSite.forward` under the candidate in force; only the derivatives differ.

Legend: O out_features, I in_features, G groups of inputs that share a weight scale.
"""

import torch
from torch import Tensor
from torch.nn import functional

from qvlm_hf.calibration.run import LearnedRanges
from qvlm_hf.calibration.search.sites import QuantizedSite, site_input
from qvlm_hf.format.grids import (
    chosen_clip,
    grid_bounds,
    group_expand,
    grouped_weight,
    split_groups,
)
from qvlm_hf.format.scheme import is_per_channel

__all__ = ["StraightThroughSite"]


class StraightThroughSite:
    """A site for `installed`, with ranges to learn or fixed.

    Learned are logarithms of factors on the bounds of the activation grid and on every weight
    group's range. They start at what the site has: 0 for activations, the L_p search's choice for
    weights.

    Args:
        quantized: the site under a candidate.
        learn: whether ranges are learned; otherwise gradients reach the site's input alone.
    """

    def __init__(self, quantized: QuantizedSite, *, learn: bool) -> None:
        self.quantized, self.learn, self.linears = quantized, learn, quantized.linears
        grid, weights = quantized.chosen.grid, quantized.quantized_weights()
        self._bounds = () if grid is None else grid_bounds(grid)
        self._range_logs: tuple[Tensor, ...] = ()
        self._clip_logs: tuple[Tensor, ...] = ()
        self._fixed_weights: tuple[Tensor, ...] = ()
        if learn:
            self._range_logs = tuple(torch.zeros_like(bound) for bound in self._bounds)
            self._clip_logs = tuple(
                chosen_clip(quantized.folded_weight(i), weight, quantized.scheme).log()
                for i, weight in enumerate(weights)
            )
        else:
            self._fixed_weights = tuple(weight.dequantize() for weight in weights)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        """The logarithms that are learned."""
        return [*self._range_logs, *self._clip_logs]

    def learned(self) -> LearnedRanges:
        """The factors as they are now."""
        activations, weights = (
            tuple(log.detach().exp() for log in logs)
            for logs in (self._range_logs, self._clip_logs)
        )
        return LearnedRanges(self.quantized.chosen.range, activations or None, weights)

    def forward(self, index: int, x: Tensor) -> Tensor:
        """The output of module `index` for x [..., I]: [..., O] in x's dtype."""
        linear = self.linears[index]
        a, scale = self._input(site_input(self.quantized.site, x).float())
        weight = self._weight(index, scale) if self.learn else self._fixed_weights[index]
        y = functional.linear(a, weight)
        return (y if linear.bias is None else y + linear.bias.float()).to(x.dtype)

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The factor of the weight, and the scale that is folded into the weight, if one is."""
        granularity = self.quantized.chosen.range.granularity
        top = 2**self.quantized.scheme.activation_bits - 1
        if granularity == "none":
            return x, None
        size = x.shape[-1]
        if granularity == "dynamic_group":
            x = split_groups(x, self.quantized.scheme.group_length(size))
        if not self._bounds:
            low = x.amin(-1, keepdim=True).clamp(max=0)
            high = x.amax(-1, keepdim=True).clamp(min=0)
        elif self.learn:
            pairs = zip(self._bounds, self._range_logs, strict=True)
            low, high = (bound * log.exp() for bound, log in pairs)
        else:
            low, high = self._bounds
        scale = _positive((high - low) / top)
        a = _quantized(x, scale, _round(-low / scale), top)
        if granularity == "dynamic_group":
            return (a * scale).flatten(-2)[..., :size], None
        return (a, scale) if is_per_channel(granularity) else (a * scale, None)

    def _weight(self, index: int, input_scale: Tensor | None) -> Tensor:
        """W' on its grid, float32 [O, I], with `input_scale` folded in."""
        scheme = self.quantized.scheme
        weight = site_input(self.quantized.site, self.linears[index].weight.detach().float())
        if input_scale is not None:
            weight = weight * input_scale
        grouped, clip = grouped_weight(weight, scheme), self._clip_logs[index].exp()
        low, high = grouped.amin(-1).clamp(max=0) * clip, grouped.amax(-1).clamp(min=0) * clip
        half = 2 ** (scheme.weight_bits - 1)
        if scheme.symmetric:
            scale = torch.maximum(-low / half, high / (half - 1))
        else:
            scale = (high - low) / (2 * half - 1)
        # as it is stored
        scale = _positive(_straight_through(scale, scale.to(torch.bfloat16).float()))
        zero_point = torch.full_like(low, half) if scheme.symmetric else _round(-low / scale)
        size = weight.shape[1]
        scale, zero_point = (
            group_expand(part, scheme.group_length(size), size) for part in (scale, zero_point)
        )
        return _quantized(weight, scale, zero_point, 2 * half - 1) * scale


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """clamp(round(x / scale), -zero_point, top - zero_point).

    A clipped value passes its gradient to the bound that clips it.
    """
    return torch.maximum(torch.minimum(_round(x / scale), top - zero_point), -zero_point)


def _round(x: Tensor) -> Tensor:
    return _straight_through(x, x.round())


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of `x`."""
    return x + (rounded - x).detach()


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
