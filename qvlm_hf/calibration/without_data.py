"""Rounding without data: which modules get which scheme, and what the report says.

Of a family with a row it is planned before a weight is read; any other is read by structure.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from qvlm_hf.calibration.record.provenance import versions
from qvlm_hf.calibration.record.quantized_share import with_coverage
from qvlm_hf.calibration.record.report import CalibrationReport, settings_dict
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.by_structure import Structure, read_structure
from qvlm_hf.models.families import check_row, has_row
from qvlm_hf.models.graph import Segment, full_precision_modules, output_head

__all__ = ["by_structure", "read_without_row", "rounding_report", "rounding_schemes"]


def by_structure(model: nn.Module, settings: CalibrationSettings) -> bool:
    """Tells whether a model has no row in the table of families, and the settings need none.

    Raises:
        ValueError: it has none and they do.
    """
    if has_row(model):
        return False
    if settings.needs_data or settings.rotation is not None or settings.lm_head_bits is not None:
        check_row(model)
    return True


def read_without_row(model: nn.Module, settings: CalibrationSettings) -> Structure | None:
    """Runs a model without a row once and tells its structure; None for one that has a row.

    Raises:
        ValueError: as `by_structure` and `read_structure`.
    """
    if not by_structure(model, settings):
        return None
    return read_structure(model, settings.selection)


def rounding_schemes(
    model: nn.Module, segments: Sequence[Segment], settings: CalibrationSettings
) -> dict[str, QuantScheme]:
    """The scheme of every module that no search decides; its granularity is the component's first.

    The output head comes first.
    """
    head = settings.head_scheme()
    schemes = {} if head is None else {output_head(model): head}
    for segment in segments:
        granularity = settings.start_granularity(segment.component)
        for site in segment.sites:
            schemes |= dict.fromkeys(
                site.modules, settings.module_scheme(granularity, site.hadamard)
            )
    return schemes


def rounding_report(
    model: nn.Module,
    segments: Sequence[Segment],
    schemes: Mapping[str, QuantScheme],
    settings: CalibrationSettings,
    structure: Structure | None = None,
) -> CalibrationReport:
    """The report of a model that is rounded without data to these schemes."""
    by_structure = {} if structure is None else {"by_structure": structure.run}
    report = CalibrationReport(
        settings=settings_dict(settings),
        provenance={"versions": versions()} | by_structure,
        modules=dict(schemes),
        dead=tuple(layer.name for segment in segments for layer in segment.layers if layer.dead),
        full_precision=tuple(
            name for name in full_precision_modules(model, segments) if name not in schemes
        ),
    )
    return with_coverage(report, model, settings, structure)
