"""The options of a calibration, validated once, free of Transformers.

`QVLMConfig` holds one; tests make their own.
"""

import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import Enum
from itertools import islice
from numbers import Integral, Real
from typing import Any

from qvlm_hf.format.scheme import QuantScheme

__all__ = [
    "COMPONENTS",
    "CalibrationSettings",
    "Precision",
    "RangeCandidate",
    "VisionOptimization",
    "shown",
    "to_plain",
    "whole_number",
]

COMPONENTS = ("vision", "projector", "language")
_MAX_ENTRIES = (
    100_000  # of a list that a user gives; a model of 70 B parameters has about 600 linear modules
)
_MAX_DEPTH = 50  # of lists and mappings in each other


def to_plain(name: str, value: object, *, depth: int = 0) -> Any:
    """A value as JSON knows it: None, bool, int, float, str, a tuple of these or a dict by str.

    Scalars and arrays of NumPy and PyTorch, enums, paths, fractions and decimals become what they
    stand for. Sets are sorted, because their order differs between two runs. Iterators are read.

    Args:
        name: of the field, for messages.
        value: anything.
        depth: how many lists and mappings it lies in.

    Raises:
        ValueError: it is, or holds, something else, or itself.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"{name} is nested more than {_MAX_DEPTH} deep, or holds itself: give plain values."
        )
    if isinstance(value, Enum):
        return to_plain(name, value.value, depth=depth + 1)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real | Decimal):
        return _as_float(value)
    if callable(getattr(value, "tolist", None)):  # tensors and arrays, those of one value too
        return to_plain(name, _as_list(name, value), depth=depth + 1)
    if isinstance(value, os.PathLike):
        return to_plain(name, os.fspath(value), depth=depth + 1)
    if isinstance(value, Mapping):
        pairs = value.items()
        return {
            str(to_plain(name, key, depth=depth + 1)): to_plain(name, item, depth=depth + 1)
            for key, item in pairs
        }
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return _as_tuple(name, value, depth + 1)
    raise ValueError(
        f"{name}={shown(value)} is {type(value).__name__}, must be what JSON can hold: a number, "
        f"text, list or mapping."
    )


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a fraction of whole numbers that no float holds
        return math.inf


def _as_list(name: str, value: Any) -> Any:
    try:
        return value.tolist()
    except Exception as error:  # a tensor on "meta", for one
        raise ValueError(f"{name}={shown(value)} cannot be read: give numbers.") from error


def _as_tuple(name: str, values: Iterable[object], depth: int) -> tuple[Any, ...]:
    plain = tuple(to_plain(name, value, depth=depth) for value in islice(values, _MAX_ENTRIES + 1))
    if len(plain) > _MAX_ENTRIES:
        raise ValueError(f"{name} has more than {_MAX_ENTRIES} entries: give fewer.")
    if not isinstance(values, set | frozenset):  # a view of a dict has an order
        return plain
    try:
        return tuple(sorted(plain))
    except TypeError as error:
        raise ValueError(f"{name}={shown(values)} cannot be sorted: give a list.") from error


def shown(value: object) -> str:
    """A value for a message: on one line, cut; its class if it is nested too deep to be written."""
    try:
        return " ".join(repr(value).split())[:80]
    except RecursionError:
        return f"a {type(value).__name__} nested too deep"


def whole_number(name: str, value: object, least: int, remedy: str = "") -> int:
    """An integer of Python, NumPy or PyTorch as a plain one.

    Args:
        name: of the option, for the message.
        value: what was given for it.
        least: the smallest that it may be.
        remedy: what may be given instead, for the message.

    Raises:
        ValueError: it is no integer (True and 2.0 are none), or too small.
    """
    plain = to_plain(name, value)
    if not isinstance(plain, int) or isinstance(plain, bool) or plain < least:
        raise ValueError(
            f"{name}={shown(value)} must be a whole number of at least {least}{remedy}."
        )
    return plain


@dataclass(frozen=True, kw_only=True)
class RangeCandidate:
    """One way to set a site's activation range: a value that the search may choose.

    Attributes:
        granularity: "channel", "token", "dynamic_token" or "none".
        percentile: p; the range is [quantile(1-p), quantile(p)] of the calibration values (1.0: all
            of them). Static only.
        margin: factor on that range, for values that calibration did not reach. Static only.
        learned: whether the visual encoder optimisation scaled the range further
            (vision_encoder.py).
    """

    granularity: str
    percentile: float = 1.0
    margin: float = 1.0
    learned: bool = False

    @property
    def static(self) -> bool:
        """Whether the range is found by calibration (and stored) rather than at run time."""
        return self.granularity in ("channel", "token")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bits of a site's weights and of its input (16: floating point)."""

    weight_bits: int
    activation_bits: int


@dataclass(frozen=True, kw_only=True)
class VisionOptimization:
    """How the ranges of vision encoder and projector are learned (eq. 8-10).

    Attributes:
        epochs: passes over the even calibration batches, at most.
        learning_rate: of Adam, on the logarithms of the factors on ranges; falls linearly to 0.
        entropy_weight: lambda1, of the entropies between the layers of the vision encoder.
        error_weight: lambda2, of the relative errors of hidden states.
        output_weight: eta, share of the language model's last hidden states in that error.

    Raises:
        ValueError: a value is out of range.
    """

    epochs: int = 10
    learning_rate: float = 0.01
    entropy_weight: float = 0.1
    error_weight: float = 1.0
    output_weight: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = to_plain(f"VisionOptimization: {field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if not isinstance(self.epochs, int) or isinstance(self.epochs, bool) or self.epochs < 1:
            raise ValueError(
                f"VisionOptimization: epochs={self.epochs!r} must be an integer of at least 1."
            )
        if not _finite(self.learning_rate) or not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"VisionOptimization: learning_rate={self.learning_rate!r} must be a number above "
                f"0 and up to 1."
            )
        for name in ("entropy_weight", "error_weight", "output_weight"):
            if not _finite(value := getattr(self, name)) or value < 0:
                raise ValueError(
                    f"VisionOptimization: {name}={value!r} must be a number of at least 0."
                )


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """What a calibration does; fields as in the table of `QVLMConfig`.

    Raises:
        ValueError: at construction, with the value, the rule and the remedy.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    activation_granularity: str | Mapping[str, str] | None = None
    quantize_vision: bool = True
    quantize_projector: bool = True
    lm_head_bits: int | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    num_samples: int = 64
    batch_size: int = 8
    seed: int = 0
    max_block_depth: int = 3
    entropy_threshold: float | None = None
    percentiles: tuple[float, ...] = (1.0, 0.9999, 0.9995, 0.999)
    margins: tuple[float, ...] = (1.1, 1.25)
    weight_rounding: str = "gptq"
    rotation: str | None = "auto"
    equalization: bool = True
    token_importance: bool = True
    guard: bool = True
    precision_budget: float | None = None
    optimize_vision: VisionOptimization | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "optimize_vision"):
            object.__setattr__(self, name, to_plain(name, getattr(self, name)))
        for name in ("percentiles", "margins", "modules_to_not_convert"):
            if not isinstance(value := getattr(self, name), tuple):
                raise ValueError(f"{name}={value!r} must be a list.")
        if not isinstance(self.activation_bits, int):
            raise ValueError(
                f"activation_bits={self.activation_bits!r} must be an integer from 3 to 8, or 16 "
                f"for floating point."
            )
        object.__setattr__(self, "optimize_vision", _vision_optimization(self.optimize_vision))
        self._check_granularity()
        self._check_numbers()
        if self.lm_head_bits is not None and (
            self.lm_head_bits != 8 or type(self.lm_head_bits) is not int
        ):
            raise ValueError(
                f"lm_head_bits={self.lm_head_bits!r} must be 8 or None (full precision)."
            )
        if self.weight_rounding not in (
            "nearest",
            "gptq",
            "learned",
        ):  # the last in saved files alone
            raise ValueError(
                f"weight_rounding={self.weight_rounding!r} must be 'nearest' or 'gptq'."
            )
        if self.rotation not in ("auto", None, "hadamard"):
            raise ValueError(f"rotation={self.rotation!r} must be 'hadamard', None or 'auto'.")
        if self.rotation == "auto":
            object.__setattr__(self, "rotation", "hadamard" if self._rotation_pays() else None)
        for name in (
            "quantize_vision",
            "quantize_projector",
            "equalization",
            "token_importance",
            "guard",
            "strict",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        if not all(isinstance(pattern, str) and pattern for pattern in self.modules_to_not_convert):
            raise ValueError(
                f"modules_to_not_convert={self.modules_to_not_convert!r} must be a list of module "
                f"names."
            )

    def _check_numbers(self) -> None:
        self.scheme(self.start_granularity("language"))  # bits, group size and symmetry
        for name, low in (
            ("num_samples", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("max_block_depth", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}={value!r} must be an integer of at least {low}.")
        if self.seed >= 2**63:  # what PyTorch's generators take
            raise ValueError(f"seed={self.seed} must be below 2**63.")
        if self.entropy_threshold is not None and not _finite(self.entropy_threshold):
            raise ValueError(
                f"entropy_threshold={self.entropy_threshold!r} must be a number (in nats) or None "
                f"for the segment's mean."
            )
        if self.precision_budget is not None and not (
            _finite(self.precision_budget) and 2 <= self.precision_budget <= 8
        ):
            raise ValueError(
                f"precision_budget={self.precision_budget!r} must be an average of 2 to 8 bits per "
                f"weight: or leave it out."
            )
        if not self.percentiles or not all(
            _finite(p) and 0.9 <= p <= 1.0 for p in self.percentiles
        ):
            raise ValueError(
                f"percentiles={self.percentiles!r} must be numbers from 0.9 to 1.0, as in (1.0, "
                f"0.9999)."
            )
        if not all(_finite(m) and 1.0 < m <= 2.0 for m in self.margins):
            raise ValueError(
                f"margins={self.margins!r} must be factors above 1.0 and up to 2.0, as in (1.1, "
                f"1.25); () for none."
            )

    @property
    def needs_data(self) -> bool:
        """Whether any activation range is static or open to search; otherwise weights can be rounded one by one."""
        return any(
            self.granularities(component) not in (("none",), ("dynamic_token",))
            for component in COMPONENTS
        )

    @property
    def entropy_levels(self) -> int:
        """M of eq. 4: 2^activation_bits, or 256 where activations stay in floating point."""
        return 256 if self.activation_bits == 16 else 2**self.activation_bits

    def granularities(self, component: str) -> tuple[str, ...]:
        """The granularities that the search may give a site of `component`, the starting one first."""
        if self.activation_bits == 16:
            return ("none",)
        asked = self.activation_granularity
        fixed = asked.get(component) if isinstance(asked, Mapping) else asked
        if fixed is not None:
            return (fixed,)
        # Measured on the demo model: static per channel survives outliers at 4 bits, dynamic is
        # better where bits are plenty.
        return (
            ("channel", "dynamic_token")
            if self.activation_bits <= 5
            else ("dynamic_token", "channel")
        )

    def start_granularity(self, component: str) -> str:
        """Where the search of a site of `component` starts."""
        return self.granularities(component)[0]

    def candidates(self, component: str) -> tuple[RangeCandidate, ...]:
        """Every range candidate of a site of `component`; those of the starting granularity first, wide ranges first."""
        candidates: list[RangeCandidate] = []
        for granularity in self.granularities(component):
            if granularity in ("dynamic_token", "none"):
                candidates.append(RangeCandidate(granularity=granularity))
                continue
            candidates += [
                RangeCandidate(granularity=granularity, margin=m)
                for m in sorted(self.margins, reverse=True)
            ]
            candidates += [
                RangeCandidate(granularity=granularity, percentile=p)
                for p in sorted(self.percentiles, reverse=True)
            ]
        return tuple(candidates)

    def _rotation_pays(self) -> bool:
        """Measured (docs/results.md): at 8 bits per-token ranges of rotated inputs are best, at 6 and below per-channel ones unrotated."""
        return 7 <= self.activation_bits <= 8 and self.needs_data

    @property
    def precision(self) -> Precision:
        """What a site gets unless guard or budget say otherwise."""
        return Precision(weight_bits=self.weight_bits, activation_bits=self.activation_bits)

    def scheme(
        self, granularity: str, hadamard: int | None = None, precision: Precision | None = None
    ) -> QuantScheme:
        """The scheme of a module whose input has `granularity`, transformed in blocks of `hadamard`; `precision` may differ."""
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
        """The scheme of the output head: 8-bit weights, dynamic 8-bit inputs (16 for A16 schemes); None leaves it alone."""
        if self.lm_head_bits is None:
            return None
        floating = self.activation_bits == 16
        return QuantScheme(
            weight_bits=self.lm_head_bits, activation_bits=16 if floating else 8, group_size=self.group_size, symmetric=self.symmetric,
            granularity="none" if floating else "dynamic_token",
        )  # fmt: skip

    def _check_granularity(self) -> None:
        asked = self.activation_granularity
        if asked is None:
            return
        if isinstance(asked, Mapping):
            unknown = sorted(set(asked) - set(COMPONENTS))
            if unknown:
                raise ValueError(
                    f"activation_granularity={dict(asked)} names the components {unknown}: use "
                    f"{', '.join(COMPONENTS)}."
                )
            chosen = dict(asked)
        else:
            chosen = dict.fromkeys(COMPONENTS, asked)
        for component, granularity in chosen.items():
            if granularity not in ("channel", "token", "dynamic_token"):
                raise ValueError(
                    f"activation_granularity={granularity!r} for {component} must be 'channel', "
                    f"'token' or 'dynamic_token'."
                )
            if granularity == "token" and component == "language":
                raise ValueError(
                    "activation_granularity='token' needs a fixed number of positions: give it per "
                    "component, {'vision': 'token'}."
                )
        if self.activation_bits == 16:
            raise ValueError(
                f"activation_granularity={asked!r} has no meaning for 16-bit (floating point) "
                f"activations: leave it out."
            )


def _vision_optimization(value: object) -> VisionOptimization | None:
    """True is the default, a mapping what config.json holds."""
    if isinstance(value, VisionOptimization):
        return value
    value = to_plain("optimize_vision", value)
    if value is None or value is False:
        return None
    if value is True:
        return VisionOptimization()
    if isinstance(value, dict):
        try:
            return VisionOptimization(**value)
        except TypeError as error:
            raise ValueError(
                f"optimize_vision={value!r} does not have the fields of VisionOptimization."
            ) from error
    raise ValueError(f"optimize_vision={value!r} must be True, False or a VisionOptimization.")


def _finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # NaN is not
