"""How to repeat a quantization.

Only what shaped the result and differs from the defaults is named. Base model and data set appear
by name, because paths of one machine mean nothing on another.
"""

import json
from collections.abc import Mapping
from typing import Any

from qvlm_hf.calibration.options import SWITCHED_OFF, VisionOptimization
from qvlm_hf.calibration.record.report import CalibrationReport, settings_dict
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.scheme import parse_scheme

__all__ = ["config_arguments"]

_BITS = ("weight_bits", "activation_bits")  # the scheme has them
_OF_CALIBRATION = (
    "num_samples", "batch_size", "max_block_depth", "entropy_threshold", "percentiles", "margins",
)  # fmt: skip
_IN_MEMORY = " in memory"  # ends the name of a data set that is no file


def config_arguments(report: CalibrationReport, scheme: str) -> list[str]:
    """Writes the arguments of QVLMConfig, as "scheme='W4A4'"."""
    fields: dict[str, Any] = {"scheme": scheme}
    fields |= {"activation_granularity": "dynamic_token"} if _is_dynamic(report, scheme) else {}
    fields |= _asked(report, scheme)
    usual = settings_dict(CalibrationSettings(optimize_vision=VisionOptimization()))
    if fields.get("optimize_vision") == usual["optimize_vision"]:
        fields["optimize_vision"] = True  # nobody wants to read its fields
    arguments = [f"{name}={_literal(value)}" for name, value in fields.items()]
    if (data := report.provenance.get("dataset")) is not None:
        samples = "samples" if data.endswith(_IN_MEMORY) else _literal(data)
        # "fixed": what a comparison of recipes took stands in the fields
        arguments[1:1] = [f"dataset={samples}", "processor=processor", 'recipe="fixed"']
    return arguments


def _is_dynamic(report: CalibrationReport, scheme: str) -> bool:
    """Whether weights were rounded without data and activations are at run time."""
    return "dataset" not in report.provenance and parse_scheme(scheme)[1] < 16


def _asked(report: CalibrationReport, scheme: str) -> dict[str, Any]:
    """The settings that are not what `scheme` alone would give."""
    bits: dict[str, Any] = dict(zip(_BITS, parse_scheme(scheme), strict=True))
    skipped: tuple[str, ...] = (*_BITS, "strict", "recipe")
    without_data: dict[str, Any] = {}
    if "dataset" not in report.provenance:  # as QVLMConfig.settle_without_data leaves them
        granularity = "dynamic_token" if _is_dynamic(report, scheme) else None
        without_data = {"activation_granularity": granularity, **SWITCHED_OFF}
        skipped += _OF_CALIBRATION + (() if report.settings.get("rotation") else ("seed",))
    usual = settings_dict(
        CalibrationSettings(**{**bits, "recipe": "fixed", **without_data}).for_model(rotatable=True)
    )
    found: Mapping[str, Any] = report.settings
    if found["modules_to_not_convert"] is None:
        found = {**found, "modules_to_not_convert": []}
    return {
        name: value for name, value in found.items() if name not in skipped and value != usual[name]
    }


def _literal(value: Any) -> str:
    """A value as Python writes it, with double quotes."""
    return repr(value) if value is None or isinstance(value, bool) else json.dumps(value)
