"""The most memory that a calibration holds at a time, from shapes alone.

What grows with model or samples is counted where qvlm_hf/quantize.py holds it, for the steps that
can need most: gradients of all layers, the search of a block, the rounding of a layer.
docs/scaling.md compares the sums with measured peaks.

Legend: I in_features of a site, P weights, T tokens of all samples, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvlm_hf.calibration.estimate.cost import Data, Sums, active_share, directions
from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.measure.importance import DRAWS
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.models.graph import Layer, Segment, Site

__all__ = [
    "Memory",
    "count_memory",
    "count_rounding_memory",
    "model_bytes",
    "packed_bytes",
]

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


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of a calibration, besides the weights of the model.

    Attributes:
        together: in memory, without scratch files.
        kept: of scratch files, if there is a directory for them.
        working: in memory then.
    """

    together: float
    kept: float
    working: float


@dataclass(frozen=True)
class _Step:
    """Bytes of a step: what scratch files can hold, and what they cannot."""

    kept: float = 0.0
    working: float = 0.0

    def plus(self, kept: float) -> "_Step":
        return _Step(self.kept + kept, self.working)


def model_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Of all parameters in full precision; they may be on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def packed_bytes(weights: float, settings: CalibrationSettings) -> float:
    """Of quantized weights, with their grids."""
    group = settings.group_size if settings.group_size > 0 else 4096
    return weights * (settings.weight_bits / 8 + 3 / group)


def count_memory(
    model: Any,
    segments: Sequence[Segment],
    settings: CalibrationSettings,
    data: Data,
    *,
    compute: torch.dtype,
) -> Memory:
    """What a calibration holds at its peak, besides the weights that it reads.

    Args:
        model: may be on the meta device.
        segments: of `resolve_segments`.
        settings: of the calibration.
        data: its samples.
        compute: dtype of layers while they are searched.
    """
    dtype = model.dtype
    sums = [Sums(segment, data, active_share(model)) for segment in segments]
    streams = [one.hidden * compute.itemsize for one in sums]
    transforms = settings.rotation == "hadamard" or (
        settings.equalization and settings.activation_bits < 16
    )
    weights = sum(one.weights for one in sums)
    held = weights * dtype.itemsize * transforms
    whole = model.get_input_embeddings().weight.numel()
    once = _EMBEDDINGS * whole * (settings.rotation == "hadamard")
    once = max(once, _HEAD * whole * (settings.lm_head_bits is not None))
    copied = compute.itemsize * weights * (settings.optimize_vision is not None)
    steps = [_Step(0.0, once), _Step(copied, 0.0)]
    steps += [_gradients(model, sums, settings, data, dtype).plus(kept=sum(streams))]
    for place, (segment, one) in enumerate(zip(segments, sums, strict=True)):
        below = sum(before.weights for before in sums[:place]) * compute.itemsize
        packed = packed_bytes(sum(ready.weights for ready in sums[: place + 1]), settings)
        held_here = below + packed + sum(streams[place:])
        steps += [
            step.plus(kept=held_here) for step in _search(segment, one, settings, data, compute)
        ]
    together = max(step.kept + step.working for step in steps)
    kept, working = (max(part) for part in zip(*((s.kept, s.working) for s in steps), strict=True))
    return Memory(
        together=_SLACK * (held + together) + _PROCESS,
        kept=held + kept,
        working=_HELD_BACK * working + _CHUNKS + _PROCESS,
    )


def _gradients(
    model: Any, sums: Sequence[Sums], settings: CalibrationSettings, data: Data, dtype: torch.dtype
) -> _Step:
    """Of token importance and sensitivity: one batch's graph, and what is kept of all."""
    probes = settings.measures_sites
    if not (probes or settings.token_importance):
        return _Step()
    share = min(1.0, data.batch_size / data.samples)  # a batch
    draws = directions(sums, data) if probes else DRAWS
    kept = 2 * draws * data.half * sum(one.hidden * one.layers for one in sums) if probes else 0.0
    runs = sum(one.hidden * one.layers for one in sums) * share * dtype.itemsize
    text = model.config.get_text_config()
    logits = data.batch_size * data.answers * getattr(text, "vocab_size", 0) * 4 * _LOGITS
    heads = getattr(text, "num_attention_heads", 0)
    scores = 4 * heads * data.batch_size * data.context["language"] ** 2
    graph = max(_batch_values(one, data) for one in sums) * dtype.itemsize * (_GRAPH + draws)
    return _Step(kept + runs, graph + 3 * scores + logits)


def _search(
    segment: Segment, one: Sums, settings: CalibrationSettings, data: Data, compute: torch.dtype
) -> tuple[_Step, _Step]:
    """Of a segment while its largest block is searched, and rounded."""
    # not all dependencies are above their mean
    longest = one.layers - (settings.entropy_threshold is None)
    depth = min(settings.max_block_depth, max(longest, 1))
    candidates = len(settings.candidates(segment.component))
    layers = live_layers(segment)
    weights = max((sum(x.weight.numel() for x in _linears(own)) for own in layers), default=0)
    # what enters, the quantized stream and the targets; the search's own on half of the batches
    streams = one.hidden * compute.itemsize * (2 + depth + data.half * (depth + 1))
    masks = 2 * data.samples * data.context[segment.component] ** 2
    layer = weights * compute.itemsize
    held = streams + masks + depth * layer
    sites = [site for own in layers for site in own.sites]
    graph = _batch_values(one, data) * compute.itemsize * _RUN
    rounded = max((_rounding(site) for site in sites), default=0.0)
    largest = max((sum(x.weight.numel() for x in site.linears) for site in sites), default=0)
    gptq = rounded if settings.weight_rounding != "nearest" else 0.0
    # every candidate's dequantized weights, of the layers that are not rounded yet
    return (
        _Step(held + depth * candidates * layer, graph + largest * _TRIED),
        _Step(held + ((depth - 1) * candidates + 1) * layer, graph + gptq),
    )


def _rounding(site: Site) -> float:
    size = site.linears[0].in_features
    halves = _HALVES * sum(part.linears[0].in_features ** 2 for part in site.parts)
    weights = sum(x.weight.numel() for x in site.parts[0].linears)
    return halves + (_FACTOR - _HALVES) * size**2 + _ROUNDED * weights


def _batch_values(one: Sums, data: Data) -> float:
    """Values that enter the sites of a layer in one batch."""
    return one.values / max(one.layers, 1) * min(1.0, data.batch_size / data.samples)


def _linears(layer: Layer) -> list[nn.Linear]:
    return [linear for site in layer.sites for linear in site.linears]


def count_rounding_memory(model: Any, weights: float, settings: CalibrationSettings) -> float:
    """Bytes of a process at the peak of plain rounding of so many weights, besides the model."""
    largest = max((weight.numel() for weight in model.parameters()), default=0)
    changed = weights * model.dtype.itemsize * (settings.rotation == "hadamard")
    return changed + packed_bytes(weights, settings) + largest * _TRIED + _PROCESS
