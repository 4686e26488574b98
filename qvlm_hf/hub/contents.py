"""What a saved directory holds: configuration, report, linear modules and bytes, no weight read."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvlm_hf.calibration.report import CalibrationReport
from qvlm_hf.format.files import tensor_headers, weight_files
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.families import component_finder
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.footprint import Footprint, footprint

__all__ = [
    "REPORT_NAME",
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
    """One linear module; without a scheme it is in full precision."""

    name: str
    component: str
    weights: int
    scheme: QuantScheme | None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A saved directory.

    Attributes:
        family: model type, as "llava".
        dtype: of everything that is not quantized, as "float16".
        scheme: what was asked for, as "W4A4".
        report: qvlm_report.json, or as much of it as config.json knows.
        modules: every linear module, in model order.
        sizes: bytes of every component in bfloat16 and on disk.
    """

    family: str
    dtype: str
    scheme: str
    report: CalibrationReport
    modules: tuple[LinearModule, ...]
    sizes: Footprint


def read_contents(folder: Path) -> Contents:
    """Reads a directory that `save_quantized` wrote.

    Raises:
        ValueError: it holds no model quantized by qvlm_hf, or its weights are missing.
    """
    # not at the top: Transformers' modeling code takes a second
    from transformers import AutoConfig, AutoModelForImageTextToText

    scheme, report = str(read_quantization(folder)["scheme"]), read_report(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    component_of = component_finder(model)
    stored: Counter[str] = Counter()
    for header in (header for file in weight_files(folder) for header in tensor_headers(file)):
        stored[component_of(header.key)] += header.nbytes
    rows = footprint(model, {}, dtype=torch.bfloat16).rows
    return Contents(
        family=config.model_type,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        scheme=scheme,
        report=report,
        modules=tuple(_linear_modules(model, report.modules, component_of)),
        sizes=Footprint(
            rows=tuple(replace(row, quantized_bytes=stored[row.component]) for row in rows)
        ),
    )


def read_report(folder: Path) -> CalibrationReport:
    """Reads the report, or what config.json knows of it where the file is missing.

    Raises:
        ValueError: the directory holds no model quantized by qvlm_hf, or the report is damaged.
    """
    quantization = read_quantization(folder)
    if (file := folder / REPORT_NAME).is_file():
        return read_report_file(file)
    return CalibrationReport(
        settings={name: value for name, value in quantization.items() if name not in _NO_SETTINGS},
        provenance=quantization["provenance"],
        modules={
            name: QuantScheme.from_dict(entry) for name, entry in quantization["modules"].items()
        },
    )


def read_report_file(file: Path) -> CalibrationReport:
    """Reads a qvlm_report.json.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    try:
        return CalibrationReport.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:  # of JSON, UTF-8, fields, a list for a mapping
        no_json = isinstance(error, json.JSONDecodeError)
        raise ValueError(
            f"{REPORT_NAME}: {'is no JSON' if no_json else 'cannot be used'} "
            f"({str(error).rstrip('.')}): delete it, or quantize the model again."
        ) from error


def read_quantization(folder: Path) -> dict[str, Any]:
    """Reads `quantization_config` from config.json.

    Raises:
        ValueError: the directory holds no model quantized by qvlm_hf.
    """
    remedy = "name a directory that qvlm quantize wrote"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder.resolve().name}: has no readable config.json: {remedy}."
        ) from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "qvlm":
        raise ValueError(f"{folder.resolve().name}: is not quantized by qvlm_hf: {remedy}.")
    return quantization


def _linear_modules(
    model: nn.Module, schemes: Mapping[str, QuantScheme], component_of: Callable[[str], str]
) -> list[LinearModule]:
    with experts_split(model):
        modules = list(model.named_modules())
    return [
        LinearModule(
            name=(name := canonical_name(path)),
            component=component_of(name),
            weights=module.weight.numel(),
            scheme=schemes.get(name),
        )
        for path, module in modules
        if isinstance(module, nn.Linear)
    ]
