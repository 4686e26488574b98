"""The most memory that a calibration holds at a time, from shapes alone.

What grows with model or samples is counted where the method holds it, for the steps that can need
most: gradients of all layers, the search of a block, the rounding of a layer. docs/scaling.md
compares the sums with measured peaks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from qvlm_hf.calibration.estimate.sums import Data, Sums, add_up, directions
from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.measure.importance import DRAWS
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.models.graph import Segment, Site

__all__ = ["Memory", "count_memory", "count_rounding_memory", "model_bytes", "packed_bytes"]

_PROCESS = 420 * 2**20  # Python, PyTorch and Transformers, without their files
# What the C library holds back of what was freed; it shows where scratch files take the rest.
_SLACK, _HELD_BACK = 1.2, 1.6
_CHUNKS = 120 * 2**20  # of entropies, likewise
_FACTOR = 32  # bytes per entry of a Hessian while one is factorised in float64
_HALVES = 8  # and while it is summed: two halves in float32
_ROUNDED = 14  # bytes per weight that is rounded: folded, reordered, its integers
_RUN, _GRAPH = 1.5, 4.5  # tensors like the sites' inputs of a layer: it runs, or with its graph
_LOGITS = 4  # tensors like the logits while a direction is drawn
_EMBEDDINGS, _HEAD = 32, 16  # bytes per weight: of embeddings that are rotated, a head rounded
_TRIED = 16  # bytes per weight of a site while a candidate is made of it


class Memory(NamedTuple):
    """Bytes at the peak of a run, besides the weights of the model.

    Attributes:
        together: in memory, without scratch files.
        kept: of scratch files, if there is a directory for them.
        working: in memory then.
    """

    together: float
    kept: float
    working: float


class _Step(NamedTuple):
    """Bytes of a step: what scratch files can hold, and what they cannot."""

    kept: float = 0.0
    working: float = 0.0


def model_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Of all parameters in full precision; they may be on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def packed_bytes(weights: float, settings: CalibrationSettings) -> float:
    """Of quantized weights, with their grids; a budget in bytes is left out."""
    group = settings.group_size if settings.group_size > 0 else 4096
    budget = settings.precision_budget
    bits = settings.weight_bits if budget is None or isinstance(budget, str) else budget
    return weights * (bits / 8 + 3 / group)


def count_rounding_memory(model: Any, weights: float, settings: CalibrationSettings) -> Memory:
    """What plain rounding of so many weights holds at its peak."""
    largest = max((weight.numel() for weight in model.parameters()), default=0)
    changed = weights * model.dtype.itemsize * (settings.rotation == "hadamard")
    held = changed + packed_bytes(weights, settings) + largest * _TRIED + _PROCESS
    return Memory(together=held, kept=0.0, working=held)


def count_memory(
    model: Any,
    segments: Sequence[Segment],
    settings: CalibrationSettings,
    data: Data,
    size: int = 4,
) -> Memory:
    """What a calibration holds at its peak.

    `size`: bytes of a value while layers are searched, in float32 on a CPU, else as the model is.
    """
    sums = add_up(model, segments, data)
    weights = sum(one.weights for one in sums)
    changed = settings.rotation == "hadamard" or settings.equalization
    held = weights * model.dtype.itemsize * changed
    steps = list(_steps(model, segments, sums, settings, data, size))
    return Memory(
        together=_SLACK * (held + max(map(sum, steps))) + _PROCESS,
        kept=held + max(step.kept for step in steps),
        working=_HELD_BACK * max(step.working for step in steps) + _CHUNKS + _PROCESS,
    )


def _steps(
    model: Any,
    segments: Sequence[Segment],
    sums: Sequence[Sums],
    settings: CalibrationSettings,
    data: Data,
    size: int,
) -> Iterator[_Step]:
    """Every step with what lies in memory beside it."""
    table = model.get_input_embeddings().weight.numel()
    yield _Step(working=_EMBEDDINGS * table * (settings.rotation == "hadamard"))
    yield _Step(working=_HEAD * table * (settings.lm_head_bits is not None))
    weights = sum(one.weights for one in sums)
    yield _Step(kept=size * weights * (settings.optimize_vision is not None))
    streams = [one.hidden * size for one in sums]
    gradients = _gradients(model, sums, settings, data)
    yield _Step(gradients.kept + sum(streams), gradients.working)
    for place, (segment, one) in enumerate(zip(segments, sums, strict=True)):
        below = sum(before.weights for before in sums[:place]) * size
        packed = packed_bytes(sum(ready.weights for ready in sums[: place + 1]), settings)
        for step in _search(segment, one, settings, data, size):
            yield _Step(below + packed + sum(streams[place:]) + step.kept, step.working)


def _gradients(
    model: Any, sums: Sequence[Sums], settings: CalibrationSettings, data: Data
) -> _Step:
    """Of token importance and sensitivity: one batch's graph, and what is kept of all."""
    probes = settings.measures_sites
    if not (probes or settings.token_importance):
        return _Step()
    draws = directions(sums, data) if probes else DRAWS
    hidden = sum(one.hidden * one.layers for one in sums)
    kept = 2 * draws * data.half * hidden if probes else 0.0
    runs = hidden * _batch_share(data) * model.dtype.itemsize
    text = model.config.get_text_config()
    logits = data.batch_size * data.answers * getattr(text, "vocab_size", 0) * 4 * _LOGITS
    heads = getattr(text, "num_attention_heads", 0)
    scores = 4 * heads * data.batch_size * data.context["language"] ** 2
    batch = max(_batch_values(one, data) for one in sums) * model.dtype.itemsize
    return _Step(kept + runs, batch * (_GRAPH + draws) + 3 * scores + logits)


def _search(
    segment: Segment, one: Sums, settings: CalibrationSettings, data: Data, size: int
) -> tuple[_Step, _Step]:
    """Of a segment while its largest block is searched, and rounded."""
    # not all dependencies are above their mean
    longest = one.layers - (settings.entropy_threshold is None)
    depth = min(settings.max_block_depth, max(longest, 1))
    candidates = len(settings.candidates(segment.component))
    layers = live_layers(segment)
    sites = [site for layer in layers for site in layer.sites]
    layer = size * max((sum(map(_weights, own.sites)) for own in layers), default=0)
    # what enters, the quantized stream and the targets; the search's own on half of the batches
    streams = one.hidden * size * (2 + depth + data.half * (depth + 1))
    masks = 2 * data.samples * data.context[segment.component] ** 2
    held = streams + masks + depth * layer
    graph = _batch_values(one, data) * size * _RUN
    largest = max(map(_weights, sites), default=0)
    gptq = 0.0
    if settings.weight_rounding != "nearest":
        gptq = max(map(_rounding, sites), default=0.0)
    # every candidate's dequantized weights, of the layers that are not rounded yet
    return (
        _Step(held + depth * candidates * layer, graph + largest * _TRIED),
        _Step(held + ((depth - 1) * candidates + 1) * layer, graph + gptq),
    )


def _weights(site: Site) -> int:
    return sum(linear.weight.numel() for linear in site.linears)


def _rounding(site: Site) -> float:
    """Bytes while GPTQ rounds a site, one part after the other."""
    size = site.linears[0].in_features
    halves = _HALVES * sum(part.linears[0].in_features ** 2 for part in site.parts)
    return halves + (_FACTOR - _HALVES) * size**2 + _ROUNDED * _weights(site.parts[0])


def _batch_values(one: Sums, data: Data) -> float:
    """Values that enter the sites of a layer in one batch."""
    return one.values / max(one.layers, 1) * _batch_share(data)


def _batch_share(data: Data) -> float:
    return min(1.0, data.batch_size / data.samples)
