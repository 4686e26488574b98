"""What of a model is quantized under some settings, and whether its weights can be."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.grids import not_finite
from qvlm_hf.format.scheme import is_per_position
from qvlm_hf.models.find_parts import find_parts
from qvlm_hf.models.folds import rotation_plan
from qvlm_hf.models.graph import Segment, output_head, resolve, why_empty

__all__ = ["check_weights", "resolve_segments", "why_unreached"]


def resolve_segments(model: nn.Module, settings: CalibrationSettings) -> tuple[Segment, ...]:
    """`resolve` with the options of `settings`; `model` may be on the meta device.

    Raises:
        ValueError: as `resolve`, and as `output_head` and `rotation_plan` where they are asked for;
            ranges per position for a component whose number of positions is not fixed.
    """
    if settings.lm_head_bits is not None:
        output_head(model)
    if settings.rotation == "hadamard":
        rotation_plan(model)
    segments = resolve(model, settings.selection, rotated=settings.rotation is not None)
    for segment in segments:
        if segment.packed and is_per_position(settings.start_granularity(segment.component)):
            raise ValueError(
                f"activation_granularity='token' for {segment.component} needs a fixed number of "
                f"positions, which the pictures of this model do not have: use 'channel'."
            )
    return segments


def check_weights(segments: Sequence[Segment]) -> None:
    """Finds a broken checkpoint here and not after the search.

    Raises:
        ValueError: a weight is empty (on the meta device), or holds NaN or infinity; or a module
            computes by a function of its own.
    """
    sites = (site for segment in segments for site in segment.sites)
    named = (pair for site in sites for pair in zip(site.modules, site.linears, strict=True))
    for name, linear in named:
        if linear.weight.is_meta:
            raise ValueError(f"{name} {why_empty(linear)}, then quantize it.")
        runs: Any = getattr(linear.forward, "__func__", None)
        if runs is not nn.Linear.forward and not hasattr(linear, "_hf_hook"):  # accelerate's
            raise ValueError(
                f"{name} has a forward function of its own, which quantizing would lose: delete "
                f"it, or leave the module out (modules_to_not_convert=)."
            )
        if not torch.isfinite(linear.weight).all():
            raise ValueError(f"the weight of {name} {not_finite(linear.weight.dtype)}")


def why_unreached(model: nn.Module, segment: Segment, samples: int) -> str:
    """Says that none of so many samples has what a segment reads, and what to do, for messages."""
    none = f"calibration did not reach {segment.name}: none of the {samples}"
    if segment.component == "language":
        return f"{none} samples has text."
    parts = find_parts(model)
    names = [name for name, one in model.named_modules() if one in (parts.vision, parts.projector)]
    return (
        f"{none} samples has a picture; add pictures to the dataset, or leave the vision side "
        f"alone (modules_to_not_convert={[name.rpartition('.')[2] for name in names]})."
    )
