"""One quantized module in the format of compressed-tensors, which Transformers and vLLM load without this package.

    W{2-8}A16            "pack-quantized": weight_packed, weight_scale, weight_shape, weight_zero_point if asymmetric
    W8A8 dynamic_token   "int-quantized": weight int8, weight_scale; the input is quantized per token, asymmetric, as here

Nothing is quantized again: the same integers on the same scales. Weights are stored in 2, 4 or 8
bits, where all versions of the format agree with format/packing.py; other widths move into the next
wider one. A group that does not divide the row is cut into equal smaller ones. What the format
cannot say is refused.

Left out: static activation ranges. "channel" has a zero point per channel and the format one per
tensor; the scales could be folded into the norm before the site, the zero points only into a norm
with a bias, which a language model's has not. "token" has no counterpart.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvlm_hf.format.packing import pack, unpack
from qvlm_hf.format.scheme import QuantScheme

__all__ = ["Stored", "convert", "quantization_config", "stored_as", "with_one_group_size"]

_WIDTHS = (2, 4, 8)
_WHOLE_ROW = -1


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How the format stores one module; equal ones share a config group.

    Attributes:
        weight_bits: 2, 4 or 8.
        group_size: inputs per scale, a divisor of the row; -1 is the row.
        symmetric: no zero points.
        quantized_input: per token, 8 bits, asymmetric; else floating point.
    """

    weight_bits: int
    group_size: int
    symmetric: bool
    quantized_input: bool

    @property
    def format(self) -> str:
        """The format's name for it."""
        return "int-quantized" if self.quantized_input else "pack-quantized"


def stored_as(
    name: str, scheme: QuantScheme, in_features: int, *, has_input_scale: bool = False
) -> Stored:
    """How a module is stored.

    Args:
        name: of the module, for messages.
        scheme: as quantized.
        in_features: of the module.
        has_input_scale: whether a module of granularity "none" divides its input by a stored scale.

    Raises:
        ValueError: no consumer of the format runs the scheme; says which setting one does.
    """
    if scheme.hadamard is not None:
        raise ValueError(
            f"{name}: a Hadamard transform of its input is computed at run time, which no consumer "
            f"does: quantize with rotation=None."
        )
    if has_input_scale:
        raise ValueError(
            f"{name}: its input is divided by stored scales, which no consumer does: quantize "
            f"again, which stores none."
        )
    if scheme.granularity in ("channel", "token"):
        where = "input channel" if scheme.granularity == "channel" else "position"
        raise ValueError(
            f"{name}: its static activation ranges have a zero point per {where}, which no "
            f"consumer reads: "
            "quantize with activation_granularity='dynamic_token' and 8 bits, or to 16-bit "
            "activations."
        )
    one_group = scheme.groups(in_features) == 1
    eight_bits = scheme.activation_bits == scheme.weight_bits == 8
    if scheme.granularity == "dynamic_token" and not (
        eight_bits and one_group and scheme.symmetric
    ):
        raise ValueError(
            f"{name}: no consumer runs W{scheme.weight_bits}A{scheme.activation_bits} "
            f"{_grouping(scheme)}: "
            "quantize with scheme='W8A8', group_size=-1 and symmetric=True, or to 16-bit "
            "activations."
        )
    group_size = _WHOLE_ROW if one_group else math.gcd(scheme.group_size, in_features)
    width = next(width for width in _WIDTHS if width >= scheme.weight_bits)
    return Stored(
        weight_bits=width,
        group_size=group_size,
        symmetric=scheme.symmetric,
        quantized_input=scheme.granularity == "dynamic_token",
    )


def _grouping(scheme: QuantScheme) -> str:
    """How the weights of a scheme are rounded, for messages."""
    groups = (
        "one scale per row"
        if scheme.group_size == _WHOLE_ROW
        else f"a scale per {scheme.group_size} inputs"
    )
    return f"with {groups} and {'no zero points' if scheme.symmetric else 'zero points'}"


def with_one_group_size(
    stored: Mapping[str, Stored], in_features: Mapping[str, int]
) -> dict[str, Stored]:
    """Cuts asymmetric modules into groups of one size: Transformers unpacks zero points with the settings of the first config group.

    Args:
        stored: module name -> how it is stored.
        in_features: the same keys.

    Raises:
        ValueError: modules have other differences, so that one config group cannot hold them all.
    """
    kinds = set(stored.values())
    if len(kinds) == 1 or all(kind.symmetric for kind in kinds):
        return dict(stored)
    if len({kind.weight_bits for kind in kinds}) > 1 or len({kind.symmetric for kind in kinds}) > 1:
        raise ValueError(
            f"weights of {sorted({kind.weight_bits for kind in kinds})} bits with zero points "
            f"cannot be loaded side by side: "
            "quantize with symmetric=True, or all weights to one width."
        )
    size = math.gcd(
        *(
            in_features[name] if kind.group_size == _WHOLE_ROW else kind.group_size
            for name, kind in stored.items()
        )
    )
    first = next(iter(kinds))
    one = Stored(
        weight_bits=first.weight_bits, group_size=size, symmetric=False, quantized_input=False
    )
    return dict.fromkeys(stored, one)


def convert(
    tensors: Mapping[str, Tensor],
    scheme: QuantScheme,
    stored: Stored,
    in_features: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of one module as the format has them.

    Args:
        tensors: as docs/format.md has them: weight, weight_scale, weight_zero_point, bias.
        scheme: of these tensors.
        stored: from `stored_as` or `with_one_group_size`.
        in_features: of the module.
        dtype: of the model's other tensors, which scales get too: consumers multiply in the dtype
            of the scale.
    """
    out_features = tensors["weight"].shape[0]
    repeats = (
        1
        if stored.group_size == _WHOLE_ROW
        else scheme.group_length(in_features) // stored.group_size
    )
    groups = 1 if stored.group_size == _WHOLE_ROW else in_features // stored.group_size

    def regroup(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(repeats, dim=1)[:, :groups].contiguous()

    result = {"weight_scale": regroup(tensors["weight_scale"]).to(dtype)}
    if stored.quantized_input:
        result["weight"] = (unpack(tensors["weight"], 8, in_features).to(torch.int16) - 128).to(
            torch.int8
        )
    else:
        result["weight_packed"] = _widened(
            tensors["weight"], scheme, stored.weight_bits, in_features
        )
        result["weight_shape"] = torch.tensor([out_features, in_features], dtype=torch.int64)
    if not stored.symmetric:
        # packed along the outputs, where weights are packed along the inputs
        result["weight_zero_point"] = pack(
            regroup(tensors["weight_zero_point"]).T, stored.weight_bits
        ).T.contiguous()
    if "bias" in tensors:
        result["bias"] = tensors["bias"]
    return result


def _widened(packed: Tensor, scheme: QuantScheme, bits: int, in_features: int) -> Tensor:
    """The packed integers in `bits` bits; without zero points they stay centred on half the grid."""
    if bits == scheme.weight_bits:
        return packed
    shift = 2 ** (bits - 1) - 2 ** (scheme.weight_bits - 1) if scheme.symmetric else 0
    return pack(unpack(packed, scheme.weight_bits, in_features).to(torch.int32) + shift, bits)


def quantization_config(modules: Mapping[str, Stored], full_precision: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        modules: canonical module name -> how it is stored.
        full_precision: canonical names of the linear modules that are not quantized.

    Returns:
        One config group per kind of module. The largest targets every linear module, so that the
        others and the list of ignored ones are short; names are patterns that fit them in
        Transformers and in vLLM.
    """
    members: dict[Stored, list[str]] = {}
    for name, kind in modules.items():
        members.setdefault(kind, []).append(name)
    ordered = sorted(members.items(), key=lambda item: -len(item[1]))
    groups: dict[str, Any] = {}
    for index, (kind, names) in enumerate(ordered):
        # vLLM does not take its output head for a "Linear"
        targets = (
            [*(_pattern(name) for name in names if name == "lm_head"), "Linear"]
            if index == 0
            else [_pattern(name) for name in names]
        )
        groups[f"group_{index}"] = _group(kind, targets)
    formats = {kind.format for kind in members}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [_pattern(name) for name in full_precision],
    }
    if not all(kind.symmetric for kind in members):
        config["dequantize"] = (
            True  # Transformers loads packed zero points in no other way; vLLM does not read this
        )
    return config


def _group(kind: Stored, targets: list[str]) -> dict[str, Any]:
    grouped = kind.group_size != _WHOLE_ROW
    weights = {
        "num_bits": kind.weight_bits, "type": "int", "symmetric": kind.symmetric, "dynamic": False,
        "strategy": "group" if grouped else "channel", "group_size": kind.group_size if grouped else None,
    }  # fmt: skip
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "dynamic": True,
        "strategy": "token",
        "group_size": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if kind.quantized_input else None,
        "output_activations": None,
        "format": kind.format,
    }


def _pattern(name: str) -> str:
    """A module for Transformers (`model.vision_tower.encoder...`) and for vLLM (`vision_tower.vision_model.encoder...`)."""
    part, _, rest = name.removeprefix("model.").partition(".")
    inside = rf"\.(\w*model\.)?{re.escape(rest)}" if rest else ""
    return f"re:.*{part}{inside}$"
