"""How vLLM reads a LLaVA in compressed-tensors' format: names, config groups, modules, tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qvlm_hf.export.checkpoint import has_nested_vision, hub_name
from qvlm_hf.hub.saved import SavedModel

__all__ = ["Linear", "Wanted", "fused_parts", "read_layout", "read_quantization", "renamed"]

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SPLIT_INPUTS = ("o_proj", "down_proj", "out_proj", "fc2", "linear_2")
_FLOATS = ("F32", "F16", "BF16")
_WEIGHTS = {"num_bits", "type", "symmetric", "strategy"}
# Layouts that models/llava.py renames, before any rule looks at a name.
_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)

Wanted = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # tensor -> dtypes it may have, shape


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear module under vLLM's name, and its share of one device.

    `group` is its config group, None if it is not quantized.
    """

    name: str
    in_features: int
    out_features: int
    group: Mapping[str, Any] | None
    devices: int

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def split_inputs(self) -> bool:
        """Whether devices share its inputs; else they share its outputs."""
        return self.last in _SPLIT_INPUTS

    @property
    def inputs(self) -> int:
        """Inputs on one device."""
        return self.in_features // (self.devices if self.split_inputs else 1)

    @property
    def outputs(self) -> int:
        """Outputs on one device."""
        return self.out_features // (1 if self.split_inputs else self.devices)


def read_quantization(model: SavedModel) -> Mapping[str, Any]:
    """`quantization_config` of an exported model.

    Raises:
        ValueError: it has none, or an incomplete one.
    """
    saved: Any = model.config_json.get("quantization_config")
    method = saved.get("quant_method") if isinstance(saved, Mapping) else None
    if method != "compressed-tensors":
        raise ValueError(
            f"{model.folder}: quant_method is {method!r}, which vLLM does not run as it is: qvlm "
            f"export writes what it runs."
        )
    groups = saved.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) and groups else [{}]:
        if not set(group.get("weights") or ()) >= _WEIGHTS or not group.get("targets"):
            raise ValueError(
                f"{model.folder}: quantization_config has no config_groups with targets and "
                f"{sorted(_WEIGHTS)}: export it again."
            )
    return saved


def read_layout(model: Any, saved: Mapping[str, Any], devices: int) -> tuple[list[Linear], Wanted]:
    """Reads a model on the meta device.

    That is its linear modules, and every tensor that vLLM has room for.
    """
    nested = has_nested_vision(model.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {name: hub_name(name, nested_vision=nested) for name in shapes}
    wanted: Wanted = {names[name]: (_FLOATS, shape) for name, shape in shapes.items()}
    linears = []
    for own, module in model.named_modules():
        if isinstance(module, nn.Linear):
            name = names[f"{own}.weight"].removesuffix(".weight")
            sizes = {"in_features": module.in_features, "out_features": module.out_features}
            group = _group_of(name, saved)
            linears.append(Linear(name=name, group=group, devices=devices, **sizes))
            if group is not None:
                del wanted[f"{name}.weight"]
                parts = _parts(group, module.out_features, module.in_features)
                wanted |= {f"{name}.{part}": kind for part, kind in parts.items()}
    return linears, wanted


def _group_of(name: str, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config group of a module: by its name first, by its class then.

    The output head has a class of its own.
    """
    if any(_fits(pattern, name) for pattern in saved.get("ignore") or ()):
        return None
    targets = [
        (target, {**group, "format": group.get("format") or saved.get("format")})
        for group in saved["config_groups"].values()
        for target in group["targets"]
    ]
    by_name = [group for target, group in targets if _fits(target, name)]
    by_class = [
        group
        for target, group in targets
        if target.lower() in "parallellinear" and not name.endswith("lm_head")
    ]
    return next(iter(by_name + by_class), None)


def _fits(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return renamed(pattern) == name


def renamed(name: str) -> str:
    """The name of a tensor or module after models/llava.py has renamed it."""
    for old, new in _RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def fused_parts(linears: list[Linear]) -> Iterator[list[Linear]]:
    """What vLLM makes one module of: trios, pairs and single modules."""
    by_name = {linear.name: linear for linear in linears}
    for linear in linears:
        family = next((family for family in _FUSED if linear.last in family), (linear.last,))
        if linear.last == family[0]:
            parent = linear.name.removesuffix(linear.last)
            yield [by_name[parent + last] for last in family if parent + last in by_name]


def _parts(group: Mapping[str, Any], rows: int, length: int) -> Wanted:
    """Part -> dtypes and shape of a quantized module of `length` inputs and `rows` outputs."""
    weights = group["weights"]
    if (inputs := group.get("input_activations")) is not None:
        scale = (1,) if weights["strategy"] == "tensor" else (rows, 1)
        parts: Wanted = {"weight": (("I8",), (rows, length)), "weight_scale": (_FLOATS, scale)}
        return parts if inputs.get("dynamic") else parts | {"input_scale": (_FLOATS, (1,))}
    bits = weights["num_bits"]
    groups = length // weights["group_size"] if weights["strategy"] == "group" else 1
    parts = {
        "weight_packed": (("I32",), (rows, -(-length * bits // 32))),
        "weight_scale": (_FLOATS, (rows, groups)),
        "weight_shape": (("I64",), (2,)),
    }
    zero_points = {"weight_zero_point": (("I32",), (-(-rows * bits // 32), groups))}
    return parts if weights["symmetric"] else parts | zero_points
