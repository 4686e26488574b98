"""One quantized module in compressed-tensors' format, which Transformers and vLLM load alone.

    W{2-8}A16            "pack-quantized": weight_packed, weight_scale, weight_shape, and
                         weight_zero_point if asymmetric
    W8A8 dynamic_token   "int-quantized": weight int8, weight_scale; the input is quantized per
                         token, asymmetric, as here

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

    `has_input_scale`: whether one of granularity "none" divides its input by a stored scale.

    Raises:
        ValueError: no consumer of the format runs the scheme; says which setting one does.
    """
    one_group = scheme.groups(in_features) == 1
    if (reason := _refusal(scheme, one_group, has_input_scale)) is not None:
        raise ValueError(f"{name}: {reason}.")
    return Stored(
        weight_bits=next(width for width in _WIDTHS if width >= scheme.weight_bits),
        group_size=_WHOLE_ROW if one_group else math.gcd(scheme.group_size, in_features),
        symmetric=scheme.symmetric,
        quantized_input=scheme.granularity == "dynamic_token",
    )


def _refusal(scheme: QuantScheme, one_group: bool, has_input_scale: bool) -> str | None:
    """Why no consumer runs a scheme, and what one runs; None if one does."""
    bits = (scheme.weight_bits, scheme.activation_bits)
    if scheme.hadamard is not None:
        return (
            "a Hadamard transform of its input is computed at run time, which no consumer does: "
            "quantize with rotation=None"
        )
    if scheme.granularity in ("channel", "token"):
        where = "input channel" if scheme.granularity == "channel" else "position"
        return (
            f"its static activation ranges have a zero point per {where}, which no consumer reads: "
            "quantize with activation_granularity='dynamic_token' and 8 bits, or to 16-bit "
            "activations"
        )
    if scheme.granularity == "dynamic_group":
        return (
            "its inputs have a range per group, which no consumer computes: quantize with "
            "activation_granularity='dynamic_token' and 8 bits, or to 16-bit activations"
        )
    if has_input_scale:
        return (
            "its input is divided by stored scales, which no consumer does: quantize again, which "
            "stores none"
        )
    if scheme.granularity == "none" or (bits == (8, 8) and one_group and scheme.symmetric):
        return None
    size = scheme.group_size
    groups = "one scale per row" if size == _WHOLE_ROW else f"a scale per {size} inputs"
    return (
        f"no consumer runs W{bits[0]}A{bits[1]} with {groups} and "
        f"{'no zero points' if scheme.symmetric else 'zero points'}: quantize with scheme='W8A8', "
        "group_size=-1 and symmetric=True, or to 16-bit activations"
    )


def with_one_group_size(
    stored: Mapping[str, Stored], in_features: Mapping[str, int]
) -> dict[str, Stored]:
    """Cuts asymmetric modules into groups of one size.

    Transformers unpacks zero points with the settings of the first config group.

    Raises:
        ValueError: modules have other differences, so that one config group cannot hold them all.
    """
    kinds = set(stored.values())
    if len(kinds) == 1 or all(kind.symmetric for kind in kinds):
        return dict(stored)
    widths = sorted({kind.weight_bits for kind in kinds})
    if len(widths) > 1 or any(kind.symmetric for kind in kinds):
        raise ValueError(
            f"weights of {widths} bits with zero points cannot be loaded side by side: quantize "
            "with symmetric=True, or all weights to one width."
        )
    sizes = (
        in_features[name] if kind.group_size == _WHOLE_ROW else kind.group_size
        for name, kind in stored.items()
    )
    one = Stored(
        weight_bits=widths[0], group_size=math.gcd(*sizes), symmetric=False, quantized_input=False
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
    repeats = groups = 1
    if stored.group_size != _WHOLE_ROW:
        repeats = scheme.group_length(in_features) // stored.group_size
        groups = in_features // stored.group_size

    def regroup(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(repeats, dim=1)[:, :groups].contiguous()

    weight = tensors["weight"]
    result = {"weight_scale": regroup(tensors["weight_scale"]).to(dtype)}
    if stored.quantized_input:
        integers = unpack(weight, 8, in_features).to(torch.int16)
        result["weight"] = (integers - 128).to(torch.int8)
    else:
        result["weight_packed"] = _widened(weight, scheme, stored.weight_bits, in_features)
        result["weight_shape"] = torch.tensor([weight.shape[0], in_features], dtype=torch.int64)
    if not stored.symmetric:
        # packed along the outputs, where weights are packed along the inputs
        zero_points = regroup(tensors["weight_zero_point"]).T
        result["weight_zero_point"] = pack(zero_points, stored.weight_bits).T.contiguous()
    return result | ({"bias": tensors["bias"]} if "bias" in tensors else {})


def _widened(packed: Tensor, scheme: QuantScheme, bits: int, in_features: int) -> Tensor:
    """Packed integers in `bits` bits; without zero points centred on half the new grid."""
    if bits == scheme.weight_bits:
        return packed
    shift = 2 ** (bits - 1) - 2 ** (scheme.weight_bits - 1) if scheme.symmetric else 0
    return pack(unpack(packed, scheme.weight_bits, in_features).to(torch.int32) + shift, bits)


def quantization_config(modules: Mapping[str, Stored], full_precision: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Returns:
        One config group per kind of module. The largest targets every linear module, so that the
        others and the list of ignored ones are short; names are patterns that fit them in
        Transformers and in vLLM.
    """
    members: dict[Stored, list[str]] = {}
    for name, kind in modules.items():
        members.setdefault(kind, []).append(name)
    groups: dict[str, Any] = {}
    for kind, names in sorted(members.items(), key=lambda item: -len(item[1])):
        targets = [_pattern(name) for name in names]
        if not groups:  # vLLM does not take its output head for a "Linear"
            targets = [*(_pattern(name) for name in names if name == "lm_head"), "Linear"]
        groups[f"group_{len(groups)}"] = _group(kind, targets)
    formats = {kind.format for kind in members}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [_pattern(name) for name in full_precision],
    }
    if not all(kind.symmetric for kind in members):
        # Transformers loads packed zero points in no other way; vLLM does not read this
        config["dequantize"] = True
    return config


def _group(kind: Stored, targets: list[str]) -> dict[str, Any]:
    grouped = kind.group_size != _WHOLE_ROW
    weights = {
        "num_bits": kind.weight_bits, "type": "int", "symmetric": kind.symmetric, "dynamic": False,
        "strategy": "group" if grouped else "channel",
        "group_size": kind.group_size if grouped else None,
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
    """Fits a name of Transformers and of vLLM, as `vision_tower.vision_model.encoder...`."""
    part, _, rest = name.removeprefix("model.").partition(".")
    inside = rf"\.(\w*model\.)?{re.escape(rest)}" if rest else ""
    return f"re:.*{part}{inside}$"
