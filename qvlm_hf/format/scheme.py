"""How one quantized linear module looks: bits, groups, granularity.

`QuantScheme` is the value that search, packing, modules, kernels and config.json agree on.
`parse_scheme` reads the names that people use ("W4A4").
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = [
    "ACTIVATION_BITS",
    "GRANULARITIES",
    "MAX_HADAMARD_BLOCK",
    "WEIGHT_BITS",
    "QuantScheme",
    "is_per_channel",
    "is_per_position",
    "is_static",
    "parse_scheme",
    "unknown_granularity",
]

WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = (*range(3, 9), 16)
GRANULARITIES = ("channel", "token", "dynamic_token", "dynamic_group", "none")
MAX_HADAMARD_BLOCK = 4096
_BLOCKS = [2**power for power in range(1, 13)]


def is_static(granularity: str) -> bool:
    """Whether an input's ranges are found by calibration and stored, rather than at run time."""
    return granularity in ("channel", "token")


def is_per_channel(granularity: str) -> bool:
    """Whether every input channel has a range, whose scale is folded into the weight columns."""
    return granularity == "channel"


def is_per_position(granularity: str) -> bool:
    """Whether every token position has a stored range; their number is then fixed."""
    return granularity == "token"


def unknown_granularity(granularity: str) -> ValueError:
    """The error to raise at the end of each chain of granularities: none is taken for another."""
    return ValueError(f"granularity={granularity!r} is not handled here: teach this step about it.")


def parse_scheme(name: str) -> tuple[int, int]:
    """Reads "W4A4" as (weight_bits, activation_bits) = (4, 4).

    Raises:
        ValueError: `name` is no W{2-8}A{3-8,16}.
    """
    match = re.fullmatch(r"W([0-9]+)A([0-9]+)", name.upper()) if isinstance(name, str) else None
    if match is None or int(match[1]) not in WEIGHT_BITS or int(match[2]) not in ACTIVATION_BITS:
        raise ValueError(
            f"scheme={name!r} is not W{{2-8}}A{{3-8 or 16}}: write for example 'W4A4', 'W4A8' or "
            "'W4A16'."
        )
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How one linear module is quantized (one entry of `modules` in config.json).

    Attributes:
        weight_bits: bits of a weight, 2 to 8.
        activation_bits: bits of an input value, 3 to 8; 16 leaves the input in floating point.
        group_size: inputs that share a weight scale; -1 is the whole row. The last group of a row
            may be short.
        symmetric: weights have no stored zero point; it is 2^(weight_bits - 1).
        granularity: of the input: "channel" (static, one range per input channel, folded into the
            weight columns), "token" (static, one per position), "dynamic_token" (one per token,
            found at run time), "dynamic_group" (the same, one per token and weight group), "none"
            (floating point).
        hadamard: block size of the normalised Hadamard transform applied to the input first, or
            None.

    Raises:
        ValueError: a value outside these rules, with the remedy.
    """

    weight_bits: int
    activation_bits: int
    group_size: int = 128
    symmetric: bool = False
    granularity: str = "channel"
    hadamard: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "weight_bits": (
                _is_int(self.weight_bits) and self.weight_bits in WEIGHT_BITS,
                "an integer from 2 to 8",
            ),
            "activation_bits": (
                _is_int(self.activation_bits) and self.activation_bits in ACTIVATION_BITS,
                "an integer from 3 to 8, or 16 for floating point",
            ),
            "group_size": (
                _is_int(self.group_size)
                and (self.group_size == -1 or 8 <= self.group_size <= 2**20),
                "-1 (whole row) or an integer from 8 to 1048576; 128 is usual",
            ),
            "symmetric": (isinstance(self.symmetric, bool), "True or False"),
            "granularity": (
                self.granularity in GRANULARITIES,
                f"one of {', '.join(GRANULARITIES)}",
            ),
            "hadamard": (
                self.hadamard is None or (_is_int(self.hadamard) and self.hadamard in _BLOCKS),
                f"None or a power of two from 2 to {MAX_HADAMARD_BLOCK}",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}.")
        if (self.granularity == "none") != (self.activation_bits == 16):
            raise ValueError(
                f"granularity={self.granularity!r} does not go with "
                f"activation_bits={self.activation_bits}: 'none' belongs to 16 bits and to 16 bits "
                "alone."
            )

    def groups(self, in_features: int) -> int:
        """Counts the weight groups of a row: ceil(in_features / group_size)."""
        return -(-in_features // self.group_length(in_features))

    def group_length(self, in_features: int) -> int:
        """Counts the inputs of a full group; a row shorter than a group is one group."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def words(self, in_features: int) -> int:
        """Counts the int32 words of a packed row: ceil(in_features * weight_bits / 32)."""
        return -(-in_features * self.weight_bits // 32)

    def module_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a module's tensors but its bias and a range per position."""
        weight = 4 * out_features * self.words(in_features)
        groups = out_features * self.groups(in_features)
        parameters = groups * (2 if self.symmetric else 3)  # bfloat16 scale, uint8 zero point
        statics = in_features if is_per_channel(self.granularity) else 0
        return weight + parameters + 8 * statics  # float32 scale, int32 zero point

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, keys as in config.json."""
        entry = asdict(self)
        block = entry.pop("hadamard")
        return entry | {"input_transform": None if block is None else {"hadamard": block}}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "QuantScheme":
        """Reads the JSON form.

        Raises:
            ValueError: a key is unknown or missing, or a value breaks a rule.
        """
        known = {field.name for field in fields(cls)} - {"hadamard"} | {"input_transform"}
        if not isinstance(entry, Mapping) or set(entry) != known:
            found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(
                f"a module entry must have exactly the keys {sorted(known)}, found {found}: the "
                "checkpoint is damaged or newer."
            )
        values = dict(entry)
        transform = values.pop("input_transform")
        if transform is None:
            return cls(**values)
        if not isinstance(transform, Mapping) or set(transform) != {"hadamard"}:
            raise ValueError(f"input_transform={transform!r} must be null or {{'hadamard': b}}.")
        return cls(**values, hadamard=transform["hadamard"])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
