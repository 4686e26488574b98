"""Quantized sites: the forward pass that a site's modules have under each candidate.

Used while searching only, in floating point; the result is saved and run as integers. "channel" is
simulated as it will run: the input scale is folded into the weight before the weight is rounded
(docs/format.md). `installed` puts sites into their nn.Linear modules; `active` is the candidate in
force.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from qvlm_hf.calibration.backward import running
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.record.coded import codable
from qvlm_hf.calibration.run import LearnedRanges
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.grids import (
    QParams,
    QuantizedWeight,
    choose_qparams,
    chosen_clip,
    dynamic_group_quantize,
    dynamic_token_qparams,
    grid_bounds,
    group_expand,
    quantize_weight,
    shift_quantize,
)
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.scheme import QuantScheme, is_per_channel, is_per_position, unknown_granularity
from qvlm_hf.models.graph import Site

__all__ = [
    "ExpertsSite",
    "InstallableSite",
    "QuantizedSite",
    "SiteCandidate",
    "installed",
    "join_parts",
    "site_input",
]


class InstallableSite(Protocol):
    """Takes the place of a site's linear modules, see `installed`."""

    linears: tuple[nn.Linear, ...]

    def forward(self, index: int, x: Tensor) -> Tensor:
        """The output of module `index` for x."""


@codable
@dataclass(frozen=True)
class SiteCandidate:
    """One way to quantize a site.

    Attributes:
        range: how its activation range is set.
        scheme: of its modules.
        grid: the activation grid in use; None: found at run time, or floating point.
        final_grid: the same grid taken from all calibration samples.
        clips: per module float32 [O, G], factors on the weight groups' ranges; None: the L_p search
            chooses them.
    """

    range: RangeCandidate
    scheme: QuantScheme
    grid: QParams | None = None
    final_grid: QParams | None = None
    clips: tuple[Tensor, ...] | None = None


class QuantizedSite:
    """One site, its candidates, and the candidate that its modules run with.

    Attributes:
        site: the names.
        linears: the modules.
        candidates: the choices.
        active: index of the candidate in force, or None for full precision.
        tokens: that an expert saw; None of others.
        few_tokens: whether these are too few for ranges or rounding of its own.
    """

    active: int | None = None
    tokens: int | None = None
    few_tokens = False

    def __init__(
        self, site: Site, linears: Sequence[nn.Linear], candidates: Sequence[SiteCandidate]
    ) -> None:
        self.site, self.linears, self.candidates = site, tuple(linears), list(candidates)
        self._weights: dict[int, tuple[Tensor, ...]] = {}  # dequantized, by candidate
        self._clips: dict[str, tuple[Tensor, ...]] = {}  # of tried candidates, by granularity
        self._final: tuple[QuantizedWeight, ...] | None = None
        self._input: tuple[Tensor, int, Tensor, Tensor | None] | None = None

    @property
    def parts(self) -> tuple["QuantizedSite", ...]:
        """What has one input: itself, or one an expert."""
        return (self,)

    @property
    def choice(self) -> int:
        """`active`, which must be set."""
        if self.active is None:
            raise ValueError(
                f"{self.site.name} has no candidate in force: initialise and search it first."
            )
        return self.active

    @property
    def chosen(self) -> SiteCandidate:
        """The candidate in force."""
        return self.candidates[self.choice]

    @property
    def scheme(self) -> QuantScheme:
        """The scheme of its modules under the candidate in force."""
        return self.chosen.scheme

    @property
    def input_qparams(self) -> QParams | None:
        """The activation grid as it is stored: [in] for "channel", [positions] for "token"."""
        grid = self.chosen.grid
        if grid is None:
            return None
        return QParams(grid.scale.flatten(), grid.zero_point.flatten(), grid.bits)

    def quantized_weights(self) -> tuple[QuantizedWeight, ...]:
        """Every module's integers: those set, or the folded weight rounded to nearest."""
        return self._final or self._rounded(self.choice)

    def set_weights(self, weights: Sequence[QuantizedWeight]) -> None:
        """Gives every module other integers; the candidate in force thereby is final."""
        self._final = tuple(weights)
        self._weights = {self.choice: self._dequantize(weights)}

    def folded_weight(self, index: int) -> Tensor:
        """W', float32 [out, in], of a module: W diag(input scale) for "channel", else W."""
        return self._folded(self.linears[index], self.choice)

    def multiplied_input(self, x: Tensor) -> Tensor:
        """The factor of W': the integers of x, times the scales of the token if it has any."""
        a, row_scale = self._quantize_input(x, self.choice)
        return a.float() if row_scale is None else a * row_scale

    def add_learned(self, learned: LearnedRanges) -> None:
        """Adds a candidate, the last one and in force: `learned.start` with its ranges scaled."""
        start = next(c for c in self.candidates if c.range == learned.start)
        self.active = len(self.candidates)
        self.candidates.append(
            replace(
                start,
                range=replace(start.range, learned=True),
                grid=_scale_grid(start.grid, learned),
                final_grid=_scale_grid(start.final_grid, learned),
                clips=learned.weights,
            )
        )

    def take_final_grids(self) -> None:
        """Replaces the grids that were tried by those of all samples."""
        self.candidates = [replace(c, grid=c.final_grid) for c in self.candidates]
        self._weights, self._clips, self._input = {}, {}, None

    def free_memory(self) -> None:
        """Forgets the integers, which are packed by now; it goes on computing."""
        self._final, self._clips, self._input = None, {}, None

    def forward(self, index: int, x: Tensor) -> Tensor:
        """The output of module `index` for x [..., in]: [..., out] in x's dtype."""
        linear = self.linears[index]
        if self.active is None:
            return functional.linear(x, linear.weight, linear.bias)
        a, row_scale = self._quantize_input(x, self.active)
        weight = self.tried_weights()[index]
        y = functional.linear(a.to(weight.dtype), weight)
        if row_scale is not None:
            y = y * row_scale.to(y.dtype)
        if linear.bias is not None:
            y = y + linear.bias.to(y.dtype)
        return y.to(x.dtype)

    def tried_weights(self) -> tuple[Tensor, ...]:
        """Every module's weight under the candidate in force; it depends on those tried before."""
        if self.choice not in self._weights:
            self._weights[self.choice] = self._dequantize(self._rounded(self.choice, tried=True))
        return self._weights[self.choice]

    def _quantize_input(self, x: Tensor, choice: int) -> tuple[Tensor, Tensor | None]:
        """a and r of docs/format.md; computed once for the modules that share x.

        Of "dynamic_group" a is multiplied by its scales, and r is None.
        """
        if self._input is not None and self._input[0] is x and self._input[1] == choice:
            return self._input[2], self._input[3]
        candidate, values = self.candidates[choice], site_input(self.site, x)
        granularity, row_scale = candidate.range.granularity, None
        if granularity == "none":
            a = values
        elif granularity == "dynamic_group":
            size, scheme = values.shape[-1], candidate.scheme
            length = scheme.group_length(size)
            a, scale = dynamic_group_quantize(values, scheme.activation_bits, length)
            a = a * group_expand(scale, length, size)
        elif granularity == "dynamic_token":
            grid = dynamic_token_qparams(values, candidate.scheme.activation_bits)
            a, row_scale = shift_quantize(values, grid), grid.scale
        elif is_per_channel(granularity):
            a = shift_quantize(values, self._grid(choice))
        elif is_per_position(granularity):
            grid = self._grid(choice)
            a, row_scale = shift_quantize(values, grid), grid.scale
        else:
            raise unknown_granularity(granularity)
        self._input = (x, choice, a, row_scale)
        return a, row_scale

    def _grid(self, choice: int) -> QParams:
        grid = self.candidates[choice].grid
        if grid is None:
            raise ValueError(f"{self.site.name} has no calibrated range.")
        return grid

    def _folded(self, linear: nn.Linear, choice: int) -> Tensor:
        # W x = (W H) (H x): the transform is symmetric and its own inverse
        weight = site_input(self.site, linear.weight.detach().float())
        folds = is_per_channel(self.candidates[choice].range.granularity)
        return weight * self._grid(choice).scale if folds else weight

    def _rounded(self, choice: int, *, tried: bool = False) -> tuple[QuantizedWeight, ...]:
        """Rounds to nearest; what is only tried takes the factors of its granularity's first."""
        candidate = self.candidates[choice]
        folded = [self._folded(linear, choice) for linear in self.linears]
        granularity = candidate.range.granularity
        clips = candidate.clips or (self._clips.get(granularity) if tried else None)
        found = tuple(
            quantize_weight(weight, candidate.scheme, clip)
            for weight, clip in zip(folded, clips or (None,) * len(folded), strict=True)
        )
        if tried and clips is None:
            self._clips[granularity] = tuple(
                chosen_clip(weight, rounded, candidate.scheme)
                for weight, rounded in zip(folded, found, strict=True)
            )
        return found

    def _dequantize(self, weights: Sequence[QuantizedWeight]) -> tuple[Tensor, ...]:
        dtype = self.linears[0].weight.dtype
        return tuple(keep(weight.dequantize().to(dtype)) for weight in weights)


class ExpertsSite(QuantizedSite):
    """The same module of all experts of a layer: one candidate for all, with a range for each.

    Args:
        site: the names.
        parts: the sites of the experts.
    """

    def __init__(self, site: Site, parts: Sequence[QuantizedSite]) -> None:
        self._parts = tuple(parts)
        super().__init__(site, site.linears, parts[0].candidates)

    @property
    def parts(self) -> tuple[QuantizedSite, ...]:
        """The sites of the experts."""
        return self._parts

    @property
    def active(self) -> int | None:
        """As of every part."""
        return self._parts[0].active

    @active.setter
    def active(self, index: int | None) -> None:
        for part in self._parts:
            part.active = index

    def take_final_grids(self) -> None:
        """As of every part."""
        for part in self._parts:
            part.take_final_grids()

    def forward(self, index: int, x: Tensor) -> Tensor:
        """The output of expert `index` for x, the tokens that it gets."""
        return self._parts[index].forward(0, x)


def join_parts(site: Site, parts: Sequence[QuantizedSite]) -> QuantizedSite:
    """The site of these parts: the sites of its experts as one, or the only part."""
    return ExpertsSite(site, parts) if site.experts else parts[0]


def site_input(site: Site, x: Tensor) -> Tensor:
    """The values that are quantized: x [..., in], or its Hadamard transform in float32."""
    return x if site.hadamard is None else block_hadamard(x.float(), site.hadamard)


def installed(sites: Iterable[InstallableSite]) -> AbstractContextManager[None]:
    """Inside, the modules of `sites` run through them; afterwards as before."""
    placed = [(site, *place) for site in sites for place in enumerate(site.linears)]
    return running({linear: partial(site.forward, index) for site, index, linear in placed})


def _scale_grid(grid: QParams | None, learned: LearnedRanges) -> QParams | None:
    if grid is None or learned.activations is None:
        return grid
    bounds = zip(grid_bounds(grid), learned.activations, strict=True)
    low, high = (bound * factor for bound, factor in bounds)
    return choose_qparams(low, high, grid.bits)
