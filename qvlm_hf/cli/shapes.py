"""Models by their configuration alone: what would be quantized of them, and how large they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qvlm_hf.bench.shapes import SHAPES, shape_config
from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.without_data import rounding_report, rounding_schemes
from qvlm_hf.cli.loading import read_loadable
from qvlm_hf.format.scheme import parse_scheme
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.models.by_structure import Structure
from qvlm_hf.models.families import has_row
from qvlm_hf.models.folds import why_not_rotatable
from qvlm_hf.models.graph import Segment
from qvlm_hf.models.parts import shared_weights
from qvlm_hf.recipes import likely

__all__ = ["Plan", "plan", "read_shape"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a scheme would do to a model.

    Attributes:
        segments: layers and sites; none for a family without a row, which only a run tells.
        report: modules, and percent of the weights. Of a family without a row it is the most that
            a run can find.
    """

    segments: tuple[Segment, ...]
    report: CalibrationReport


def read_shape(name: str) -> Any:
    """The configuration behind one of `SHAPES`, a config.json, its directory or a Hub id.

    Raises:
        ValueError: there is none, or it is of another kind of model.
        OSError: the Hub has none; as ConnectionError if it cannot be asked.
    """
    if name in SHAPES:
        return shape_config(name)
    if not Path(name).exists() and "/" not in name:
        raise ValueError(
            f"shape {name!r} is unknown: give a config.json, its directory, a Hub id or one of "
            f"{', '.join(SHAPES)}."
        )
    return read_loadable(name)


def plan(
    model: Any, scheme: str, *, group_size: int | None = None, lm_head_bits: int | None = None
) -> Plan:
    """Plans a scheme for a model on the meta device, with the recipe that is likely best.

    Raises:
        ValueError: the scheme is unknown, or the model lacks a part that its row names.
    """
    fields: dict[str, Any] = {"scheme": scheme, "lm_head_bits": lm_head_bits}
    fields |= {} if group_size is None else {"group_size": group_size}
    if has_row(model):
        settings = likely(QVLMConfig(**fields).settings(), rotatable=not why_not_rotatable(model))
        segments = resolve_segments(model, settings)
        schemes = rounding_schemes(model, segments, settings)
        return Plan(segments=segments, report=rounding_report(model, segments, schemes, settings))
    if parse_scheme(scheme)[1] < 16:
        fields["activation_granularity"] = "dynamic_token"
    settings = QVLMConfig(**fields).settings()
    head, shared = model.get_output_embeddings(), shared_weights(model)
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and name not in shared
    ]
    left_out = {name: "output head" for name, module in model.named_modules() if module is head}
    schemes = dict.fromkeys(names, settings.module_scheme(settings.start_granularity("language")))
    structure = Structure((), left_out, "not run", {})
    return Plan(segments=(), report=rounding_report(model, (), schemes, settings, structure))
