"""One segment of a model: how its layers depend on each other, and the search over its blocks, bottom to top.

Two streams of hidden states run through the layers side by side: full precision (the targets) and
quantized (what a layer will really see). Only one block's worth of either is kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import LayerInput, calibrating, count_tokens, kept, run_layer
from qvlm_hf.calibration.measure.entropy import DependencyHistogram, value_bounds
from qvlm_hf.calibration.search.blocks import Block
from qvlm_hf.calibration.search.gptq import compensate_layer
from qvlm_hf.calibration.search.joint_search import BlockSearch, SearchResult, search_block
from qvlm_hf.calibration.search.ranges import initialize_sites, judging
from qvlm_hf.calibration.search.sites import LearnedRanges, TrialSite, installed
from qvlm_hf.calibration.settings import CalibrationSettings, Precision
from qvlm_hf.models.graph import Layer, Segment

__all__ = ["Evidence", "SearchedBlock", "layer_dependencies", "search_segment"]


@dataclass(frozen=True)
class Evidence:
    """What was measured before the search and shapes it.

    Attributes:
        precisions: site name -> bits, where they are not those of the settings.
        importance: layer name -> weights of the tokens that leave it, per batch; empty: all tokens
            count alike.
        ranges: site name -> ranges that were learned, one more candidate.
        dependencies: component -> its entropies and their threshold, where they are not those of
            full precision.
    """

    precisions: Mapping[str, Precision] = field(default_factory=dict)
    importance: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    ranges: Mapping[str, LearnedRanges] = field(default_factory=dict)
    dependencies: Mapping[str, tuple[list[float], float]] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchedBlock:
    """A block after its search: `sites` per layer, their `active` candidate being the choice.

    `result` is None for dead layers.
    """

    layers: tuple[Layer, ...]
    sites: tuple[tuple[TrialSite, ...], ...]
    result: SearchResult | None


def layer_dependencies(
    model: nn.Module, segment: Segment, inputs: Sequence[LayerInput], settings: CalibrationSettings
) -> list[float]:
    """D(k, k+1) in nats of consecutive live layers of a segment (eq.

    4), from one full-precision pass.

    Args:
        model: in full precision.
        segment: its layers.
        inputs: per batch, what enters the first layer.
        settings: the bits give the number of levels, the granularity the axis of the ranges.

    Returns:
        One number less than there are live layers.

    Raises:
        ValueError: a layer's output is not finite.
    """
    per_position = settings.start_granularity(segment.component) == "token"
    live = [layer for layer in segment.layers if not layer.dead]
    hidden = [entry.hidden for entry in inputs]
    previous: list[Tensor] | None = None
    dependencies = []
    for layer in live if len(live) > 1 else ():
        hidden = _run_in_full_precision(model, layer, inputs, hidden)
        values = (
            hidden
            if per_position
            else [kept(h, entry.keep) for h, entry in zip(hidden, inputs, strict=True)]
        )
        if previous is not None:
            elements = count_tokens(inputs) * hidden[0].shape[-1]
            histogram = DependencyHistogram(
                value_bounds(previous, per_position),
                value_bounds(values, per_position),
                levels=settings.entropy_levels,
                elements=elements,
            )
            for first, second in zip(previous, values, strict=True):
                histogram.update(first, second)
            dependencies.append(float(histogram.entropy()))
        previous = values
    return dependencies


def search_segment(
    model: nn.Module,
    segment: Segment,
    blocks: Sequence[Block],
    full_inputs: Sequence[LayerInput],
    inputs: Sequence[LayerInput],
    settings: CalibrationSettings,
    evidence: Evidence,
) -> Iterator[SearchedBlock]:
    """Searches the blocks of a segment bottom to top (eq.

    3), then gives dead layers their L_p start.

    Args:
        model: its weights in full precision; modules below the segment run as quantized.
        segment: its layers.
        blocks: a partition of the live layers.
        full_inputs: per batch, what enters the first layer in full precision.
        inputs: the same when everything below is quantized.
        settings: candidates and schemes.
        evidence: what was measured before.

    Yields:
        Each block when its search has ended.
    """
    live = [layer for layer in segment.layers if not layer.dead]
    dead = [layer for layer in segment.layers if layer.dead]
    full = [entry.hidden for entry in full_inputs]
    hidden = [entry.hidden for entry in inputs]
    for block in blocks if live else ():  # of no live layer there is nothing to search
        layers = live[block.start : block.stop]
        with calibrating(model, layers, inputs):
            targets = []
            for layer in layers:
                full = run_layer(model.get_submodule(layer.name), full_inputs, full)
                targets.append(full)
            sites = initialize_sites(
                model,
                layers,
                segment.component,
                inputs,
                hidden,
                settings,
                evidence.precisions,
                evidence.ranges,
            )
            modules = [model.get_submodule(layer.name) for layer in layers]
            weights = (
                [evidence.importance[layer.name] for layer in layers]
                if evidence.importance
                else [None] * len(layers)
            )
            with installed(site for row in sites for site in row):
                judged = [
                    [judging(per_batch) for per_batch in rows if per_batch is not None]
                    for rows in (targets, weights)
                ]
                result = search_block(
                    BlockSearch(modules, sites, judging(inputs), judging(hidden), *judged)
                )
                for module, row, choice, tokens in zip(
                    modules, sites, result.choice, weights, strict=True
                ):
                    for site, index in zip(row, choice, strict=True):
                        site.active = index
                        site.take_final_ranges()
                    if settings.weight_rounding != "nearest":
                        compensate_layer(module, row, inputs, hidden, tokens)
                    hidden = run_layer(module, inputs, hidden)
        # outside the context: whoever packs the block must see the model's own dtype
        yield _settled(layers, sites, result)
    if dead:
        with calibrating(model, dead, inputs):
            sites = initialize_sites(
                model, dead, segment.component, inputs, hidden, settings, evidence.precisions
            )
            for site in (site for row in sites for site in row):
                site.take_final_ranges()
        yield _settled(dead, sites, None)


def _settled(
    layers: Sequence[Layer], sites: Sequence[Sequence[TrialSite]], result: SearchResult | None
) -> SearchedBlock:
    for row in sites:
        for site in row:
            site.settle()
    return SearchedBlock(tuple(layers), tuple(map(tuple, sites)), result)


def _run_in_full_precision(
    model: nn.Module, layer: Layer, inputs: Sequence[LayerInput], hidden: Sequence[Tensor]
) -> list[Tensor]:
    with calibrating(model, [layer], inputs):
        out = run_layer(model.get_submodule(layer.name), inputs, hidden)
    for entry, h in zip(inputs, out, strict=True):
        if not torch.isfinite(kept(h, entry.keep)).all():
            raise ValueError(
                f"the output of {layer.name} holds NaN or infinity for the samples "
                f"{', '.join(entry.origins)}: check weights and data."
            )
    return out
