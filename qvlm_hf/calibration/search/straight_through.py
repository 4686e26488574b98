"""A site's quantized forward pass with gradients: rounding passes them on unchanged (the straight-through estimator).

What is computed equals `TrialSite.forward` under the candidate in force; only the derivatives
differ. What an optimiser may move depends on the class: nothing (`FixedSite`) or ranges
(`RangeSite`, for the visual encoder optimisation).

Legend: O out_features, I in_features, G groups of inputs that share a weight scale.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from qvlm_hf.calibration.search.sites import LearnedRanges, TrialSite, site_input
from qvlm_hf.format.grids import chosen_clip, grid_bounds, group_expand, grouped_weight

__all__ = ["FixedSite", "RangeSite", "StraightThroughSite"]


class StraightThroughSite(ABC):
    """One site of either kind. Goes where `simulation.installed` puts it.

    Args:
        trial: the site under a candidate.
    """

    def __init__(self, trial: TrialSite) -> None:
        self._trial, self.linears = trial, trial.linears
        qparams = trial.qparams[trial.choice]
        self._bounds = None if qparams is None else grid_bounds(qparams)

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What can be learned."""

    def forward(self, index: int, x: Tensor) -> Tensor:
        """What module `index` of the site returns for x [..., I]: [..., O] in x's dtype."""
        linear = self.linears[index]
        a, scale = self._input(site_input(self._trial.site, x).float())
        y = functional.linear(a, self._weight(index, scale))
        return (y if linear.bias is None else y + linear.bias.float()).to(x.dtype)

    @abstractmethod
    def _weight(self, index: int, input_scale: Tensor | None) -> Tensor:
        """W' on its grid, float32 [O, I]; `input_scale` is what a grid that can move has to fold."""

    def _range(self) -> tuple[Tensor, ...] | None:
        """Smallest and largest value of the activation grid, or None where a token finds its own."""
        return self._bounds

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the weight is multiplied by, and the scale that is folded into it, if one is."""
        granularity, top = self._trial.chosen.granularity, 2**self._trial.scheme.activation_bits - 1
        if granularity == "none":
            return x, None
        low, high = self._range() or (
            x.amin(-1, keepdim=True).clamp(max=0),
            x.amax(-1, keepdim=True).clamp(min=0),
        )
        scale = _positive((high - low) / top)
        a = _quantized(x, scale, _round(-low / scale), top)
        return (a, scale) if granularity == "channel" else (a * scale, None)


class FixedSite(StraightThroughSite):
    """A site that stays as it is: gradients reach its input alone."""

    def __init__(self, trial: TrialSite) -> None:
        super().__init__(trial)
        self._dequantized = tuple(weight.dequantize() for weight in trial.quantized_weights())

    def parameters(self) -> list[Tensor]:  # noqa: D102 - as the first class
        return []

    def _weight(self, index: int, input_scale: Tensor | None) -> Tensor:  # noqa: ARG002 - folded already
        return self._dequantized[index]


class RangeSite(StraightThroughSite):
    """A site whose ranges can be learned: logarithms of factors on the bounds of the activation grid and on every weight group's range.

    They start at what the site has: 0 for activations, the L_p search's choice for weights.
    """

    def __init__(self, trial: TrialSite) -> None:
        super().__init__(trial)
        self._logs = (
            () if self._bounds is None else tuple(torch.zeros_like(bound) for bound in self._bounds)
        )
        weights = enumerate(trial.quantized_weights())
        self._clips = tuple(
            chosen_clip(trial.folded_weight(i), weight, trial.scheme).log() for i, weight in weights
        )
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self) -> list[Tensor]:  # noqa: D102 - as the first class
        return [*self._logs, *self._clips]

    def learned(self) -> LearnedRanges:
        """The factors as they are now."""
        activations, weights = (
            tuple(log.detach().exp() for log in logs) for logs in (self._logs, self._clips)
        )
        return LearnedRanges(self._trial.chosen, activations or None, weights)

    def _range(self) -> tuple[Tensor, ...] | None:
        return (
            None
            if self._bounds is None
            else tuple(
                bound * log.exp() for bound, log in zip(self._bounds, self._logs, strict=True)
            )
        )

    def _weight(self, index: int, input_scale: Tensor | None) -> Tensor:
        scheme, weight = (
            self._trial.scheme,
            site_input(self._trial.site, self.linears[index].weight.detach().float()),
        )
        if input_scale is not None:
            weight = weight * input_scale
        grouped = grouped_weight(weight, scheme)
        low, high = (
            bound * self._clips[index].exp()
            for bound in (grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0))
        )
        half = 2 ** (scheme.weight_bits - 1)
        scale = (
            torch.maximum(-low / half, high / (half - 1))
            if scheme.symmetric
            else (high - low) / (2 * half - 1)
        )
        scale = _positive(
            _straight_through(scale, scale.to(torch.bfloat16).float())
        )  # what is stored
        zero_point = torch.full_like(low, half) if scheme.symmetric else _round(-low / scale)
        length = scheme.group_length(weight.shape[1])
        scale, zero_point = (
            group_expand(part, length, weight.shape[1]) for part in (scale, zero_point)
        )
        return _quantized(weight, scale, zero_point, 2 * half - 1) * scale


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """clamp(round(x / scale), -zero_point, top - zero_point); a clipped value passes its gradient to the bound that clips it."""
    return torch.maximum(torch.minimum(_round(x / scale), top - zero_point), -zero_point)


def _round(x: Tensor) -> Tensor:
    return _straight_through(x, x.round())


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of `x`."""
    return x + (rounded - x).detach()


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
