"""Rounding without data, planned before a weight is read: which modules get which scheme."""

from collections.abc import Mapping, Sequence

from torch import nn

from qvlm_hf.calibration.provenance import versions
from qvlm_hf.calibration.report import CalibrationReport, settings_dict
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import Segment, full_precision_modules, output_head

__all__ = ["rounding_report", "rounding_schemes"]


def rounding_schemes(
    model: nn.Module, segments: Sequence[Segment], settings: CalibrationSettings
) -> dict[str, QuantScheme]:
    """The scheme of every module that no search decides; its granularity is the component's first.

    Args:
        model: of a known family, on any device.
        segments: of the model.
        settings: bits, groups, granularity, output head.

    Returns:
        Canonical module name -> scheme, the output head first.
    """
    head = settings.head_scheme()
    schemes = {} if head is None else {output_head(model): head}
    for segment in segments:
        granularity = settings.start_granularity(segment.component)
        for site in (site for layer in segment.layers for site in layer.sites):
            schemes |= dict.fromkeys(
                site.modules, settings.module_scheme(granularity, site.hadamard)
            )
    return schemes


def rounding_report(
    model: nn.Module,
    segments: Sequence[Segment],
    schemes: Mapping[str, QuantScheme],
    settings: CalibrationSettings,
) -> CalibrationReport:
    """The report of a model that is rounded without data; arguments as of `rounding_schemes`."""
    return CalibrationReport(
        settings=settings_dict(settings),
        provenance={"versions": versions()},
        modules=dict(schemes),
        dead=tuple(layer.name for segment in segments for layer in segment.layers if layer.dead),
        full_precision=tuple(
            name for name in full_precision_modules(model, segments) if name not in schemes
        ),
    )
