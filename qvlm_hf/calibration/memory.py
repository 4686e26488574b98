"""The most memory that a calibration holds at a time, from shapes alone.

What grows with model or samples is counted where qvlm_hf/quantize.py holds it, for the steps that
can need most: gradients of all layers, the search of a block, the rounding of a layer.
docs/scaling.md compares the sums with measured peaks.

Legend: I in_features of a site, P weights, T tokens of all samples, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qvlm_hf.calibration.cost import Data, Sums, active_share, gradient_draws
from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.models.graph import Layer, Segment

__all__ = ["count_memory", "count_rounding_memory", "model_bytes", "packed_bytes"]

_PROCESS = 450 * 2**20  # Python, PyTorch and Transformers, without their files
_FACTOR = 60  # bytes per entry of a Hessian while one is factorised in float64
_HALVES = 8  # and while it is summed: two halves in float32
_ROUNDED = 18  # bytes per weight that is rounded: folded, reordered, its integers
_GRAPH = 6  # tensors like a site's input in the graph of a layer
_LOGITS = 4  # tensors like the logits while a direction is drawn


def model_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Of all parameters in full precision; they may be on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def packed_bytes(segments: Sequence[Segment], settings: CalibrationSettings) -> float:
    """Of all quantized weights, with their grids."""
    scheme = settings.module_scheme("none" if settings.activation_bits == 16 else "dynamic_token")
    linears = [x for segment in segments for layer in segment.layers for x in _linears(layer)]
    words = sum(x.out_features * scheme.words(x.in_features) for x in linears)
    groups = sum(x.out_features * scheme.groups(x.in_features) for x in linears)
    return 4 * words + 3 * groups


def count_memory(
    model: Any,
    segments: Sequence[Segment],
    settings: CalibrationSettings,
    data: Data,
    *,
    dtype: torch.dtype,
    compute: torch.dtype = torch.float32,
) -> float:
    """Bytes of a process at the peak of a calibration.

    Args:
        model: may be on the meta device.
        segments: of `resolve_segments`.
        settings: of the calibration.
        data: its samples.
        dtype: of the model.
        compute: of layers while they are searched.
    """
    sums = [Sums(segment, data, active_share(model)) for segment in segments]
    streams = [one.hidden * compute.itemsize for one in sums]
    weights = sum(one.weights for one in sums)
    changed = weights * dtype.itemsize * (settings.rotation == "hadamard" or _equalizes(settings))
    held = model_bytes(model, dtype) + changed + _PROCESS
    peaks = [_gradients(model, sums, settings, data, dtype) + sum(streams)]
    packed = 0.0
    for place, (segment, one) in enumerate(zip(segments, sums, strict=True)):
        below = sum(before.weights for before in sums[:place]) * compute.itemsize
        search = _search(segment, one, settings, data, compute)
        packed += packed_bytes([segment], settings)
        peaks.append(below + packed + sum(streams[place:]) + search)
    return held + max(peaks)


def _equalizes(settings: CalibrationSettings) -> bool:
    return settings.equalization and settings.activation_bits < 16


def _gradients(
    model: Any, sums: Sequence[Sums], settings: CalibrationSettings, data: Data, dtype: torch.dtype
) -> float:
    """Of token importance and sensitivity: one batch's graph, and what is kept of all."""
    probes = settings.guards or settings.precision_budget is not None
    if not (probes or settings.token_importance):
        return 0.0
    share = min(1.0, data.batch_size / data.samples)  # a batch
    draws = gradient_draws(sums, data) if probes else 2
    kept = 2 * draws * data.half * sum(one.hidden * one.layers for one in sums) if probes else 0.0
    runs = sum(one.hidden * one.layers for one in sums) * share * dtype.itemsize
    most = max(one.values / max(one.layers, 1) for one in sums) * share * dtype.itemsize
    text = model.config.get_text_config() if hasattr(model, "config") else None
    logits = data.batch_size * data.answers * getattr(text, "vocab_size", 0) * 4 * _LOGITS
    return kept + runs + most * (_GRAPH + draws) + logits


def _search(
    segment: Segment, one: Sums, settings: CalibrationSettings, data: Data, compute: torch.dtype
) -> float:
    """Of a segment while its largest block is searched or rounded."""
    depth = min(settings.max_block_depth, max(one.layers, 1))
    candidates = len(settings.candidates(segment.component))
    stream = one.hidden * compute.itemsize
    # what enters, the quantized stream and the targets; the search's own on half of the batches
    streams = stream * (2 + depth + data.half * (depth + 1))
    masks = 2 * data.samples * data.context[segment.component] ** 2
    layers = live_layers(segment)
    layer = max((sum(x.weight.numel() for x in _linears(own)) for own in layers), default=0)
    copies = layer * depth * compute.itemsize
    tried = layer * candidates * compute.itemsize  # dequantized, of a layer
    sites = [site for own in layers for site in own.sites]
    rounding = max(
        (
            _HALVES * sum(part.linears[0].in_features ** 2 for part in site.parts)
            + (_FACTOR - _HALVES) * site.linears[0].in_features ** 2
            + _ROUNDED * sum(x.weight.numel() for x in site.parts[0].linears)
            for site in sites
        ),
        default=0,
    )
    if settings.weight_rounding == "nearest":
        rounding = 0
    searching, gptq = depth * tried, (depth - 1) * tried + layer * compute.itemsize + rounding
    return streams + masks + copies + max(searching, gptq)


def _linears(layer: Layer) -> list[nn.Linear]:
    return [linear for site in layer.sites for linear in site.linears]


def count_rounding_memory(
    model: nn.Module,
    segments: Sequence[Segment],
    settings: CalibrationSettings,
    *,
    dtype: torch.dtype,
    on_load: bool,
) -> float:
    """Bytes of a process at the peak of plain rounding.

    Args:
        model: may be on the meta device.
        segments: of `resolve_segments`; none where the family has no row.
        settings: of the run.
        dtype: of the model.
        on_load: weights come one by one, and are never there as a whole.
    """
    linears = [x for segment in segments for layer in segment.layers for x in _linears(layer)]
    floats = sum(x.weight.numel() for x in linears) * dtype.itemsize
    largest = max((parameter.numel() for parameter in model.parameters()), default=0)
    whole = model_bytes(model, dtype) - (floats if on_load else 0)
    changed = floats if settings.rotation == "hadamard" else 0
    return whole + changed + packed_bytes(segments, settings) + largest * 12 + _PROCESS
