"""What quantizing a model will take, before a weight is read: time, memory and disk.

Shapes and a few samples tell it (calibration/estimate/). A run that cannot fit into the machine is
refused with what would make it fit.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qvlm_hf.calibration.estimate.memory import (
    Memory,
    count_memory,
    count_rounding_memory,
    model_bytes,
    packed_bytes,
)
from qvlm_hf.calibration.estimate.seconds import (
    Rates,
    count_seconds,
    measure_rates,
    rounding_seconds,
)
from qvlm_hf.calibration.estimate.sums import Data
from qvlm_hf.calibration.options import size_in_bytes
from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.capacity import free_disk, free_memory, whole_memory
from qvlm_hf.calibration.samples import Sample
from qvlm_hf.calibration.search.budget import WIDTHS, room_in, saved_bytes
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.sample_tokens import count_data
from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.families import has_row
from qvlm_hf.models.folds import why_not_rotatable
from qvlm_hf.models.graph import Segment
from qvlm_hf.quantize import CHECK_SAMPLES
from qvlm_hf.recipes import (
    JUDGES,
    JUDGING_TEXTS,
    TRIAL_SAMPLES,
    planned_recipes,
    trial_settings,
)

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["Expected", "check_disk", "check_memory", "expect", "gigabytes", "preflight"]

# Of measured to expected seconds, and memory: docs/scaling.md.
_FASTER, _SLOWER = 0.6, 1.4
_TOO_HIGH = 1.3
_SHOWN = 10.0  # seconds from which a run says beforehand how long it will take


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a run takes.

    Attributes:
        config: of the run.
        seconds: step -> seconds, trials of recipes as one step.
        held: bytes of main memory at the peak, with and without scratch files.
        weights: bytes of the model besides, mapped from its files where they have its dtype.
        result: bytes of the saved weights.
        device: bytes of a GPU's memory, where the whole model is on one.
        kept: bytes of what `resume_dir` keeps.
        data: samples; None where none are used.
    """

    config: QVLMConfig
    seconds: Mapping[str, float]
    held: Memory
    weights: float
    result: float
    device: float
    kept: float = 0.0
    data: Data | None = None

    @property
    def memory(self) -> float:
        """Bytes of main memory at the peak of this run."""
        return self.held.together if self.config.scratch_dir is None else self.held.working

    @property
    def duration(self) -> str:
        """The span of likely times, in words."""
        whole = sum(self.seconds.values())
        low, high = _FASTER * whole, _SLOWER * whole
        units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
        unit, length = next((pair for pair in units if high >= 2 * pair[1]), units[-1])
        digits = 0 if low >= 9.5 * length else 1
        return f"{low / length:.{digits}f} to {high / length:.{digits}f} {unit}"

    def __str__(self) -> str:
        disk = f"{gigabytes(self.result)} of disk for the result"
        return f"{self.duration}, {gigabytes(self.memory)} of memory and {disk}"


def preflight(
    model: PreTrainedModel,
    config: QVLMConfig,
    samples: Sequence[Sample] | None,
    device_map: Any = None,
) -> dict[str, float]:
    """`expect`, told on standard error where it is not over at once, and checked.

    Callbacks in the configuration take the place of what is told, as of the progress bar. Where
    layers are spread over several devices, their memory is not checked. Returns seconds by step.

    Raises:
        ValueError: memory, or the disk of `resume_dir` or `scratch_dir`, is too small; or as
            `expect`.
    """
    devices = _devices(device_map)
    expected = expect(model, config, samples, device=devices[0])
    if config.resume_dir is not None:
        check_disk(expected.kept, config.resume_dir, "steps to resume from")
    if config.scratch_dir is not None:
        check_disk(expected.held.kept, config.scratch_dir, "scratch files")
    warning = check_memory(expected, devices[0]) if len(devices) == 1 else None
    told = ranks.is_main() and not config.callbacks
    if told and sum(expected.seconds.values()) >= _SHOWN:
        sys.stderr.write(f"qvlm expects {expected}\n")
        sys.stderr.flush()
    if warning is not None:
        logging.getLogger(__name__).warning("%s", warning)
    return dict(expected.seconds)


def _devices(device_map: Any) -> list[torch.device]:
    """Where layers will lie; Transformers makes a dict of all maps but None and "auto"."""
    if isinstance(device_map, dict):
        named = (f"cuda:{p}" if isinstance(p, int) else str(p) for p in device_map.values())
        return [torch.device(p) for p in sorted(set(named) - {"cpu", "disk"}) or ["cpu"]]
    count = torch.cuda.device_count() if device_map else 0
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def expect(
    model: PreTrainedModel,
    config: QVLMConfig,
    samples: Sequence[Sample] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Expected:
    """What quantizing a model takes.

    Without samples a picture of the configured size and some text are assumed where they are
    needed.

    Raises:
        ValueError: as `resolve_segments`, a sample is wrong, or `precision_budget` too small.
    """
    with experts_split(model):  # as calibration does
        return _expect(model, config, samples, torch.device(device))


def _expect(
    model: PreTrainedModel,
    config: QVLMConfig,
    samples: Sequence[Sample] | None,
    device: torch.device,
) -> Expected:
    rates = measure_rates(device, model.dtype)
    asked = config.settings()
    settings = asked.for_model(rotatable=has_row(model) and not why_not_rotatable(model))
    segments = resolve_segments(model, settings) if has_row(model) else ()
    quantized = _quantized(model, segments)
    held, weights = (
        count_rounding_memory(model, quantized, settings),
        model_bytes(model, model.dtype),
    )
    rounded = Expected(
        config=config,
        seconds={"rounding": rounding_seconds(quantized, rates)},
        held=held,
        weights=weights,
        device=held.together + weights,
        result=_result_bytes(model, segments, asked, quantized),
    )
    if config.dataset is None and not settings.needs_data:
        return rounded
    data = count_data(model, config, samples)
    seconds = count_seconds(model, segments, settings, data, rates)
    if settings.recipe == "auto":
        seconds = {"recipes": _trial_seconds(model, asked, data, rates)} | seconds
    on_device = count_memory(model, segments, settings, data, model.dtype.itemsize)
    return replace(
        rounded,
        seconds=seconds,
        held=count_memory(model, segments, settings, data),
        device=on_device.together + weights,
        kept=packed_bytes(quantized, settings),
        data=data,
    )


def _quantized(model: PreTrainedModel, segments: Sequence[Segment]) -> int:
    """How many weights are quantized; without segments, of all matrices."""
    if not segments:
        return sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    sites = (site for segment in segments for site in segment.sites)
    return sum(linear.weight.numel() for site in sites for linear in site.linears)


def _result_bytes(
    model: PreTrainedModel,
    segments: Sequence[Segment],
    settings: CalibrationSettings,
    quantized: int,
) -> float:
    budget = settings.precision_budget
    if not (segments and isinstance(budget, str)):
        floats = model_bytes(model, model.dtype) - quantized * model.dtype.itemsize
        return floats + packed_bytes(quantized, settings)
    costs, rest = saved_bytes(model, segments, _largest(model, settings))
    room_in(budget, costs, rest)
    return min(size_in_bytes(budget), rest + sum(cost[WIDTHS[-1]] for cost in costs.values()))


def _largest(model: PreTrainedModel, settings: CalibrationSettings) -> CalibrationSettings:
    """The settings with the recipe whose result is largest, where they leave it open."""
    rotatable = not why_not_rotatable(model)
    if settings.recipe == "fixed":
        return settings.for_model(rotatable=rotatable)
    fields, changes = planned_recipes(settings, rotatable=rotatable)
    recipes = (fields, *changes)
    if any(recipe.get("rotation") for recipe in recipes):  # it unties the output head
        fields = fields | {"rotation": "hadamard"}
    if any(recipe.get("activation_granularity", "") is None for recipe in recipes):  # searched
        fields = fields | {"activation_granularity": None}
    return replace(settings, recipe="fixed", **fields)


def _trial_seconds(
    model: PreTrainedModel, settings: CalibrationSettings, data: Data, rates: Rates
) -> float:
    """Of the trials of recipes.py."""
    few = min(TRIAL_SAMPLES, (data.samples + 1) // 2)
    judges = min(JUDGES, data.samples - few + CHECK_SAMPLES)
    quick = replace(data, samples=few, checks=judges + JUDGING_TEXTS)
    seconds = 0.0
    first, changes = planned_recipes(settings, rotatable=not why_not_rotatable(model))
    for change in ({}, *changes):
        tried = trial_settings(settings, first | change)
        steps = count_seconds(model, resolve_segments(model, tried), tried, quick, rates)
        seconds += sum(steps.values()) - steps["entropy"]  # which trials leave out
    return seconds


def check_memory(expected: Expected, device: torch.device | None = None) -> str | None:
    """Compares with the memory that this process may have, or with that of a GPU.

    Returns:
        A warning where only what others hold now is in the way; None where it fits.

    Raises:
        ValueError: there is not as much, with what would make it fit.
    """
    needed: float
    free: float
    whole: float
    if device is not None and device.type == "cuda":
        needed, (free, whole) = expected.device, torch.cuda.mem_get_info(device)
    else:
        weights = expected.weights
        needed, free, whole = expected.memory, free_memory(weights), whole_memory(weights)
    if needed > whole * _TOO_HIGH:
        raise ValueError(
            f"about {gigabytes(needed)} of memory are needed, and this process may have "
            f"{gigabytes(whole)}: {_remedy(expected)}"
        )
    if needed > free:
        return (
            f"about {gigabytes(needed)} of memory are expected and {gigabytes(free)} are free: end "
            f"other programs, or {_remedy(expected)}"
        )
    return None


def _remedy(expected: Expected) -> str:
    """What takes less memory."""
    more, config = "take a machine with more", expected.config
    ways = {
        "scratch_dir=": config.scratch_dir is None,
        "max_block_depth=1": config.max_block_depth > 1,
        f"num_samples={TRIAL_SAMPLES}": config.num_samples > TRIAL_SAMPLES,
    }
    named = [way for way, is_left in ways.items() if is_left and expected.data is not None]
    return f"{more}, or {', '.join(named)} (each takes less)." if named else f"{more}."


def check_disk(size: float, folder: str, what: str) -> None:
    """Checks that the disk of a folder, which need not exist, has room for so many bytes.

    Raises:
        ValueError: it has not.
    """
    free = free_disk(folder)
    if size > free:
        raise ValueError(
            f"{folder}: no room for {gigabytes(size)} of {what}, {gigabytes(free)} are free: "
            f"make room, or name a directory on another disk."
        )


def gigabytes(size: float) -> str:
    """A size for messages."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
