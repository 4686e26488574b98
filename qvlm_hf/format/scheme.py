"""What one quantized linear module looks like: bits, groups, granularity.

`QuantScheme` is the value object that search, packing, modules, kernels and `config.json` agree on.
`parse_scheme` reads the names people use ("W4A4"). Nothing here touches a tensor.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "ACTIVATION_BITS",
    "GRANULARITIES",
    "MAX_HADAMARD_BLOCK",
    "WEIGHT_BITS",
    "QuantScheme",
    "parse_scheme",
]

WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = (*range(3, 9), 16)
GRANULARITIES = ("channel", "token", "dynamic_token", "none")
MAX_HADAMARD_BLOCK = 4096


def parse_scheme(name: str) -> tuple[int, int]:
    """Reads "W4A4" as (weight_bits, activation_bits) = (4, 4).

    Raises:
        ValueError: `name` is no W{2-8}A{3-8,16}.
    """
    match = re.fullmatch(r"W(\d+)A(\d+)", name.upper()) if isinstance(name, str) else None
    if match is None or int(match[1]) not in WEIGHT_BITS or int(match[2]) not in ACTIVATION_BITS:
        raise ValueError(
            f"scheme={name!r} is not W{{2-8}}A{{3-8 or 16}}: write for example 'W4A4', 'W4A8' or "
            f"'W4A16'."
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
            found at run time), "none" (floating point).
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
        if _not_int(self.weight_bits) or self.weight_bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits={self.weight_bits!r} must be an integer from 2 to 8.")
        if _not_int(self.activation_bits) or self.activation_bits not in ACTIVATION_BITS:
            raise ValueError(
                f"activation_bits={self.activation_bits!r} must be an integer from 3 to 8, or 16 "
                f"for floating point."
            )
        if _not_int(self.group_size) or not (
            self.group_size == -1 or 8 <= self.group_size <= 2**20
        ):
            raise ValueError(
                f"group_size={self.group_size!r} must be -1 (whole row) or an integer of at least "
                f"8; 128 is usual."
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric={self.symmetric!r} must be True or False.")
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity={self.granularity!r} must be one of {', '.join(GRANULARITIES)}."
            )
        if (self.granularity == "none") != (self.activation_bits == 16):
            raise ValueError(
                f"granularity={self.granularity!r} does not go with "
                f"activation_bits={self.activation_bits}: "
                "'none' belongs to 16 bits and to 16 bits alone."
            )
        if self.hadamard is not None and (
            _not_int(self.hadamard)
            or not 2 <= self.hadamard <= MAX_HADAMARD_BLOCK
            or self.hadamard & (self.hadamard - 1)
        ):
            raise ValueError(
                f"hadamard={self.hadamard!r} must be None or a power of two from 2 to "
                f"{MAX_HADAMARD_BLOCK}."
            )

    def groups(self, in_features: int) -> int:
        """Number of weight groups of a row: ceil(in_features / group_size)."""
        return -(-in_features // self.group_length(in_features))

    def group_length(self, in_features: int) -> int:
        """Inputs in a full group: `group_size`, or the row for -1 and for rows shorter than a group."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def words(self, in_features: int) -> int:
        """int32 words of a packed row: ceil(in_features * weight_bits / 32)."""
        return -(-in_features * self.weight_bits // 32)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, keys as in config.json."""
        entry = asdict(self)
        hadamard = entry.pop("hadamard")
        entry["input_transform"] = None if hadamard is None else {"hadamard": hadamard}
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "QuantScheme":
        """Reads the JSON form.

        Raises:
            ValueError: a key is unknown or missing, or a value breaks a rule.
        """
        known = {
            "weight_bits",
            "activation_bits",
            "group_size",
            "symmetric",
            "granularity",
            "input_transform",
        }
        if not isinstance(entry, Mapping) or set(entry) != known:
            found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
            raise ValueError(
                f"a module entry must have exactly the keys {sorted(known)}, found {found}: the "
                f"checkpoint is damaged or newer."
            )
        fields = dict(entry)
        transform = fields.pop("input_transform")
        if transform is not None and (
            not isinstance(transform, Mapping) or set(transform) != {"hadamard"}
        ):
            raise ValueError(f"input_transform={transform!r} must be null or {{'hadamard': b}}.")
        return cls(**fields, hadamard=None if transform is None else transform["hadamard"])


def _not_int(value: object) -> bool:
    return not isinstance(value, int) or isinstance(value, bool)
