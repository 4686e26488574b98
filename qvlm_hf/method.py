"""The method, in the order that it runs: from a model and its data to quantized modules.

Rotation and equalization are folded into the weights (`transformed`). `make_modules` then records
what enters every layer, chooses bits, weighs tokens and optimises the visual encoder (eq. 8-10).
`_search` goes through the segments: entropy (eq. 4), partition into blocks (eq. 7), joint search
inside a block (eq. 3). `round_modules` is for schemes without data.

The model itself is not changed here, but by `transformed`, which an error undoes.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from torch import nn

from qvlm_hf.calibration.layers import capture_inputs, live_layers
from qvlm_hf.calibration.measure.entropy import layer_dependencies
from qvlm_hf.calibration.measure.importance import token_importance
from qvlm_hf.calibration.measure.written_text import WRITTEN
from qvlm_hf.calibration.plan import why_unreached
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.record.report import BlockReport, RoutingReport, SegmentReport, SiteReport
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.search.blocks import partition_layers
from qvlm_hf.calibration.search.routing import routing_reports
from qvlm_hf.calibration.search.segments import SearchedBlock, search_segment
from qvlm_hf.calibration.search.sensitivity import choose_precisions
from qvlm_hf.calibration.search.sites import QuantizedSite, installed
from qvlm_hf.calibration.search.vision_encoder import learn_vision_ranges
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.transforms.equalization import equalize
from qvlm_hf.calibration.transforms.rotation import rotate, undone_on_error
from qvlm_hf.calibration.without_data import rounding_schemes
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.folds import rotation_plan, scale_paths
from qvlm_hf.models.graph import Segment, get_linear, output_head
from qvlm_hf.nn.linear import QVLMLinear, packed_tensors, rounded_tensors

__all__ = ["Modules", "make_modules", "round_head", "round_modules", "transformed"]

Modules = dict[str, QVLMLinear]


@contextmanager
def transformed(calibration: Calibration) -> Iterator[None]:
    """Folds rotation and equalization into the weights; an error inside undoes it."""
    model, settings = calibration.model, calibration.settings
    equalized = settings.equalization and calibration.data
    with undone_on_error(model) if settings.rotation or equalized else nullcontext():
        with calibration.timed("transform"):
            if settings.rotation is not None:
                rotate(model, rotation_plan(model), seed=settings.seed)
            if equalized:
                equalize(model, scale_paths(model, calibration.segments), calibration.own_data)
        yield


def make_modules(calibration: Calibration) -> Modules:
    """The quantized modules of a transformed model, which itself stays as it is.

    Raises:
        ValueError: as `quantize_with_data`.
    """
    kept = calibration.kept
    with calibration.timed("inputs"):
        _capture_segment_inputs(calibration)
    with calibration.timed("sensitivity"):
        choose = partial(choose_precisions, calibration)
        calibration.precisions, sensitivities, lifts = kept.once("precisions", choose)
        calibration.report = replace(calibration.report, sensitivities=sensitivities, lifts=lifts)
    if calibration.settings.token_importance:
        with calibration.timed("importance"):
            measure = partial(token_importance, calibration)
            calibration.importance = kept.once("importance", measure, of_own_data=True)
    learn_vision_ranges(calibration)
    return _search(calibration)


def round_modules(calibration: Calibration) -> Modules:
    """The quantized modules of a transformed model, rounded to nearest without data."""
    model = calibration.model
    schemes = rounding_schemes(model, calibration.segments, calibration.settings)
    return {name: _round(model, name, scheme) for name, scheme in schemes.items()}


def _capture_segment_inputs(calibration: Calibration) -> None:
    """Records what enters every segment in full precision."""
    captured = capture_inputs(calibration.model, calibration.own_data, calibration.segments)
    calibration.inputs |= captured
    for segment in calibration.segments:
        if not captured[segment.name]:
            origins = (origin for batch in calibration.data for origin in batch.origins)
            samples = sum(origin != WRITTEN for origin in origins)
            raise ValueError(why_unreached(calibration.model, segment, samples))


def _search(calibration: Calibration) -> Modules:
    """Entropy, partition and joint search, segment after segment; returns the packed modules."""
    modules: Modules = {}
    segments: list[SegmentReport] = []
    sites: list[SiteReport] = []
    routing: list[RoutingReport] = []
    layers = sum(len(segment.layers) for segment in calibration.segments)
    steps = calibration.steps("search", layers)
    with ExitStack() as below:
        for place, segment in enumerate(calibration.segments):
            # eq. 4: how much each layer depends on the one before it
            with calibration.timed("entropy"):
                dependencies, asked = _dependencies(calibration, segment, place)
            # eq. 7: layers that depend on each other form a block
            blocks, threshold = partition_layers(
                dependencies, max_block_depth=calibration.settings.max_block_depth, threshold=asked
            )
            # eq. 3: ranges of a block are searched jointly, on the outputs of the quantized layers
            reports: list[BlockReport | None] = []
            quantized: list[QuantizedSite] = []
            for block in search_segment(calibration, segment, blocks):
                modules |= _pack_block(calibration.model, block)
                reports.append(block.report)
                if segment is not calibration.segments[-1]:
                    quantized += block.sites
                steps.advance(len(block.layers))
                sites += (
                    SiteReport(modules=site.site.modules, candidate=site.chosen.range)
                    for site in block.sites
                )
                routing += routing_reports(block.sites)
            segments.append(_segment_report(segment, dependencies, threshold, reports))
            # from here on the segment runs as quantized, and the next one sees its real output
            below.enter_context(installed(quantized))
            del calibration.inputs[segment.name]
    calibration.report = replace(
        calibration.report, segments=tuple(segments), sites=tuple(sites), routing=tuple(routing)
    )
    return modules


def _dependencies(
    calibration: Calibration, segment: Segment, place: int
) -> tuple[list[float], float | None]:
    """D(k, k+1) of the segment at `place`, in nats, and h0; None is their mean."""
    if segment.name in calibration.dependencies:
        return calibration.dependencies[segment.name]
    if not calibration.measures_entropy:
        return [0.0] * (len(live_layers(segment)) - 1), 0.0
    measure = partial(layer_dependencies, calibration, segment)
    measured = calibration.kept.once(f"entropies-{place}", measure)
    return measured, calibration.settings.entropy_threshold


def _segment_report(
    segment: Segment,
    dependencies: Sequence[float],
    threshold: float,
    blocks: Sequence[BlockReport | None],
) -> SegmentReport:
    return SegmentReport(
        component=segment.component,
        layers=tuple(layer.name for layer in segment.layers),
        entropies=tuple(dependencies),
        threshold=threshold,
        blocks=tuple(report for report in blocks if report),
    )


def _pack_block(model: nn.Module, block: SearchedBlock) -> Modules:
    """The quantized module of every linear of a searched block."""
    packed = {}
    for site in (part for whole in block.sites for part in whole.parts):
        for name, quantized in zip(site.site.modules, site.quantized_weights(), strict=True):
            tensors = packed_tensors(quantized, site.scheme, site.input_qparams)
            tensors = {part: keep(tensor) for part, tensor in tensors.items()}
            packed[name] = QVLMLinear.from_packed(get_linear(model, name), site.scheme, tensors)
        site.free_memory()
    return packed


def round_head(model: nn.Module, settings: CalibrationSettings) -> Modules:
    """The output head rounded to nearest, if the settings ask for it."""
    scheme = settings.head_scheme()
    return {} if scheme is None else {(name := output_head(model)): _round(model, name, scheme)}


def _round(model: nn.Module, name: str, scheme: QuantScheme) -> QVLMLinear:
    linear = get_linear(model, name)
    weight = linear.weight.detach().float()
    if scheme.hadamard is not None:
        weight = block_hadamard(weight, scheme.hadamard)
    return QVLMLinear.from_packed(linear, scheme, rounded_tensors(weight, scheme))
