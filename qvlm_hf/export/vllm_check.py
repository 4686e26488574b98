"""Does vLLM run an exported LLaVA? Its rules, checked on config.json and file headers.

The table of rules, with the files of vLLM that they were read from, is in docs/serving.md. Nothing
of vLLM is imported: it wants its own environment, and an accelerator that the machine at hand may
not have. Left out: memory, other architectures than LLaVA, attention backends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qvlm_hf.export.vllm_layout import (
    Linear,
    Wanted,
    fused_parts,
    read_layout,
    read_quantization,
    renamed,
)
from qvlm_hf.format.files import TensorHeader
from qvlm_hf.hub.saved import SavedModel

__all__ = ["DEVICES", "VLLM_VERSION", "Finding", "check_for_vllm"]

DEVICES = ("cuda", "cpu")
VLLM_VERSION = "0.33.0"  # whose source was read
_VISION = ("clip_vision_model", "siglip_vision_model", "pixtral")
_MARLIN_GROUPS = (-1, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What breaks a rule; `fatal` unless vLLM runs it all the same, only slower."""

    rule: str
    text: str
    fatal: bool


class _Broken(NamedTuple):
    """One rule broken by one module."""

    rule: str
    module: str
    reason: str
    fatal: bool = True


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """Where the model shall run."""

    device: str
    devices: int
    dtype: torch.dtype


def check_for_vllm(
    directory: str | os.PathLike[str], *, device: str = DEVICES[0], tensor_parallel: int = 1
) -> list[Finding]:
    """Checks an exported model against the rules, without reading a weight.

    Fatal findings come first.

    Args:
        directory: what `export` wrote, or another LLaVA in compressed-tensors' format.
        device: "cuda" or "cpu".
        tensor_parallel: devices that share the model.

    Raises:
        ValueError: the directory holds no exported model, or an argument is wrong.
    """
    if device not in DEVICES or tensor_parallel < 1:
        raise ValueError(
            f"device={device!r}, tensor_parallel={tensor_parallel}: must be one of "
            f"{', '.join(DEVICES)} and at least 1."
        )
    model = SavedModel(Path(directory).resolve())
    saved, config = read_quantization(model), model.config
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    if "LlavaForConditionalGeneration" not in (config.architectures or ()) or vision not in _VISION:
        reason = f"with the vision encoder {vision} is no LLaVA that these rules know"
        return _findings([_Broken("model", f"{config.architectures}", reason)])
    setting = _Setting(device=device, devices=tensor_parallel, dtype=model.dtype)
    return _findings(_broken(model, saved, setting))


def _findings(broken: Iterable[_Broken]) -> list[Finding]:
    """Those of many modules for one reason become one, fatal findings first."""
    modules: dict[tuple[str, str, bool], list[str]] = {}
    for rule, module, reason, fatal in broken:
        modules.setdefault((rule, reason, fatal), []).append(module)
    found = []
    for (rule, reason, fatal), names in modules.items():
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        found.append(Finding(rule=rule, text=f"{where}: {reason}", fatal=fatal))
    return sorted(found, key=lambda finding: not finding.fatal)


def _broken(model: SavedModel, saved: Mapping[str, Any], setting: _Setting) -> Iterator[_Broken]:
    """Every rule on every module."""
    linears, wanted = read_layout(model.model, saved, setting.devices)
    yield from _check_heads(model.config, setting.devices)
    for linear in linears:
        yield from _check_linear(linear)
    for parts in fused_parts(linears):
        yield from _check_fused(parts, setting)
    yield from _check_tensors(model.headers, wanted)


def _check_heads(config: Any, devices: int) -> Iterator[_Broken]:
    text, encoder = config.get_text_config(), config.vision_config
    for name, part in (("language model", text), ("vision encoder", encoder)):
        if (heads := part.num_attention_heads) % devices:
            reason = f"{heads} attention heads are not divided by {devices} devices"
            yield _Broken("parallel", name, reason)
    shared = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if shared % devices and devices % shared:
        reason = f"{shared} key-value heads are neither divided nor repeated on {devices} devices"
        yield _Broken("parallel", "language model", reason)


def _check_linear(linear: Linear) -> Iterator[_Broken]:
    name, inputs, devices = linear.name, linear.inputs, linear.devices
    length = linear.in_features if linear.split_inputs else linear.out_features
    if length % devices and linear.last != "lm_head":  # the head is padded
        what = "inputs" if linear.split_inputs else "outputs"
        yield _Broken("parallel", name, f"{length} {what} are not divided by {devices} devices")
        return
    if linear.group is None:
        return
    if (reason := _no_scheme(linear.group)) is not None:
        yield _Broken("scheme", name, reason)
        return
    weights, floating = linear.group["weights"], linear.group.get("input_activations") is None
    bits, size = weights["num_bits"], weights.get("group_size")
    if weights["strategy"] == "group" and inputs % size:
        yield _Broken("groups", name, f"{inputs} inputs on a device are not whole groups of {size}")
    if floating and linear.split_inputs and devices > 1 and inputs * bits % 32:
        reason = f"{inputs} inputs on a device do not fill whole words at {bits} bits"
        yield _Broken("groups", name, reason)


def _no_scheme(group: Mapping[str, Any]) -> str | None:
    """Why no scheme of vLLM takes a config group, or None."""
    weights, inputs, form = group["weights"], group.get("input_activations"), group["format"]
    bits, strategy = weights["num_bits"], weights["strategy"]
    if weights["type"] != "int" or weights.get("dynamic"):
        return "weights must be static integers"
    if inputs is None:
        if form == "pack-quantized" and 2 <= bits <= 8 and strategy in ("channel", "group"):
            return None
        return (
            f"{form} weights of {bits} bits, strategy {strategy}, with floating-point inputs, are "
            "run by no scheme"
        )
    kinds = (inputs["strategy"], bool(inputs.get("dynamic")))
    if (
        form == "int-quantized"
        and bits == inputs["num_bits"] == 8
        and weights["symmetric"]
        and strategy in ("channel", "tensor")
        and inputs["type"] == "int"
        and kinds in (("token", True), ("tensor", False))
    ):
        return None
    return (
        f"{form} W{bits}A{inputs['num_bits']}, weights per {strategy}, inputs per {kinds[0]}, is "
        "run by no scheme"
    )


def _check_fused(parts: list[Linear], setting: _Setting) -> Iterator[_Broken]:
    """The rules for what vLLM runs as one module; `parts` share their inputs."""
    first, names = parts[0], ", ".join(part.last for part in parts)
    if any((part.group is None) != (first.group is None) for part in parts):
        yield _Broken("fused", first.name, f"some of {names} are quantized and some are not")
    elif any(part.group != first.group for part in parts):
        yield _Broken("fused", first.name, f"{names} are in different config groups")
    elif first.group is not None and first.group.get("input_activations") is None:
        # int8 products have no demands of their own
        weights = first.group["weights"]
        shared_rows = len(parts) > 1 or (setting.devices > 1 and not first.split_inputs)
        broken = any(part.outputs * weights["num_bits"] % 32 for part in parts)
        if not weights["symmetric"] and shared_rows and broken:
            reason = f"packed zero points of {first.outputs} outputs do not fill whole words"
            yield _Broken("groups", first.name, reason)
        outputs = sum(part.outputs for part in parts)
        if (found := _kernel_problem(weights, first.inputs, outputs, setting)) is not None:
            yield _Broken("kernel", first.name, *found)


def _kernel_problem(
    weights: Mapping[str, Any], inputs: int, outputs: int, setting: _Setting
) -> tuple[str, bool] | None:
    """What a kernel wants otherwise, and whether the model does not run without."""
    bits, symmetric = weights["num_bits"], weights["symmetric"]
    size: Any = weights.get("group_size") if weights["strategy"] == "group" else -1
    if setting.device == "cpu":
        if bits != 4:
            return (
                f"no CPU kernel has {bits}-bit weights with floating-point inputs, only 4-bit ones",
                True,
            )
        if inputs % 32 or outputs % 32 or (size != -1 and size % 2):
            return (
                f"the CPU kernel wants multiples of 32, not {inputs} inputs and {outputs} outputs",
                True,
            )
        if setting.dtype == torch.float32:
            return "the CPU kernel has no float32: serve with --dtype bfloat16", False
        return None
    if size not in _MARLIN_GROUPS or not (bits == 4 or (bits == 8 and symmetric)):
        kind = "symmetric" if symmetric else "asymmetric"
        return (
            f"Humming runs it; Marlin has no {bits}-bit {kind} weights in groups of {size}",
            False,
        )
    if (outputs % 64 or inputs % 128) and (outputs % 128 or inputs % 64):
        return f"Marlin pads {inputs} inputs and {outputs} outputs at every step", False
    return None


def _check_tensors(headers: Iterable[TensorHeader], wanted: Wanted) -> Iterator[_Broken]:
    """Compares the headers of the files with what vLLM makes room for."""
    found = {renamed(header.key): header for header in headers}
    for name in sorted(wanted.keys() - found.keys()):
        yield _Broken("names", name, "the tensor is missing")
    for name in sorted(found.keys() - wanted.keys()):
        yield _Broken("names", name, "vLLM has no place for the tensor")
    for name in sorted(wanted.keys() & found.keys()):
        (dtypes, shape), header = wanted[name], found[name]
        if header.dtype not in dtypes or header.shape != shape:
            must = f"must be {' or '.join(dtypes)} {list(shape)}"
            yield _Broken("tensors", name, f"is {header.dtype} {list(header.shape)}, {must}")
