"""The options of quantization: declared, explained and checked here, once.

`QVLMConfig` and `CalibrationSettings` inherit `Options`. The table of fields in docs/ and the
options of `qvlm quantize` are made from the metadata of its fields.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from qvlm_hf.calibration.values import shown, to_plain

__all__ = [
    "SWITCHED_OFF",
    "Flag",
    "Options",
    "Rule",
    "VisionOptimization",
    "check_fields",
    "option",
    "size_in_bytes",
]


@dataclass(frozen=True)
class Rule:
    """What a value must be: in words, behind "must be", and as a check of plain values."""

    words: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Flag:
    """How the command line offers an option.

    Attributes:
        help: one line.
        metavar: name of the value; None for a switch.
        choices: the values it takes, "none" for None.
        search: whether only the search on samples uses it.
    """

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    search: bool = False


def option(
    default: Any, rule: Rule | None, doc: str, *, flag: Flag | None = None, saved: bool = True
) -> Any:
    """A field of `Options` or `QVLMConfig`.

    Args:
        default: its value where none is given.
        rule: what it must be; None where more than one value decides.
        doc: what it does, for docs/.
        flag: its option of `qvlm quantize`, if it has one.
        saved: whether config.json holds it.
    """
    return field(default=default, metadata={"rule": rule, "doc": doc, "flag": flag, "saved": saved})


def _number(words: str, low: float, high: float = sys.float_info.max) -> Rule:
    return Rule(words, lambda value: type(value) in (int, float) and low <= value <= high)


def _whole(low: int) -> Rule:
    return Rule(f"an integer of at least {low}", lambda v: type(v) is int and v >= low)


def _none_or(rule: Rule) -> Rule:
    return Rule(rule.words, lambda value: value is None or rule.accepts(value))


def _list_of(rule: Rule, *, empty: bool) -> Rule:
    return Rule(rule.words, lambda v: (empty or len(v) > 0) and all(map(rule.accepts, v)))


def _names_module(name: Any) -> bool:
    """Whether a module may be called so: no pattern, no white space, no empty part."""
    return type(name) is str and bool(re.fullmatch(r"[^\s.*?]+(\.[^\s.*?]+)*", name))


def size_in_bytes(size: str) -> int:
    """Bytes of a size such as "3.9GB" or "350 MB", decimal units.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?) ?([MG])B", size)
    if found is None:
        raise ValueError(f"{shown(size)} is no size: write it as in '3.9GB' or '350MB'.")
    return round(float(found[1]) * {"M": 1e6, "G": 1e9}[found[2]])


def _is_size(value: Any) -> bool:
    try:
        return type(value) is str and size_in_bytes(value) > 0
    except ValueError:
        return False


_AVERAGE_BITS = _number("an average of 2 to 8 bits", 2, 8)
_SMALLEST = sys.float_info.min
_SWITCH = Rule("True or False", lambda value: type(value) is bool)
_NOT_NEGATIVE = _number("a number of at least 0", 0)


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

    epochs: int = option(10, _whole(1), "passes")
    learning_rate: float = option(
        0.01, _number("a number above 0 and up to 1", _SMALLEST, 1), "of Adam"
    )
    entropy_weight: float = option(0.1, _NOT_NEGATIVE, "lambda1")
    error_weight: float = option(1.0, _NOT_NEGATIVE, "lambda2")
    output_weight: float = option(1.0, _NOT_NEGATIVE, "eta")

    def __post_init__(self) -> None:
        check_fields(self, "VisionOptimization: ")

    @classmethod
    def read(cls, value: object) -> "VisionOptimization | None":
        """What `optimize_vision` stands for: True is the default, a mapping what config.json holds.

        Raises:
            ValueError: it is something else.
        """
        if isinstance(value, cls):
            return value
        value = to_plain("optimize_vision", value)
        if value is None or value is False:
            return None
        if value is not True and not isinstance(value, dict):
            raise ValueError(
                f"optimize_vision={value!r} must be True, False or a VisionOptimization."
            )
        try:
            return cls() if value is True else cls(**value)
        except TypeError as error:
            raise ValueError(
                f"optimize_vision={value!r} does not have the fields of VisionOptimization."
            ) from error


# What plain rounding does without, and the paper too.
SWITCHED_OFF: Mapping[str, Any] = {
    "recipe": "fixed",
    "weight_rounding": "nearest",
    "equalization": False,
    "token_importance": False,
    "guard": False,
}


@dataclass(kw_only=True)
class Options:
    """The options that shape a result. Their meaning is in the metadata of the fields."""

    group_size: int = option(
        128,
        None,
        "inputs that share a weight scale; -1 is the whole row.",
        flag=Flag("inputs per weight scale, -1: whole row", "N"),
    )
    symmetric: bool = option(
        False,
        _SWITCH,
        "weights without zero points. Activations always have them.",
        flag=Flag("weights without zero points"),
    )
    activation_granularity: str | Mapping[str, str] | None = option(
        None,
        None,
        '"channel", "token" (static, per position), "dynamic_token", "dynamic_group" (per token '
        'and weight group), or a mapping from "vision", "projector" and "language" to one of them. '
        "None leaves it to `recipe`; where ranges are searched, a site starts at "
        '"channel" for up to 5 bits and at "dynamic_token" above, and may get the other one.',
        flag=Flag(
            "of every input (default: what --recipe finds best)",
            choices=("channel", "dynamic_token", "dynamic_group"),
        ),
    )
    quantize_vision: bool = option(True, _SWITCH, "quantize the vision encoder.")
    quantize_projector: bool = option(True, _SWITCH, "quantize the projector.")
    lm_head_bits: int | None = option(
        None,
        Rule("8 or None (full precision)", lambda v: v is None or (type(v) is int and v == 8)),
        "8 quantizes the output head, None leaves it in full precision.",
    )
    modules_to_not_convert: Any = option(
        None,
        Rule("a list of module names", lambda v: all(map(_names_module, v))),
        "module paths, suffixes or component names that stay in full precision, besides the output "
        "head and tied modules.",
        flag=Flag("modules that stay in full precision", "NAME"),
    )
    num_samples: int = option(
        64,
        _whole(1),
        "samples taken from `dataset`.",
        flag=Flag("samples to calibrate on", "N", search=True),
    )
    batch_size: int = option(
        8,
        _whole(1),
        "samples per forward pass.",
        flag=Flag("samples per forward pass", "N", search=True),
    )
    seed: int = option(
        0, _whole(0), "of all that is drawn, samples first.", flag=Flag("of the samples", "SEED")
    )
    max_block_depth: int = option(
        3,
        _whole(1),
        "layers that are searched together, at most (eq. 7).",
        flag=Flag("layers searched together", "N", search=True),
    )
    entropy_threshold: float | None = option(
        None,
        _none_or(_number("a number (in nats) or None for the segment's mean", -sys.float_info.max)),
        "nats from which a layer depends on its neighbours (eq. 7); None is the mean of the "
        "segment.",
    )
    percentiles: Sequence[float] = option(
        (1.0, 0.9999, 0.9995, 0.999),
        _list_of(_number("numbers from 0.9 to 1.0, as in (1.0, 0.9999)", 0.9, 1.0), empty=False),
        "range candidates: shares of the calibration values that a range covers.",
    )
    margins: Sequence[float] = option(
        (1.1, 1.25),
        _list_of(
            _number(
                "factors above 1.0 and up to 2.0, as in (1.1, 1.25); () for none",
                1.0 + sys.float_info.epsilon,
                2.0,
            ),
            empty=True,
        ),
        "range candidates: factors on the range of all values.",
    )
    weight_rounding: str = option(
        "gptq",
        # "learned" is in files of an earlier version alone
        Rule("'nearest' or 'gptq'", lambda value: value in ("nearest", "gptq", "learned")),
        '"gptq" (second-order compensation of the rounding error) or "nearest".',
    )
    rotation: str | None = option(
        "auto",
        Rule("'hadamard', None or 'auto'", lambda value: value in ("hadamard", None, "auto")),
        '"hadamard" folds a Hadamard rotation into the weights, with online transforms where that '
        'cannot be; None does not; "auto" is tried both ways by `recipe="auto"`, and rotates for '
        'calibrated inputs of 7 or 8 bits with "fixed", if the model can be rotated.',
        flag=Flag("fold a Hadamard rotation", choices=("auto", "hadamard", "none")),
    )
    equalization: bool = option(
        True,
        _SWITCH,
        "move scales of input channels into the weights that read them, exactly; needs data.",
    )
    token_importance: bool = option(
        True,
        _SWITCH,
        "weigh every token's error by the gradient of the answers there (a few backward passes "
        "through the model).",
    )
    written_text: bool = option(
        False,
        _SWITCH,
        "calibrate also on text that the model writes itself, one for every four samples, so that "
        "the compensation of errors fits its language and not only the samples.",
        flag=Flag("calibrate also on text that the model writes", search=True),
    )
    guard: bool = option(
        True,
        _SWITCH,
        "keep up to a tenth of the sites at 8 bits, those that the scheme's bits would break; only "
        "if inputs or weights have at most 4 bits; needs data.",
    )
    recipe: str = option(
        "auto",
        Rule("'auto' or 'fixed'", lambda value: value in ("auto", "fixed")),
        '"auto" measures which of a few recipes (rotation, granularity, equalization) answers most '
        "like full precision, on samples that the comparison does not calibrate on, and takes it. "
        "Fields that differ from their defaults stay. "
        '"fixed" compares nothing, in about half the time. Nor is anything without data.',
        flag=Flag(
            "auto measures which recipe suits the model, fixed takes half the time",
            choices=("auto", "fixed"),
            search=True,
        ),
    )
    precision_budget: float | str | None = option(
        None,
        Rule(
            "a number of 2 to 8 bits per weight, or a size in MB or GB (decimal units, in "
            "capitals) as in '350MB': or leave it out",
            lambda value: value is None or _AVERAGE_BITS.accepts(value) or _is_size(value),
        ),
        'average bits of a weight, or the size of the saved weights in decimal units ("3.9GB", '
        '"350MB"): calibration gives every site its own width, from 2 to 8. None: those of the '
        "scheme.",
        flag=Flag(
            "average bits of a weight, or a size such as 3.9GB; widths are chosen per site",
            "BUDGET",
            search=True,
        ),
    )
    optimize_vision: Any = option(
        None,
        None,
        "learn the ranges of vision encoder and projector by gradient descent (eq. 8-10); True, "
        "False or a `VisionOptimization`. Kept only if it lowers the error on held-out calibration "
        "samples.",
    )
    strict: bool = option(
        False,
        _SWITCH,
        "raise instead of warning where something falls back. Never saved.",
        flag=Flag("fail where a fallback or a collapsed self-check would only warn", search=True),
        saved=False,
    )


def check_fields(options: Any, where: str = "") -> None:
    """Makes plain values of all fields.

    Raises:
        ValueError: a value breaks its rule.
    """
    for each in fields(options):
        name, value = where + each.name, getattr(options, each.name)
        if not isinstance(value, VisionOptimization):
            value = to_plain(name, value)
            object.__setattr__(options, each.name, value)
        listed = isinstance(each.default, tuple) or each.name == "modules_to_not_convert"
        if listed and not isinstance(value, tuple):
            raise ValueError(f"{name}={value!r} must be a list.")
        rule = each.metadata.get("rule")
        if rule is not None and not rule.accepts(value):
            raise ValueError(f"{name}={shown(value)} must be {rule.words}.")
