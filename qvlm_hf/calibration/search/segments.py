"""The search over one segment, block after block, bottom to top.

Two streams of hidden states run through the layers side by side: full precision (the targets) and
quantized (the input that a layer will really see). Only one block's worth of either is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from qvlm_hf.calibration.layers import (
    LayerInput,
    capture_inputs,
    live_layers,
    run_layer,
    working_precision,
)
from qvlm_hf.calibration.record.report import BlockReport
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.search.blocks import Block
from qvlm_hf.calibration.search.gptq import gptq_round_layer
from qvlm_hf.calibration.search.joint_search import BlockSearch, search_block
from qvlm_hf.calibration.search.ranges import held_out_half, initialize_sites
from qvlm_hf.calibration.search.saved_blocks import SavedBlock, restore_sites, save_block
from qvlm_hf.calibration.search.sites import QuantizedSite, installed
from qvlm_hf.models.graph import Layer, Segment

__all__ = ["SearchedBlock", "search_segment"]


@dataclass(frozen=True)
class SearchedBlock:
    """A block after its search.

    Attributes:
        layers: the block.
        sites: of all its layers, their `active` candidate being the choice.
        report: of the search; None for dead layers.
    """

    layers: tuple[Layer, ...]
    sites: tuple[QuantizedSite, ...]
    report: BlockReport | None


def search_segment(
    calibration: Calibration, segment: Segment, blocks: Sequence[Block]
) -> Iterator[SearchedBlock]:
    """Searches the blocks of a segment (eq. 3), then gives dead layers their L_p start.

    Blocks that were searched before the calibration was stopped are read back.

    Args:
        calibration: its model runs quantized below the segment.
        segment: in full precision.
        blocks: a partition of the live layers.

    Yields:
        Each block when its search has ended, outside `working_precision`.
    """
    live, dead = live_layers(segment), [layer for layer in segment.layers if layer.dead]
    # of no live layer there is nothing to search
    groups = [live[block.start : block.stop] for block in blocks] if live else []
    groups += [dead] if dead else []
    kept, place = calibration.kept, calibration.segments.index(segment)
    steps = [f"block-{place}-{number}" for number in range(len(groups))]
    complete = all(step in kept for step in steps)
    inputs = recorded = calibration.inputs[segment.name]
    if place and not complete:  # below the first segment nothing is quantized
        with calibration.timed("inputs"):
            again = capture_inputs(calibration.model, calibration.own_data, [segment])
        inputs = again[segment.name]
    full = [entry.hidden for entry in recorded]
    hidden = [entry.hidden for entry in inputs]
    for step, layers in zip(steps, groups, strict=True):
        if step in kept:
            block: SavedBlock = kept.read(step)
            with working_precision(layers, inputs):
                sites = restore_sites(layers, block)
                if not complete and layers is not dead:
                    full = _run_layers(layers, recorded, full)
                    with installed(sites):
                        hidden = _run_layers(layers, inputs, hidden)
            yield SearchedBlock(tuple(layers), sites, block.report)
            continue
        if layers is dead:
            with working_precision(dead, inputs):
                rows = initialize_sites(calibration, segment.component, dead, inputs, hidden)
            report: BlockReport | None = None
            for site in chain(*rows):
                site.take_final_grids()
        else:
            rows, report, full, hidden = _search_layers(
                calibration, segment, layers, inputs, full, hidden
            )
        sites = tuple(chain(*rows))
        kept.write(step, save_block(sites, report))
        yield SearchedBlock(tuple(layers), sites, report)


def _run_layers(
    layers: Sequence[Layer], inputs: Sequence[LayerInput], hidden: list[Tensor]
) -> list[Tensor]:
    for layer in layers:
        hidden = run_layer(layer.module, inputs, hidden)
    return hidden


def _search_layers(
    calibration: Calibration,
    segment: Segment,
    layers: Sequence[Layer],
    inputs: Sequence[LayerInput],
    full: list[Tensor],
    hidden: list[Tensor],
) -> tuple[list[list[QuantizedSite]], BlockReport, list[Tensor], list[Tensor]]:
    """One block: its ranges, its joint search, GPTQ; and what leaves it in either stream."""
    modules = [layer.module for layer in layers]
    importance = [calibration.importance.get(layer.name) for layer in layers]
    with working_precision(layers, inputs):
        targets = []
        for module in modules:
            full = run_layer(module, calibration.inputs[segment.name], full)
            targets.append(full)
        with calibration.timed("ranges"):
            rows = initialize_sites(calibration, segment.component, layers, inputs, hidden)
        with installed(chain(*rows)):
            with calibration.timed("search"):
                result = search_block(
                    BlockSearch(
                        modules,
                        rows,
                        held_out_half(inputs),
                        held_out_half(hidden),
                        [held_out_half(target) for target in targets],
                        [held_out_half(weights) for weights in importance if weights is not None],
                        [place // 2 for place in held_out_half(calibration.reached(segment))],
                    )
                )
            for module, row, choice, weights in zip(
                modules, rows, result.choice, importance, strict=True
            ):
                for site, index in zip(row, choice, strict=True):
                    site.active = index
                    site.take_final_grids()
                if calibration.settings.weight_rounding != "nearest":
                    with calibration.timed("rounding"):
                        gptq_round_layer(module, row, inputs, hidden, weights)
                hidden = run_layer(module, inputs, hidden)
    report = BlockReport(
        layers=tuple(layer.name for layer in layers),
        initial=result.initial,
        greedy=result.greedy,
        joint=result.joint,
        evaluations=result.evaluations,
    )
    return rows, report, full, hidden
