"""Sites under trial: the forward pass that a site's modules would have under each candidate, in floating point.

Used while searching only; what is saved and run afterwards is integers. "channel" is simulated as
it will run, with the input scale folded into the weight before the weight is rounded
(docs/format.md).

A `TrialSite` is installed into its nn.Linear modules by `installed`; setting `active` chooses the
candidate.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.grids import (
    QParams,
    QuantizedWeight,
    choose_qparams,
    dynamic_token_qparams,
    grid_bounds,
    quantize_weight,
    shift_quantize,
)
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import Site

__all__ = ["InstallableSite", "LearnedRanges", "TrialSite", "installed", "site_input"]


class InstallableSite(Protocol):
    """What `installed` puts in the place of linear modules."""

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """The modules."""

    def forward(self, index: int, x: Tensor) -> Tensor:
        """What module `index` returns for x."""


@dataclass(frozen=True)
class LearnedRanges:
    """Factors on the ranges of a site that an optimisation found (vision_encoder.py).

    Attributes:
        start: the candidate that they apply to.
        activations: float32, factors on the lower and the upper bound of its activation grid, of
            the grid's shape; None without a grid.
        weights: per module float32 [O, G], factors on the groups' ranges of W'.
    """

    start: RangeCandidate
    activations: tuple[Tensor, ...] | None
    weights: tuple[Tensor, ...]


class TrialSite:
    """One site, its candidates, and the candidate that its modules run with.

    Attributes:
        site: the names.
        candidates: what may be chosen.
        qparams: the activation grid of each candidate (None: found at run time, or floating point),
            as tried or final.
        active: index of the candidate in force, or None for full precision.
    """

    def __init__(
        self,
        site: Site,
        linears: Sequence[nn.Linear],
        candidates: Sequence[RangeCandidate],
        qparams: Sequence[QParams | None],
        schemes: Sequence[QuantScheme],
        final_qparams: Sequence[QParams | None] | None = None,
    ) -> None:
        self.site, self.linears = site, tuple(linears)
        self.candidates, self.qparams, self.schemes = (
            tuple(candidates),
            tuple(qparams),
            tuple(schemes),
        )
        self._final_qparams = self.qparams if final_qparams is None else tuple(final_qparams)
        self.active: int | None = None
        self._weights: dict[int, tuple[Tensor, ...]] = {}
        self._clips: dict[int, tuple[Tensor, ...]] = {}
        self._settled: tuple[QuantizedWeight, ...] | None = None
        self._input: tuple[Tensor, int, Tensor, Tensor | None] | None = None

    @property
    def chosen(self) -> RangeCandidate:
        """The candidate in force."""
        return self.candidates[self.choice]

    @property
    def scheme(self) -> QuantScheme:
        """The scheme of its modules under the candidate in force."""
        return self.schemes[self.choice]

    @property
    def input_qparams(self) -> QParams | None:
        """The activation grid in force as it is stored: [in] for "channel", [positions] for "token", else None."""
        qparams = self.qparams[self.choice]
        return (
            None
            if qparams is None
            else QParams(qparams.scale.flatten(), qparams.zero_point.flatten(), qparams.bits)
        )

    def quantized_weights(self) -> tuple[QuantizedWeight, ...]:
        """The integers of every module under the candidate in force: those set, or the folded weight rounded to nearest."""
        return self._settled or self._rounded(self.choice)

    def set_weights(self, weights: Sequence[QuantizedWeight]) -> None:
        """Gives every module other integers under the candidate in force, which thereby is final."""
        self._settled = tuple(weights)
        self._weights = {
            self.choice: tuple(
                weight.dequantize().to(self.linears[0].weight.dtype) for weight in weights
            )
        }

    def folded_weight(self, index: int) -> Tensor:
        """W', float32 [out, in], of a module under the candidate in force: W diag(input scale) for "channel", else W."""
        return self._folded(self.linears[index], self.choice)

    def multiplied_input(self, x: Tensor) -> Tensor:
        """What W' is multiplied by, float32 of x's shape: the integers of the input, times the token's scale where there is one."""
        a, row_scale = self._quantize_input(x, self.choice)
        return a.float() if row_scale is None else a * row_scale

    def add_learned(self, learned: LearnedRanges) -> None:
        """Adds a candidate, as the last one and in force: that of `learned.start` with its ranges scaled."""
        start = self.candidates.index(learned.start)
        self.active = len(self.candidates)
        self.candidates += (replace(learned.start, learned=True),)
        self.schemes += (self.schemes[start],)
        self._final_qparams += (_scaled(self._final_qparams[start], learned),)
        self.qparams += (_scaled(self.qparams[start], learned),)
        self._clips[self.active] = learned.weights

    def take_final_ranges(self) -> None:
        """Replaces the grids that were tried by those of all samples."""
        if self.qparams is not self._final_qparams:
            self.qparams, self._weights, self._input = self._final_qparams, {}, None

    def settle(self) -> None:
        """Forgets the other candidates' weights."""
        self._weights = {i: weights for i, weights in self._weights.items() if i == self.choice}
        self._input = None

    def forward(self, index: int, x: Tensor) -> Tensor:
        """What module `index` of the site returns for x [..., in]: [..., out] in x's dtype."""
        linear = self.linears[index]
        if self.active is None:
            return functional.linear(x, linear.weight, linear.bias)
        a, row_scale = self._quantize_input(x, self.active)
        weight = self._dequantized(self.active)[index]
        y = functional.linear(a.to(weight.dtype), weight)
        if row_scale is not None:
            y = y * row_scale.to(y.dtype)
        if linear.bias is not None:
            y = y + linear.bias.to(y.dtype)
        return y.to(x.dtype)

    @property
    def choice(self) -> int:
        """`active`, which must be set."""
        if self.active is None:
            raise ValueError(
                f"{self.site.name} has no candidate in force: initialise and search it first."
            )
        return self.active

    def _quantize_input(self, x: Tensor, choice: int) -> tuple[Tensor, Tensor | None]:
        """a and r of docs/format.md; computed once for the modules that share x."""
        if self._input is not None and self._input[0] is x and self._input[1] == choice:
            return self._input[2], self._input[3]
        bits, granularity, qparams = (
            self.schemes[choice].activation_bits,
            self.candidates[choice].granularity,
            self.qparams[choice],
        )
        source, x = x, site_input(self.site, x)
        if granularity == "none":
            a, row_scale = x, None
        elif granularity == "dynamic_token":
            grid = dynamic_token_qparams(x, bits)
            a, row_scale = shift_quantize(x, grid), grid.scale
        else:
            grid = _calibrated(qparams, self.site)
            a, row_scale = shift_quantize(x, grid), grid.scale if granularity == "token" else None
        self._input = (source, choice, a, row_scale)
        return a, row_scale

    def _folded(self, linear: nn.Linear, choice: int) -> Tensor:
        weight = site_input(
            self.site, linear.weight.detach().float()
        )  # W x = (W H) (H x): the transform is symmetric and its own inverse
        return (
            weight * _calibrated(self.qparams[choice], self.site).scale
            if self.candidates[choice].granularity == "channel"
            else weight
        )

    def _rounded(self, choice: int) -> tuple[QuantizedWeight, ...]:
        clips = self._clips.get(choice, (None,) * len(self.linears))
        pairs = zip(self.linears, clips, strict=True)
        return tuple(
            quantize_weight(self._folded(linear, choice), self.schemes[choice], clip)
            for linear, clip in pairs
        )

    def _dequantized(self, choice: int) -> tuple[Tensor, ...]:
        if choice not in self._weights:
            dtype = self.linears[0].weight.dtype
            self._weights[choice] = tuple(
                weight.dequantize().to(dtype) for weight in self._rounded(choice)
            )
        return self._weights[choice]


def site_input(site: Site, x: Tensor) -> Tensor:
    """The values that are quantized: x [..., in], or its Hadamard transform where the site has one (then float32)."""
    return x if site.hadamard is None else block_hadamard(x.float(), site.hadamard)


@contextmanager
def installed(sites: Iterable[InstallableSite]) -> Iterator[None]:
    """The modules of `sites` run through them inside the context, and as before afterwards."""
    changed: list[nn.Linear] = []
    try:
        for site in sites:
            for index, linear in enumerate(site.linears):
                linear.forward = _bound(site, index)  # type: ignore[method-assign,assignment]
                changed.append(linear)
        yield
    finally:
        for linear in changed:
            del linear.forward


def _bound(site: InstallableSite, index: int) -> Callable[[Tensor], Tensor]:
    return lambda x: site.forward(index, x)


def _scaled(qparams: QParams | None, learned: LearnedRanges) -> QParams | None:
    if qparams is None or learned.activations is None:
        return qparams
    low, high = (
        bound * factor
        for bound, factor in zip(grid_bounds(qparams), learned.activations, strict=True)
    )
    return choose_qparams(low, high, qparams.bits)


def _calibrated(qparams: QParams | None, site: Site) -> QParams:
    if qparams is None:
        raise ValueError(f"{site.name} has no calibrated range.")
    return qparams
