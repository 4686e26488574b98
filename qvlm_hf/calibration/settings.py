"""What a calibration does: the options with the bits of a scheme, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qvlm_hf.calibration.options import Options, Rule, VisionOptimization, check_fields, option
from qvlm_hf.format.scheme import (
    ACTIVATION_BITS,
    GRANULARITIES,
    QuantScheme,
    is_per_position,
    is_static,
)
from qvlm_hf.models.graph import Selection

__all__ = ["COMPONENTS", "CalibrationSettings", "Precision", "RangeCandidate"]

COMPONENTS = ("vision", "projector", "language")
# Bits up to which a site can break, up to which inputs start per channel (that survives outliers at
# 4 bits), and of inputs for which a rotation pays, with the searched ranges of the demo model.
_GUARDED_BITS, _CHANNEL_BITS, _ROTATED_BITS = 4, 5, (7, 8)


@dataclass(frozen=True, kw_only=True)
class RangeCandidate:
    """One way to set a site's activation range: a value that the search may choose.

    Attributes:
        granularity: as in `QuantScheme`.
        percentile: p; the range is [quantile(1-p), quantile(p)] of the calibration values (1.0: all
            of them). Static only.
        margin: factor on that range, for values that calibration did not reach. Static only.
        learned: whether search/vision_encoder.py scaled the range.
    """

    granularity: str
    percentile: float = 1.0
    margin: float = 1.0
    learned: bool = False

    @property
    def static(self) -> bool:
        """Whether the range is found by calibration and stored, rather than found at run time."""
        return is_static(self.granularity)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bits of a site's weights and of its input (16: floating point)."""

    weight_bits: int
    activation_bits: int


@dataclass(kw_only=True)
class CalibrationSettings(Options):
    """What a calibration does: `Options` with the bits of a scheme, checked together.

    Raises:
        ValueError: at construction, with the value, the rule and the remedy.
    """

    weight_bits: int = 4
    activation_bits: int = option(
        4,
        Rule(
            "an integer from 3 to 8, or 16 for floating point",
            lambda v: type(v) is int and v in ACTIVATION_BITS,
        ),
        "bits of an input value.",
    )

    def __post_init__(self) -> None:
        self.optimize_vision = VisionOptimization.read(self.optimize_vision)
        if self.modules_to_not_convert is None:
            self.modules_to_not_convert = ()
        if self.recipe is None:
            self.recipe = "fixed"  # so in earlier files
        check_fields(self)
        self._check_granularity()
        self.module_scheme(self.start_granularity("language"))  # bits, group size and symmetry
        if self.seed >= 2**63:  # what PyTorch's generators take
            raise ValueError(f"seed={self.seed} must be below 2**63.")
        if self.recipe == "fixed" and self.rotations(rotatable=True)[0] is None:
            self.rotation = None

    @property
    def needs_data(self) -> bool:
        """Whether an activation range is static or open to search.

        Otherwise weights can be rounded one by one.
        """
        data_free = (("none",), ("dynamic_token",), ("dynamic_group",))
        return any(self.granularities(component) not in data_free for component in COMPONENTS)

    @property
    def guards(self) -> bool:
        """Whether the guard looks for sites that the scheme's bits would break."""
        return self.guard and min(self.weight_bits, self.activation_bits) <= _GUARDED_BITS

    @property
    def measures_sites(self) -> bool:
        """Whether every site is quantized alone, to see how much the answers change."""
        return self.guards or self.precision_budget is not None

    @property
    def entropy_levels(self) -> int:
        """M of eq. 4: 2^activation_bits, or 256 where activations stay in floating point."""
        return 256 if self.activation_bits == 16 else 2**self.activation_bits

    @property
    def selection(self) -> Selection:
        """What of a model is quantized."""
        return Selection(self.quantize_vision, self.quantize_projector, self.modules_to_not_convert)

    @property
    def precision(self) -> Precision:
        """What a site gets unless guard or budget say otherwise."""
        return Precision(weight_bits=self.weight_bits, activation_bits=self.activation_bits)

    def granularities(self, component: str) -> tuple[str, ...]:
        """The granularities that the search may give a site, the starting one first."""
        if self.activation_bits == 16:
            return ("none",)
        asked = self.activation_granularity
        fixed = asked.get(component) if isinstance(asked, Mapping) else asked
        if fixed is not None:
            return (fixed,)
        both = ("channel", "dynamic_token")
        return both if self.activation_bits <= _CHANNEL_BITS else both[::-1]

    def start_granularity(self, component: str) -> str:
        """Where the search of a site of `component` starts."""
        return self.granularities(component)[0]

    def candidates(self, component: str) -> tuple[RangeCandidate, ...]:
        """Every range candidate of a site: the starting granularity first, wide ranges first."""
        candidates: list[RangeCandidate] = []
        for granularity in self.granularities(component):
            if not is_static(granularity):
                candidates.append(RangeCandidate(granularity=granularity))
                continue
            margins, percentiles = sorted(self.margins)[::-1], sorted(self.percentiles)[::-1]
            candidates += [RangeCandidate(granularity=granularity, margin=m) for m in margins]
            candidates += [
                RangeCandidate(granularity=granularity, percentile=p) for p in percentiles
            ]
        return tuple(candidates)

    def module_scheme(
        self, granularity: str, hadamard: int | None = None, precision: Precision | None = None
    ) -> QuantScheme:
        """The scheme of a module; `hadamard` is the block of its input's transform."""
        precision = precision or self.precision
        return QuantScheme(
            weight_bits=precision.weight_bits,
            activation_bits=precision.activation_bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            granularity=granularity,
            hadamard=hadamard,
        )

    def head_scheme(self) -> QuantScheme | None:
        """The scheme of the output head, whose inputs get 8 bits or stay floating; None: none."""
        if self.lm_head_bits is None:
            return None
        floating = self.activation_bits == 16
        precision = Precision(weight_bits=self.lm_head_bits, activation_bits=16 if floating else 8)
        return self.module_scheme("none" if floating else "dynamic_token", None, precision)

    def rotations(self, *, rotatable: bool) -> tuple[str | None, ...]:
        """The values that `rotation` leaves open, the one that is likely best first.

        That is what `recipe="fixed"` takes (docs/results.md).
        """
        if self.rotation != "auto":
            return (self.rotation,)
        if not rotatable:
            return (None,)
        pays = self.activation_bits in _ROTATED_BITS and self.needs_data
        return ("hadamard", None) if pays else (None, "hadamard")

    def for_model(self, *, rotatable: bool) -> "CalibrationSettings":
        """The settings with the first of `rotations`: "auto" without a comparison."""
        return replace(self, rotation=self.rotations(rotatable=rotatable)[0])

    def _check_granularity(self) -> None:
        asked = self.activation_granularity
        if asked is None:
            return
        chosen = asked if isinstance(asked, Mapping) else dict.fromkeys(COMPONENTS, asked)
        if unknown := sorted(set(chosen) - set(COMPONENTS)):
            raise ValueError(
                f"activation_granularity={chosen} names the components {unknown}: use "
                f"{', '.join(COMPONENTS)}."
            )
        *known, last = (name for name in GRANULARITIES if name != "none")
        for component, granularity in chosen.items():
            if granularity not in (*known, last):
                raise ValueError(
                    f"activation_granularity={granularity!r} for {component} must be "
                    f"{', '.join(map(repr, known))} or {last!r}."
                )
            if granularity == "dynamic_group" and self.group_size == -1:
                raise ValueError(
                    "activation_granularity='dynamic_group' needs groups, and group_size=-1 is the "
                    "whole row: give group_size=128, or take 'dynamic_token'."
                )
            if is_per_position(granularity) and component == "language":
                raise ValueError(
                    "activation_granularity='token' needs a fixed number of positions: give it per "
                    "component, {'vision': 'token'}."
                )
        if self.activation_bits == 16:
            raise ValueError(
                f"activation_granularity={asked!r} has no meaning for 16-bit (floating point) "
                f"activations: leave it out."
            )
