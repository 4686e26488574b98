"""What vLLM asks of a LLaVA in compressed-tensors' format, written down from its source and checked on config.json and file headers.

`RULES` names the file of vLLM that each rule was read from. Nothing of vLLM is imported: it wants
its own environment, and an accelerator
that the machine at hand may not have. Left out: memory, other architectures than LLaVA, attention
backends.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from qvlm_hf.export.checkpoint import has_nested_vision, hub_name
from qvlm_hf.hf.checks import check_files, tensor_headers
from qvlm_hf.hf.directory import weight_files

__all__ = ["DEVICES", "RULES", "VLLM_VERSION", "Finding", "Rule", "check_for_vllm"]

VLLM_VERSION = "0.33.0"
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule: its name, the files below vllm/model_executor it was read from, and what they say."""

    name: str
    source: str
    says: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What breaks a rule.

    `fatal`: vLLM does not load it or runs it wrongly; else it runs, and slower than it could.
    """

    rule: str
    text: str
    fatal: bool


RULES = (
    Rule(
        name="model",
        source="models/llava.py",
        says="LlavaForConditionalGeneration with a CLIP, SigLIP or Pixtral vision encoder.",
    ),
    Rule(
        name="names",
        source="models/llava.py, models/clip.py, models/siglip.py",
        says="language_model.model.*, language_model.lm_head, multi_modal_projector.*, "
        "vision_tower.vision_model.* (Pixtral: "
        "vision_tower.*), or as models/llava.py renames; every tensor has a place and every place "
        "a tensor.",
    ),
    Rule(
        name="scheme",
        source="layers/quantization/compressed_tensors/compressed_tensors.py",
        says="Integer weights, static: pack-quantized of 2-8 bits with a scale per channel or "
        "group and floating-point inputs; or "
        "int-quantized of 8 bits, symmetric, with a scale per channel or tensor, and 8-bit inputs, "
        "dynamic per token or static per tensor.",
    ),
    Rule(
        name="fused",
        source="layers/quantization/compressed_tensors/utils.py, "
        "layers/quantization/utils/config_utils.py",
        says="q/k/v and gate/up are one module each: all of a trio or pair ignored or none, and "
        "all in one config group.",
    ),
    Rule(
        name="tensors",
        source="layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py, "
        "compressed_tensors_w8a8_int8.py",
        says="weight_packed int32 [out, in*bits/32], weight_scale [out, groups], weight_shape "
        "int64 [2], weight_zero_point int32 "
        "[out*bits/32, groups]; or weight int8 [out, in], weight_scale [out, 1].",
    ),
    Rule(
        name="groups",
        source="layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py",
        says="Whole groups: the group size divides the inputs, those of one device where they are "
        "split (o_proj, down_proj, out_proj, fc2, "
        "linear_2); rows of packed zero points fill whole words in every fused part.",
    ),
    Rule(
        name="parallel",
        source="layers/linear.py, models/clip.py, models/llama.py",
        says="The number of devices divides heads, split inputs and outputs; key-value heads are "
        "divided or repeated.",
    ),
    Rule(
        name="kernel",
        source="kernels/linear/__init__.py, kernels/linear/mixed_precision/marlin.py, humming.py, "
        "cpu.py",
        says="CUDA: Marlin runs 4 and 8 bits symmetric and 4 bits asymmetric in groups of 32, 64, "
        "128 or rows (others: Humming), and pads "
        "outputs to 64 and inputs to 128; CPU: 4 bits alone, inputs and outputs multiples of 32, "
        "even groups, not in float32.",
    ),
)

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SPLIT_INPUTS = ("o_proj", "down_proj", "out_proj", "fc2", "linear_2")
_FLOATS = ("F32", "F16", "BF16")
_VISION = ("clip_vision_model", "siglip_vision_model", "pixtral")
_WEIGHTS = {"num_bits", "type", "symmetric", "strategy"}
_MARLIN_GROUPS = (-1, 32, 64, 128)
# Layouts that models/llava.py renames, before any rule looks at a name.
_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


_Wanted = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # tensor -> dtypes it may have, shape


class _Findings:
    """Collects findings; those of many modules for one reason become one."""

    def __init__(self) -> None:
        self._modules: dict[tuple[str, str, bool], list[str]] = {}

    def add(self, rule: str, module: str, reason: str, *, fatal: bool = True) -> None:
        self._modules.setdefault((rule, reason, fatal), []).append(module)

    def all(self) -> list[Finding]:
        found = []
        for (rule, reason, fatal), modules in self._modules.items():
            where = modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more"
            found.append(Finding(rule=rule, text=f"{where}: {reason}", fatal=fatal))
        return sorted(found, key=lambda finding: not finding.fatal)


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """A linear module under vLLM's name: its sizes and its config group, None if it is not quantized."""

    name: str
    in_features: int
    out_features: int
    group: Mapping[str, Any] | None

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """Where the model shall run."""

    device: str
    devices: int
    dtype: torch.dtype


def check_for_vllm(
    directory: str | os.PathLike[str], *, device: str = DEVICES[0], tensor_parallel: int = 1
) -> list[Finding]:
    """Checks an exported model against `RULES`, without reading a weight.

    Args:
        directory: what `export` wrote, or another LLaVA in compressed-tensors' format.
        device: "cuda" or "cpu".
        tensor_parallel: devices that share the model.

    Returns:
        What breaks a rule, fatal findings first.

    Raises:
        ValueError: the directory holds no exported model, or an argument is wrong.
    """
    if device not in DEVICES or tensor_parallel < 1:
        raise ValueError(
            f"device={device!r}, tensor_parallel={tensor_parallel}: must be one of "
            f"{', '.join(DEVICES)} and at least 1."
        )
    source = Path(directory).resolve()
    saved = _quantization(source)
    config = AutoConfig.from_pretrained(source)
    findings = _Findings()
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    if "LlavaForConditionalGeneration" not in (config.architectures or ()) or vision not in _VISION:
        findings.add(
            "model",
            f"{config.architectures}",
            f"with the vision encoder {vision} is no LLaVA that these rules know",
        )
        return findings.all()
    del config.quantization_config
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    setting = _Setting(device=device, devices=tensor_parallel, dtype=config.dtype or torch.float32)
    nested = has_nested_vision(config)
    linears = [
        _linear(
            hub_name(f"{name}.weight", nested_vision=nested).removesuffix(".weight"), module, saved
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    expected = {
        hub_name(name, nested_vision=nested): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    _check_heads(config, setting, findings)
    for linear in linears:
        _check_linear(linear, setting, findings)
    for part in _fused_parts(linears):
        _check_fused(part, setting, findings)
    _check_tensors(source, expected, linears, findings)
    return findings.all()


def _quantization(source: Path) -> Mapping[str, Any]:
    if not (source / "config.json").is_file():
        raise ValueError(
            f"{source}: holds no config.json: name the directory that qvlm export wrote."
        )
    saved = json.loads((source / "config.json").read_text(encoding="utf-8")).get(
        "quantization_config"
    )
    method = saved.get("quant_method") if isinstance(saved, Mapping) else None
    if method != "compressed-tensors":
        raise ValueError(
            f"{source}: quant_method is {method!r}, which vLLM does not run as it is: qvlm export "
            f"writes what it runs."
        )
    groups = saved.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) and groups else [{}]:
        if not set(group.get("weights") or ()) >= _WEIGHTS or not group.get("targets"):
            raise ValueError(
                f"{source}: quantization_config has no config_groups with targets and "
                f"{sorted(_WEIGHTS)}: export it again."
            )
    return saved


def _linear(name: str, module: nn.Linear, saved: Mapping[str, Any]) -> _Linear:
    return _Linear(
        name=name,
        in_features=module.in_features,
        out_features=module.out_features,
        group=_group_of(name, saved),
    )


def _group_of(name: str, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config group of a module: by its name first, by its class then; the output head has a class of its own."""
    if any(_fits(pattern, name) for pattern in saved.get("ignore") or ()):
        return None
    filled = [
        {**group, "format": group.get("format") or saved.get("format")}
        for group in saved["config_groups"].values()
    ]
    groups = [(target, group) for group in filled for target in group["targets"]]
    by_name = (group for target, group in groups if _fits(target, name))
    by_class = (
        group
        for target, group in groups
        if target.lower() in "parallellinear" and not name.endswith("lm_head")
    )
    return next(by_name, next(by_class, None))


def _fits(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return _renamed(pattern) == name


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _fused_parts(linears: list[_Linear]) -> Iterator[list[_Linear]]:
    """What vLLM makes one module of: trios, pairs and single modules."""
    by_name = {linear.name: linear for linear in linears}
    for linear in linears:
        family = next((family for family in _FUSED if linear.last in family), (linear.last,))
        if linear.last == family[0]:
            parent = linear.name.removesuffix(linear.last)
            yield [by_name[parent + last] for last in family if parent + last in by_name]


def _check_heads(config: Any, setting: _Setting, findings: _Findings) -> None:
    text, vision, devices = config.get_text_config(), config.vision_config, setting.devices
    for name, heads in (
        ("language model", text.num_attention_heads),
        ("vision encoder", vision.num_attention_heads),
    ):
        if heads % devices:
            findings.add(
                "parallel", name, f"{heads} attention heads are not divided by {devices} devices"
            )
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if kv_heads % devices and devices % kv_heads:
        findings.add(
            "parallel",
            "language model",
            f"{kv_heads} key-value heads are neither divided nor repeated on {devices} devices",
        )


def _check_linear(linear: _Linear, setting: _Setting, findings: _Findings) -> None:
    split_inputs = linear.last in _SPLIT_INPUTS
    length, what = (
        (linear.in_features, "inputs") if split_inputs else (linear.out_features, "outputs")
    )
    if length % setting.devices and linear.last != "lm_head":  # the head is padded
        findings.add(
            "parallel", linear.name, f"{length} {what} are not divided by {setting.devices} devices"
        )
        return
    if linear.group is None:
        return
    weights, inputs = linear.group["weights"], linear.group.get("input_activations")
    reason = _refused(weights, inputs, linear.group.get("format"))
    if reason is not None:
        findings.add("scheme", linear.name, reason)
        return
    here = linear.in_features // setting.devices if split_inputs else linear.in_features
    size = weights.get("group_size")
    if weights["strategy"] == "group" and here % size:
        findings.add(
            "groups", linear.name, f"{here} inputs on a device are not whole groups of {size}"
        )
    if inputs is None and split_inputs and setting.devices > 1 and here * weights["num_bits"] % 32:
        findings.add(
            "groups",
            linear.name,
            f"{here} inputs on a device do not fill whole words at {weights['num_bits']} bits",
        )


def _refused(
    weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, form: str | None
) -> str | None:
    """Why no scheme of vLLM takes these arguments, or None."""
    bits, strategy = weights["num_bits"], weights["strategy"]
    if weights["type"] != "int" or weights.get("dynamic"):
        return "weights must be static integers"
    if inputs is None:
        right = form == "pack-quantized" and 2 <= bits <= 8 and strategy in ("channel", "group")
        return (
            None
            if right
            else f"{form} weights of {bits} bits, strategy {strategy}, with floating-point inputs, "
            f"are run by no scheme"
        )
    kinds = (inputs["strategy"], bool(inputs.get("dynamic")))
    right = (
        form == "int-quantized" and bits == inputs["num_bits"] == 8 and weights["symmetric"] and strategy in ("channel", "tensor")
        and inputs["type"] == "int" and kinds in (("token", True), ("tensor", False))
    )  # fmt: skip
    return (
        None
        if right
        else f"{form} W{bits}A{inputs['num_bits']}, weights per {strategy}, inputs per {kinds[0]}, "
        f"is run by no scheme"
    )


def _check_fused(parts: list[_Linear], setting: _Setting, findings: _Findings) -> None:
    """The rules for what vLLM runs as one module; `parts` share their inputs."""
    first = parts[0]
    if any((part.group is None) != (first.group is None) for part in parts):
        findings.add(
            "fused",
            first.name,
            f"some of {', '.join(part.last for part in parts)} are quantized and some are not",
        )
        return
    if first.group is None:
        return
    if any(part.group != first.group for part in parts):
        findings.add(
            "fused",
            first.name,
            f"{', '.join(part.last for part in parts)} are in different config groups",
        )
        return
    weights = first.group["weights"]
    if (
        first.group.get("input_activations") is not None
    ):  # int8 products have no demands of their own
        return
    split_inputs = first.last in _SPLIT_INPUTS
    outputs = [part.out_features // (1 if split_inputs else setting.devices) for part in parts]
    shared_rows = len(parts) > 1 or (setting.devices > 1 and not split_inputs)
    if (
        not weights["symmetric"]
        and shared_rows
        and any(length * weights["num_bits"] % 32 for length in outputs)
    ):
        findings.add(
            "groups",
            first.name,
            f"packed zero points of {outputs[0]} outputs do not fill whole words",
        )
    _check_kernel(first, sum(outputs), setting, findings)


def _check_kernel(first: _Linear, outputs: int, setting: _Setting, findings: _Findings) -> None:
    group: Any = first.group
    weights = group["weights"]
    bits, symmetric = weights["num_bits"], weights["symmetric"]
    size = weights.get("group_size") if weights["strategy"] == "group" else -1
    inputs = first.in_features // (setting.devices if first.last in _SPLIT_INPUTS else 1)
    if setting.device == "cpu":
        if bits != 4:
            findings.add(
                "kernel",
                first.name,
                f"no CPU kernel has {bits}-bit weights with floating-point inputs, only 4-bit ones",
            )
        elif inputs % 32 or outputs % 32 or (size != -1 and size % 2):
            findings.add(
                "kernel",
                first.name,
                f"the CPU kernel wants multiples of 32, not {inputs} inputs and {outputs} outputs",
            )
        elif setting.dtype == torch.float32:
            findings.add(
                "kernel",
                first.name,
                "the CPU kernel has no float32: serve with --dtype bfloat16",
                fatal=False,
            )
        return
    if size not in _MARLIN_GROUPS or not (bits == 4 or (bits == 8 and symmetric)):
        kind = "symmetric" if symmetric else "asymmetric"
        findings.add(
            "kernel",
            first.name,
            f"Humming runs it; Marlin has no {bits}-bit {kind} weights in groups of {size}",
            fatal=False,
        )
    elif (outputs % 64 or inputs % 128) and (outputs % 128 or inputs % 64):
        findings.add(
            "kernel",
            first.name,
            f"Marlin pads {inputs} inputs and {outputs} outputs at every step",
            fatal=False,
        )


def _check_tensors(
    source: Path,
    expected: Mapping[str, tuple[int, ...]],
    linears: list[_Linear],
    findings: _Findings,
) -> None:
    """Compares the headers of the files with what vLLM makes room for."""
    wanted: _Wanted = {name: (_FLOATS, shape) for name, shape in expected.items()}
    for linear in linears:
        if linear.group is not None:
            del wanted[f"{linear.name}.weight"]
            wanted |= {f"{linear.name}.{part}": kind for part, kind in _parts(linear).items()}
    files = weight_files(source)
    check_files(files, str(source))
    found = {
        _renamed(key): (dtype, shape)
        for file in files
        for key, dtype, shape in tensor_headers(file)
    }
    for name in sorted(wanted.keys() - found.keys()):
        findings.add("names", name, "the tensor is missing")
    for name in sorted(found.keys() - wanted.keys()):
        findings.add("names", name, "vLLM has no place for the tensor")
    for name in sorted(wanted.keys() & found.keys()):
        (dtypes, shape), (dtype, real) = wanted[name], found[name]
        if dtype not in dtypes or real != shape:
            findings.add(
                "tensors",
                name,
                f"is {dtype} {list(real)}, must be {' or '.join(dtypes)} {list(shape)}",
            )


def _parts(linear: _Linear) -> _Wanted:
    """Part -> dtypes and shape of a quantized module."""
    group: Any = linear.group
    weights, rows, length = group["weights"], linear.out_features, linear.in_features
    if group.get("input_activations") is not None:
        parts: _Wanted = {"weight": (("I8",), (rows, length)), "weight_scale": (_FLOATS, (rows, 1))}
        if weights["strategy"] == "tensor":
            parts["weight_scale"] = (_FLOATS, (1,))
        if not group["input_activations"].get("dynamic"):
            parts["input_scale"] = (_FLOATS, (1,))
        return parts
    bits = weights["num_bits"]
    groups = length // weights["group_size"] if weights["strategy"] == "group" else 1
    parts = {
        "weight_packed": (("I32",), (rows, -(-length * bits // 32))),
        "weight_scale": (_FLOATS, (rows, groups)),
        "weight_shape": (("I64",), (2,)),
    }
    if not weights["symmetric"]:
        parts["weight_zero_point"] = (("I32",), (-(-rows * bits // 32), groups))
    return parts
