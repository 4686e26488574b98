"""What a saved directory holds, for its model card: configuration, report, linear modules and bytes, without reading a weight.

config.json says which modules are quantized and how; the model is built from it on the meta device
for the sizes in full precision; the headers of the safetensors files give the bytes as they lie on
disk. A directory without report is described by its configuration.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvlm_hf.calibration.report import CalibrationReport
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hub.payload import read_header, weight_files
from qvlm_hf.models.families import component_finder
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.footprint import footprint

__all__ = [
    "REPORT_NAME",
    "Component",
    "Contents",
    "LinearModule",
    "read_contents",
    "read_quantization",
    "read_report",
    "read_report_file",
]

REPORT_NAME = "qvlm_report.json"
_NO_SETTINGS = ("quant_method", "format_version", "scheme", "provenance", "modules")


@dataclass(frozen=True, kw_only=True)
class LinearModule:
    """One linear module: canonical name, component, number of weights, and its scheme; None is full precision."""

    name: str
    component: str
    weights: int
    scheme: QuantScheme | None


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of the model: its parameters, in linear modules and outside, and the bytes of its tensors in bfloat16 and on disk."""

    name: str
    parameters: int
    bfloat16_bytes: int
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A saved directory.

    Attributes:
        family: model type, as "llava".
        dtype: of everything that is not quantized, as "float16".
        scheme: what was asked for, as "W4A4".
        quantization: `quantization_config` of config.json.
        report: qvlm_report.json, or as much of it as config.json knows.
        modules: every linear module, in model order.
        components: those that have parameters, in the order of `COMPONENTS`.
    """

    family: str
    dtype: str
    scheme: str
    quantization: dict[str, Any]
    report: CalibrationReport
    modules: tuple[LinearModule, ...]
    components: tuple[Component, ...]

    @property
    def bfloat16_bytes(self) -> int:
        """Of all tensors, were they bfloat16."""
        return sum(part.bfloat16_bytes for part in self.components)

    @property
    def stored_bytes(self) -> int:
        """Of all tensors, as they are on disk."""
        return sum(part.stored_bytes for part in self.components)


def read_contents(folder: Path) -> Contents:
    """Reads a directory that `save_quantized` wrote, its card apart.

    Raises:
        ValueError: it holds no model quantized by qvlm_hf, or its weights are missing.
    """
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
    )  # not at the top: Transformers' modeling code takes a second

    quantization = read_quantization(folder)
    report = read_report(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    component_of = component_finder(model)
    stored = _stored_bytes(folder, component_of)
    rows = footprint(model, {}, dtype=torch.bfloat16).rows
    return Contents(
        family=config.model_type,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        scheme=str(quantization["scheme"]),
        quantization=quantization,
        report=report,
        modules=_linear_modules(model, report.modules, component_of),
        components=tuple(
            Component(
                name=row.component,
                parameters=row.parameters,
                bfloat16_bytes=row.full_precision_bytes,
                stored_bytes=stored[row.component],
            )
            for row in rows
        ),
    )


def read_report(folder: Path) -> CalibrationReport:
    """The report of a saved directory; where its file is missing, the settings, provenance and modules of config.json.

    Raises:
        ValueError: the directory holds no model quantized by qvlm_hf, or the report is damaged.
    """
    quantization = read_quantization(folder)
    file = folder / REPORT_NAME
    if file.is_file():
        return read_report_file(file)
    return CalibrationReport(
        settings={name: value for name, value in quantization.items() if name not in _NO_SETTINGS},
        provenance=quantization["provenance"],
        modules={
            name: QuantScheme.from_dict(entry) for name, entry in quantization["modules"].items()
        },
    )


def read_report_file(file: Path) -> CalibrationReport:
    """A qvlm_report.json.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    try:
        return CalibrationReport.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{REPORT_NAME}: is no JSON ({error}): delete it, or quantize the model again."
        ) from error
    except (
        ValueError,
        AttributeError,
    ) as error:  # of UTF-8, of fields, of a list where a mapping should be
        raise ValueError(
            f"{REPORT_NAME}: cannot be used ({str(error).rstrip('.')}): delete it, or quantize the "
            f"model again."
        ) from error


def read_quantization(folder: Path) -> dict[str, Any]:
    """`quantization_config` of a saved directory's config.json.

    Raises:
        ValueError: the directory holds no model quantized by qvlm_hf.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder.resolve().name}: has no readable config.json: name a directory that qvlm quantize wrote."
        ) from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "qvlm":
        raise ValueError(
            f"{folder.resolve().name}: is not quantized by qvlm_hf: name a directory that qvlm quantize wrote."
        )
    return quantization


def _linear_modules(
    model: nn.Module, schemes: Mapping[str, QuantScheme], component_of: Callable[[str], str]
) -> tuple[LinearModule, ...]:
    linears = (
        (canonical_name(name), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    return tuple(
        LinearModule(
            name=name,
            component=component_of(name),
            weights=module.weight.numel(),
            scheme=schemes.get(name),
        )
        for name, module in linears
    )


def _stored_bytes(folder: Path, component_of: Callable[[str], str]) -> Counter[str]:
    """Component -> bytes of its tensors, from the headers of the files that make up the model."""
    stored: Counter[str] = Counter()
    for name in weight_files(folder):
        for key, entry in json.loads(read_header(folder / name)).items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                stored[component_of(key)] += end - start
    return stored
