"""How much of a model is quantized, told in the report of a calibration or of plain rounding."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.models.by_structure import Structure
from qvlm_hf.models.coverage import left_out_by_row, measure_coverage
from qvlm_hf.models.experts import experts_split

__all__ = ["with_coverage"]

_FEW_PERCENT = 80  # of the weights; below, little is gained


def with_coverage(
    report: CalibrationReport,
    model: nn.Module,
    settings: CalibrationSettings,
    structure: Structure | None = None,
) -> CalibrationReport:
    """Adds to a report how many percent of the weights are quantized; few are a warning.

    `structure` is of a model without a row.
    """
    with experts_split(model):
        left_out: Mapping[str, str] = (
            left_out_by_row(model, settings.selection) if structure is None else structure.left_out
        )
        found = measure_coverage(model, report.modules, left_out).summary()
    warnings = report.warnings
    if found["percent"] < _FEW_PERCENT:
        rest = ", ".join(f"{reason} {percent}%" for reason, percent in found["kept"].items())
        few = f"only {found['percent']}% of the weights are quantized; the rest: {rest}."
        warnings = (*warnings, few)
    return replace(report, provenance=report.provenance | {"coverage": found}, warnings=warnings)
