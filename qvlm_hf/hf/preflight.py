"""What quantizing a model will take, before a weight is read: time, memory and disk.

Shapes and a few samples tell it (calibration/estimate/). A run that cannot fit into the machine is
refused with what would make it fit.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from qvlm_hf.calibration.estimate.cost import (
    Data,
    Rates,
    count_work,
    measure_rates,
    rounding_work,
    seconds_of,
)
from qvlm_hf.calibration.estimate.memory import (
    count_memory,
    count_rounding_memory,
    model_bytes,
    packed_bytes,
)
from qvlm_hf.calibration.layers import observe_inputs
from qvlm_hf.calibration.options import size_in_bytes
from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.capacity import free_disk, free_memory, whole_memory
from qvlm_hf.calibration.process.progress import Steps
from qvlm_hf.calibration.record.report import RecipeTrial
from qvlm_hf.calibration.samples import IGNORE_INDEX, Sample, collate, longest_sample
from qvlm_hf.calibration.search.budget import WIDTHS
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.processor_fit import ask_features
from qvlm_hf.models.families import has_row
from qvlm_hf.models.folds import why_not_rotatable
from qvlm_hf.models.graph import Segment
from qvlm_hf.quantize import CHECK_SAMPLES
from qvlm_hf.recipes import JUDGES, JUDGING_TEXTS, TRIAL_SAMPLES, compare_recipes, trial

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = [
    "Expected",
    "check_disk",
    "check_memory",
    "expect",
    "gigabytes",
    "preflight",
    "result_bytes",
]

_CPU = torch.device("cpu")
# Of measured to expected seconds, and memory: docs/scaling.md.
_FASTER, _SLOWER = 0.6, 1.4
_TOO_HIGH = 1.3
_ROUGHLY = 0.95  # small tensors are estimated
_SHOWN = 10.0  # seconds from which a run says beforehand how long it will take
_ASKED = 8  # samples that are rendered to count tokens
_TEXT, _PATCHES = 128, 1024  # assumed of a sample: tokens besides the picture, and of a picture


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a run takes.

    Attributes:
        seconds: step -> seconds, trials of recipes as one step.
        memory: bytes of main memory at the peak, on a CPU.
        working: the same with `scratch_dir`.
        scratch: bytes of scratch files then.
        weights: bytes of the model besides, mapped from its files where they have its dtype.
        device: bytes of a GPU's memory with the model, if it lies there.
        result: bytes of the saved weights.
        kept: bytes of what `resume_dir` keeps.
        data: samples; None where none are used.
        assumed: whether their tokens are a guess.
    """

    seconds: Mapping[str, float]
    memory: float
    working: float
    scratch: float
    weights: float
    device: float
    result: float
    kept: float
    data: Data | None
    assumed: bool

    @property
    def duration(self) -> str:
        """The span of likely times, in words."""
        whole = sum(self.seconds.values())
        return _span(_FASTER * whole, _SLOWER * whole)

    def __str__(self) -> str:
        disk = f"{gigabytes(self.result)} of disk for the result"
        return f"{self.duration}, {gigabytes(self.memory)} of memory and {disk}"


def expect(
    model: PreTrainedModel,
    config: QVLMConfig,
    samples: Sequence[Sample] | None = None,
    *,
    device: torch.device = _CPU,
) -> Expected:
    """What quantizing a model takes.

    Args:
        model: on the meta device, its dtype that of the run.
        config: of the run, its processor for `samples`.
        samples: from `read_samples`; None: pictures of the configured size and some text are
            assumed where samples are needed.
        device: that the model will lie on, whose rates are measured.

    Raises:
        ValueError: as `resolve_segments`, or a sample is wrong.
    """
    settings = config.settings()
    rates = measure_rates(device, model.dtype)
    settings = settings.for_model(rotatable=has_row(model) and not why_not_rotatable(model))
    segments = resolve_segments(model, settings) if has_row(model) else ()
    weights, whole = _quantized(model, segments), model_bytes(model, model.dtype)
    sizes = {"weights": whole, "result": _result_bytes(model, weights, settings)}
    if config.dataset is None and not settings.needs_data:
        memory = count_rounding_memory(model, weights, settings)
        return Expected(
            seconds={"rounding": rates.seconds(rounding_work(weights))},
            memory=memory,
            working=memory,
            scratch=0.0,
            device=memory + whole,
            kept=0.0,
            data=None,
            assumed=False,
            **sizes,
        )
    data = _count_data(model, segments, config, samples)
    steps = seconds_of(count_work(model, segments, settings, data), rates)
    if settings.recipe is not None:
        steps = {"recipes": _trial_seconds(model, settings, data, rates)} | steps
    count = partial(count_memory, model, segments, settings, data)
    found = count(compute=torch.float32)
    return Expected(
        seconds=steps,
        memory=found.together if config.scratch_dir is None else found.working,
        working=found.working,
        scratch=found.kept,
        device=whole + count(compute=model.dtype).together,
        kept=packed_bytes(weights, settings),
        data=data,
        assumed=samples is None,
        **sizes,
    )


def preflight(
    model: PreTrainedModel,
    config: QVLMConfig,
    samples: Sequence[Sample] | None,
    device_map: Any = None,
) -> dict[str, float]:
    """`expect`, told on standard error where it is not over at once, and checked.

    Callbacks in the configuration take the place of what is told, as of the progress bar.

    Args:
        model: on the meta device.
        config: of the run.
        samples: from `read_samples`.
        device_map: that the model will be loaded with.

    Returns:
        Seconds by step.

    Raises:
        ValueError: memory, or the disk of `resume_dir` or `scratch_dir`, is too small; or as
            `expect`.
    """
    devices = _devices(device_map)
    expected = expect(model, config, samples, device=devices[0])
    if config.resume_dir is not None:
        check_disk(expected.kept, config.resume_dir, "steps to resume from")
    if config.scratch_dir is not None:
        check_disk(expected.scratch, config.scratch_dir, "scratch files")
    warning = None
    if len(devices) == 1:  # else nobody knows what lies where
        warning = check_memory(expected, config, devices[0])
    told = ranks.is_main() and not config.callbacks
    if told and sum(expected.seconds.values()) >= _SHOWN:
        sys.stderr.write(f"qvlm expects {expected}\n")
        sys.stderr.flush()
    if warning is not None:
        logging.getLogger(__name__).warning("%s", warning)
    return dict(expected.seconds)


def _devices(device_map: Any) -> list[torch.device]:
    """Where a model will lie, GPUs first; Transformers makes a dict of all but None and "auto"."""
    if isinstance(device_map, dict):
        return sorted({torch.device(place) for place in device_map.values()}, key=_is_cpu)
    gpus = 0 if device_map is None else torch.cuda.device_count()
    return [torch.device("cuda", index) for index in range(gpus)] or [_CPU]


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def check_memory(expected: Expected, config: QVLMConfig, device: torch.device = _CPU) -> str | None:
    """Compares with the memory of the machine, or of a GPU.

    Returns:
        A warning where only what others hold now is in the way; None where it fits.

    Raises:
        ValueError: there is not as much, with what would make it fit.
    """
    needed, owner = expected.memory, "this machine"
    whole, free = whole_memory(), free_memory()
    if device.type == "cuda":
        needed, owner = expected.device, str(device)
        free, whole = torch.cuda.mem_get_info(device)
    if whole is not None and needed > whole * _TOO_HIGH:
        raise ValueError(
            f"about {gigabytes(needed)} of memory are needed, and {owner} has "
            f"{gigabytes(whole)}: {_remedy(expected, config)}"
        )
    if free is not None and needed > free:
        return (
            f"about {gigabytes(needed)} of memory are expected and {gigabytes(free)} of {owner} "
            f"are free: end other programs, or {_remedy(expected, config)}"
        )
    return None


def check_disk(size: float, folder: str, what: str) -> None:
    """Checks that a disk has room.

    Args:
        size: bytes.
        folder: that will be written to; need not exist.
        what: will be written, for the message.

    Raises:
        ValueError: it has not.
    """
    free = free_disk(folder)
    if free is not None and size > free:
        raise ValueError(
            f"{folder}: no room for {gigabytes(size)} of {what}, {gigabytes(free)} are free: "
            f"make room, or name a directory on another disk."
        )


def _remedy(expected: Expected, config: QVLMConfig) -> str:
    """What takes less memory, of a run with this configuration."""
    if expected.data is None:
        return "take a machine with more."
    ways = [] if config.scratch_dir is not None else ["scratch_dir="]
    ways += [] if config.max_block_depth == 1 else ["max_block_depth=1"]
    ways += [] if config.num_samples <= TRIAL_SAMPLES else [f"num_samples={TRIAL_SAMPLES}"]
    return "take a machine with more" + (
        f", or {', '.join(ways)} (each takes less)." if ways else "."
    )


def result_bytes(model: PreTrainedModel, config: QVLMConfig) -> float:
    """Bytes of the saved weights.

    Args:
        model: may be on the meta device.
        config: of the run.

    Raises:
        ValueError: as `resolve_segments`.
    """
    settings = config.settings()
    weights = _quantized(model, resolve_segments(model, settings) if has_row(model) else ())
    return _result_bytes(model, weights, settings)


def _result_bytes(model: PreTrainedModel, weights: int, settings: CalibrationSettings) -> float:
    floats = model_bytes(model, model.dtype) - weights * model.dtype.itemsize
    budget = settings.precision_budget
    if not isinstance(budget, str):
        return floats + packed_bytes(weights, settings)
    fewest = replace(settings, weight_bits=WIDTHS[0], precision_budget=None)
    least = floats + packed_bytes(weights, fewest)
    if size_in_bytes(budget) < _ROUGHLY * least:
        raise ValueError(
            f"precision_budget={budget!r} is below about {gigabytes(least)}, which the model takes "
            f"with weights of {WIDTHS[0]} bits: raise it."
        )
    return size_in_bytes(budget)


def _quantized(model: PreTrainedModel, segments: Sequence[Segment]) -> int:
    """How many weights are quantized; without segments, of all matrices."""
    if not segments:
        return sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    sites = (site for segment in segments for layer in segment.layers for site in layer.sites)
    return sum(linear.weight.numel() for site in sites for linear in site.linears)


def _trial_seconds(
    model: PreTrainedModel, settings: CalibrationSettings, data: Data, rates: Rates
) -> float:
    """Of recipes.py, all its trials."""
    few = min(TRIAL_SAMPLES, (data.samples + 1) // 2)
    judges = min(JUDGES, data.samples - few + CHECK_SAMPLES)
    quick = replace(data, samples=few, checks=judges + JUDGING_TEXTS)
    total = 0.0

    def measure(recipe: dict[str, Any]) -> RecipeTrial:
        nonlocal total
        tried = trial(settings, recipe).for_model(rotatable=True)
        segments = resolve_segments(model, tried)
        total += sum(seconds_of(count_work(model, segments, tried, quick), rates).values())
        return RecipeTrial(fields=recipe, answer_kl=0.0, text_kl=0.0)

    compare_recipes(
        settings,
        measure,
        lambda *_: False,
        lambda name, count: Steps(name, (), count),
        rotatable=not why_not_rotatable(model),
        groups=model.device.type != "cuda",
    )
    return total


def _count_data(
    model: PreTrainedModel,
    segments: Sequence[Segment],
    config: QVLMConfig,
    samples: Sequence[Sample] | None,
) -> Data:
    """Renders a few samples, or assumes some, and asks the model how many tokens they are."""
    answers, size = 8.0, _picture_size(model.config)
    if samples is not None:
        few = samples[:: max(1, len(samples) // _ASKED)][:_ASKED]
        processor = copy.deepcopy(config.processor)  # a tokenizer keeps how it padded
        with torch.device("cpu"):  # from_pretrained makes "meta" the default
            batches = [collate([sample], processor) for sample in few]
        answers = sum(int((one.labels != IGNORE_INDEX).sum()) for one in batches) / len(few)
        found = [_feature_tokens(model, segments, one.inputs) for one in batches]
        longest = longest_sample(model) or math.inf
        lengths = [one.inputs["input_ids"].shape[1] for one in batches]
        # longer ones will be left out
        lengths = [length for length in lengths if length <= longest] or [min(lengths)]
        text = (max(lengths) + sum(lengths) / len(lengths)) / 2  # with padding
    else:
        pixels = {} if size is None else {"pixel_values": torch.empty(1, 3, *size, device="meta")}
        found = [_feature_tokens(model, segments, pixels)]
        text = _TEXT + found[0]["projector"][0]
    parts = ("vision", "projector")
    tokens = {name: sum(own[name][0] for own in found) / len(found) for name in parts}
    context = {name: max(own[name][1] for own in found) for name in parts}
    count = config.num_samples if samples is None else min(config.num_samples, len(samples))
    return Data(
        samples=-(-count // ranks.world_size()),  # of this process
        batch_size=config.batch_size,
        tokens=tokens | {"language": text},
        context=context | {"language": text},
        answers=answers,
        checks=CHECK_SAMPLES,
    )


def _feature_tokens(
    model: PreTrainedModel, segments: Sequence[Segment], inputs: dict[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Component -> tokens that enter it, and those of a row, for the pictures of `inputs`."""
    found = {"vision": (0.0, 0.0), "projector": (0.0, 0.0)}
    if inputs and "pixel_values" not in inputs:
        return found

    def see(key: tuple[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if found[key[0]] == (0.0, 0.0):
            shape = values[0].shape
            found[key[0]] = (shape[:-1].numel(), shape[-2])

    seen = {
        (segment.component, place): segment.layers[0].module
        for place, segment in enumerate(segments)
        if segment.component in found
    }
    # a family may be one that cannot be asked without weights
    with suppress(Exception), observe_inputs(seen, see):
        ask_features(model, inputs)
    for name, tokens in _guessed_tokens(model.config, inputs).items():
        found[name] = found[name] if found[name][0] else (tokens, tokens)
    return found


def _guessed_tokens(config: Any, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The same from shapes and placeholders alone, and without a picture a usual number."""
    vision, pixels = getattr(config, "vision_config", None), inputs.get("pixel_values")
    patch = getattr(vision, "patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[0]
    patches = float(_PATCHES)
    if pixels is not None:  # rows of patches, or whole pictures
        whole = pixels.dim() > 3
        shape = pixels.shape
        patches = (
            shape[:-3].numel() * (shape[-2] // patch) * (shape[-1] // patch)
            if whole
            else shape[:-1].numel()
        )
    token, ids = getattr(config, "image_token_id", None), inputs.get("input_ids")
    places = 0 if token is None or ids is None else int((ids == token).sum())
    merged = patches / getattr(vision, "spatial_merge_size", 1) ** 2
    return {"vision": patches, "projector": places or merged}


def _picture_size(config: Any) -> tuple[int, int] | None:
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def gigabytes(size: float) -> str:
    """A size for messages."""
    return f"{size / 1e9:.1f} GB"


def _span(low: float, high: float) -> str:
    """Two durations in the unit of the longer one."""
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, length = next((pair for pair in units if high >= 2 * pair[1]), units[-1])
    digits = 0 if low >= 9.5 * length else 1
    return f"{low / length:.{digits}f} to {high / length:.{digits}f} {unit}"
