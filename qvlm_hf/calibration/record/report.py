"""The record of a calibration, frozen, to JSON and back (qvlm_report.json, the model card)."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, cast, get_args, get_origin, get_type_hints

from qvlm_hf.calibration.settings import CalibrationSettings, RangeCandidate
from qvlm_hf.format.scheme import QuantScheme

__all__ = [
    "BlockReport",
    "CalibrationReport",
    "DecodeCheck",
    "PrecisionRaise",
    "RecipeTrial",
    "RoutingReport",
    "SegmentReport",
    "SelfCheck",
    "SiteReport",
    "VisionReport",
    "settings_dict",
]


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """One block and its search (eq. 3).

    Attributes:
        layers: names of its layers.
        initial, greedy, joint: squared error of the block output relative to its squared norm: of
            the L_p start, the layer-by-layer search (eq. 2) and the joint search.
        evaluations: layer runs over all calibration batches that the search took.
    """

    layers: tuple[str, ...]
    initial: float
    greedy: float
    joint: float
    evaluations: float


@dataclass(frozen=True, kw_only=True)
class SegmentReport:
    """One segment.

    Attributes:
        component: "vision", "projector" or "language".
        layers: names.
        entropies: D(k, k+1) between live layers in nats (eq. 4).
        threshold: h0 in force.
        blocks: of the partition (eq. 7).
    """

    component: str
    layers: tuple[str, ...]
    entropies: tuple[float, ...]
    threshold: float
    blocks: tuple[BlockReport, ...]


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """The choice for one site: the modules that share it and their activation range."""

    modules: tuple[str, ...]
    candidate: RangeCandidate


@dataclass(frozen=True, kw_only=True)
class PrecisionRaise:
    """A site, by its first module, that the guard gave more bits.

    `before` and `after` are the divergence of the answers (nats) that it caused alone.
    """

    site: str
    weight_bits: int
    activation_bits: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """The experts of one layer.

    Attributes:
        experts: name of their module.
        tokens: of the calibration data that each of them got.
        few_tokens: experts that got too few for ranges and rounding of their own.
    """

    experts: str
    tokens: tuple[int, ...]
    few_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RecipeTrial:
    """A recipe that was compared with others by a quick calibration.

    Attributes:
        fields: of `QVLMConfig` -> value.
        answer_kl: divergence of the answers to samples that the trial did not see, in nats a token.
            It is the geometric mean over samples, mostly far below `SelfCheck.kl`, which is the
            mean over tokens.
        text_kl: the same of text without pictures that the full-precision model wrote.
        keeps_text: whether that is not clearly more than after plain rounding.
    """

    fields: dict[str, Any]
    answer_kl: float
    text_kl: float
    keeps_text: bool = True


@dataclass(frozen=True, kw_only=True)
class VisionReport:
    """The visual encoder optimisation (eq. 8-10).

    Attributes:
        epochs: that ran.
        error_before, error_after: L_err on the held-out batches with the ranges at their start, and
            with the best ones learned.
        kept: whether the learned ranges were used.
        depth_before, depth_after: mean layers per block of the vision encoder, partitioned by the
            entropies of its quantized hidden states; None without vision encoder.
    """

    epochs: int
    error_before: float
    error_after: float
    kept: bool
    depth_before: float | None
    depth_after: float | None


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """The packed model against the full-precision model on a few samples.

    Attributes:
        samples: how many.
        held_out: whether they were not calibrated on; they help to choose a recipe.
        answer_tokens: positions compared.
        agreement: share of positions with the same most likely token.
        kl: mean KL divergence to full precision in nats.
    """

    samples: int
    held_out: bool
    answer_tokens: int
    agreement: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class DecodeCheck:
    """The packed model with a key-value cache against the same model without one.

    Attributes:
        tokens: that were decoded.
        kl: mean KL divergence of their logits in nats, inputs unrounded.
    """

    tokens: int
    kl: float


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """The whole record.

    Attributes:
        settings: every option that shaped the result.
        provenance: where the data came from (counts, hash, seed, versions).
        modules: canonical module name -> scheme: exactly what is quantized.
        segments: entropies and blocks, in execution order; empty where nothing was searched.
        sites: the choices.
        sensitivities: site, by its first module -> KL of the answers (nats) when it alone is
            quantized; empty without guard.
        lifts: sites that the guard gave more bits, worst first.
        routing: tokens that the experts of each layer got; empty without experts or data.
        recipes: that were compared, the one that was taken first; empty without a comparison.
        vision: the visual encoder optimisation; None where it did not run.
        average_weight_bits: over all quantized weights, scales not counted.
        dead: layers whose output reaches nothing: rounded, not searched.
        full_precision: linear modules left alone.
        self_check: None where there was no data to check with.
        decode_check: likewise.
        warnings: one line each.
        seconds: step -> how long it took; reports are equal whatever they say here.
        evaluation: accuracy on a test set, as `qvlm evaluate --record` measured it later; None
            until then.
        benchmark: speed and memory, as `qvlm bench --record` measured them later; None until then.
    """

    settings: dict[str, Any]
    provenance: dict[str, Any]
    modules: dict[str, QuantScheme]
    segments: tuple[SegmentReport, ...] = ()
    sites: tuple[SiteReport, ...] = ()
    sensitivities: dict[str, float] = field(default_factory=dict)
    lifts: tuple[PrecisionRaise, ...] = ()
    routing: tuple[RoutingReport, ...] = ()
    recipes: tuple[RecipeTrial, ...] = ()
    vision: VisionReport | None = None
    average_weight_bits: float | None = None
    dead: tuple[str, ...] = ()
    full_precision: tuple[str, ...] = ()
    self_check: SelfCheck | None = None
    decode_check: DecodeCheck | None = None
    warnings: tuple[str, ...] = field(default=())
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    evaluation: dict[str, Any] | None = None
    benchmark: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` reads it back equal."""
        entry = dataclasses.asdict(self)
        entry["modules"] = {name: scheme.to_dict() for name, scheme in self.modules.items()}
        return _listed(entry)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "CalibrationReport":
        """Reads `to_dict`.

        Raises:
            ValueError: a key is missing or unknown.
        """
        try:
            return _read(cls, entry)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the report does not have the fields of this version ({error}): it is damaged or "
                f"from another version."
            ) from error


def settings_dict(settings: CalibrationSettings) -> dict[str, Any]:
    """Every field of the settings, ready for JSON."""
    return _listed(dataclasses.asdict(settings))


def _read(kind: Any, value: Any) -> Any:
    """A value of JSON as what the annotation `kind` of a field says."""
    origin, inside = get_origin(kind), get_args(kind)
    if NoneType in inside:  # kind | None
        return None if value is None else _read(inside[0], value)
    if origin is tuple:  # tuple[kind, ...]
        return tuple(_read(inside[0], item) for item in _checked(list, value))
    if origin is dict:
        return {name: _read(inside[1], item) for name, item in _checked(dict, value).items()}
    if kind is QuantScheme:
        return QuantScheme.from_dict(value)
    if kind is Any:
        return value
    if not dataclasses.is_dataclass(kind):
        return _checked(kind, value)
    make, hints = cast("Callable[..., Any]", kind), get_type_hints(kind)
    return make(**{name: _read(hints[name], item) for name, item in value.items()})


def _checked(kind: Any, value: Any) -> Any:
    """`value`, which must be of `kind`; a whole number is a float too, and true is no number."""
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _listed(value: Any) -> Any:
    """Tuples to lists, so that a report equals what JSON gives back."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
