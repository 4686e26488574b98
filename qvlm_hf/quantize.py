"""The whole method, top to bottom: READ THIS FIRST.

    samples -> rotation, equalization -> layer inputs -> sensitivity, token importance,
            visual encoder optimisation (eq. 8-10) -> per segment: entropy (eq. 4), partition
            (eq. 7), joint search (eq. 3), GPTQ -> pack -> self-check

`calibrate_and_pack` is the method of Q-VLM (arXiv 2410.08119) as docs/algorithm.md maps it. A
`Calibration` walks through the steps. Activation entropy measures how much a layer depends on the
one before it (eq. 4-6, calibration/measure/entropy.py). Layers that depend on each other form a
block (eq. 7, calibration/search/blocks.py). Rounding functions are searched jointly inside a block
(eq. 3, calibration/search/joint_search.py), segment after segment: vision encoder, projector,
language model. Each segment is calibrated on the outputs of the quantized modules below it.

`round_and_pack` is for schemes that need no data.

The model is changed only at the very end, when every module is ready: an error on the way leaves it
as it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from qvlm_hf.calibration.layers import LayerInput, capture_inputs
from qvlm_hf.calibration.measure.entropy import layer_dependencies
from qvlm_hf.calibration.measure.importance import token_importance
from qvlm_hf.calibration.measure.self_check import AnswerComparison, collapse_warning, head_warning
from qvlm_hf.calibration.measure.written_text import WRITTEN, with_text
from qvlm_hf.calibration.plan import check_weights, resolve_segments
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.process.waiting import yield_to_others
from qvlm_hf.calibration.record.provenance import provenance
from qvlm_hf.calibration.record.report import (
    BlockReport,
    CalibrationReport,
    RoutingReport,
    SegmentReport,
    SiteReport,
    settings_dict,
)
from qvlm_hf.calibration.record.resume import SavedSteps
from qvlm_hf.calibration.rounding import (
    read_without_row,
    rounding_report,
    rounding_schemes,
    with_coverage,
)
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import Processor, Sample, batches, by_picture
from qvlm_hf.calibration.search.blocks import partition_layers
from qvlm_hf.calibration.search.routing import few_tokens_warning, routing_reports
from qvlm_hf.calibration.search.segments import SearchedBlock, search_segment
from qvlm_hf.calibration.search.sensitivity import choose_precisions
from qvlm_hf.calibration.search.sites import QuantizedSite, installed
from qvlm_hf.calibration.search.vision_encoder import learn_vision_ranges
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.transforms.equalization import equalize
from qvlm_hf.calibration.transforms.rotation import rotate, undone_on_error
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.families import find_parts
from qvlm_hf.models.folds import rotation_plan, scale_paths, why_not_rotatable
from qvlm_hf.models.graph import (
    Segment,
    full_precision_modules,
    get_linear,
    output_head,
)
from qvlm_hf.nn.linear import QVLMLinear, packed_tensors, rounded_tensors
from qvlm_hf.nn.replace import replace_modules

__all__ = [
    "CHECK_SAMPLES",
    "calibrate_and_pack",
    "make_modules",
    "round_and_pack",
    "round_modules",
    "transformed",
]

CHECK_SAMPLES = 16  # held-out samples of the self-check
# Seen: four equal samples at W8A8 cost the demo model 60 points, and their own self-check could not
# know.
_FEW_SAMPLES = 16

_Modules = dict[str, QVLMLinear]


@yield_to_others()
def calibrate_and_pack(
    model: nn.Module,
    settings: CalibrationSettings,
    samples: Sequence[Sample],
    processor: Processor,
    *,
    held_out: Sequence[Sample] = (),
    callbacks: Sequence[Any] = (),
    kept: SavedSteps | None = None,
) -> CalibrationReport:
    """Quantizes a model in place with the paper's cross-layer-dependency search.

    Args:
        model: a full-precision Transformers model of a known family, in eval mode.
        settings: bits, candidates, depth, seed.
        samples: calibration chats, answers included.
        processor: of the model.
        held_out: samples that calibration does not see, for the self-check; without any it uses
            calibration samples and says so.
        callbacks: objects with `on_step(name, done, total)`.
        kept: steps of this calibration that are finished already, and the place for the others.

    Returns:
        The record of the calibration.

    Raises:
        ValueError: unsupported model, a module that no sample reaches, a sample that it has no
            positions for, NaN in weights or activations; under `settings.strict` also a model that
            collapsed. The model is then unchanged.
        OSError: a step cannot be kept, as on a full disk. Likewise.
    """
    prepared = partial(batches, processor=processor, batch_size=settings.batch_size, model=model)
    with experts_split(model, keep=True):
        obstacle = why_not_rotatable(model) if settings.rotation == "auto" else ""
        check_weights(resolve_segments(model, settings))
        settings = settings.for_model(rotatable=not obstacle)
        calibration = Calibration(
            model=model,
            settings=settings,
            segments=resolve_segments(model, settings),
            data=list(prepared(by_picture(samples))),
            callbacks=callbacks,
            kept=kept or SavedSteps(),
        )
        found = calibration.found
        found["provenance"] = provenance(samples, calibration.data, settings)
        if obstacle:
            found["provenance"]["rotation"] = f"none: {obstacle}"
        calibration.data = with_text(calibration)
        calibration.places = _deal(calibration)
        checks = list(prepared((held_out or samples)[:CHECK_SAMPLES]))
        answers = AnswerComparison(model, checks, held_out=bool(held_out))
        with transformed(calibration):
            modules = make_modules(calibration)
            with calibration.timed("check"):
                modules, warnings = _replace_and_check(
                    calibration, modules, _round_head(model, settings), answers
                )
        if few_tokens := few_tokens_warning(found["routing"]):
            warnings.append(few_tokens)
        if len(samples) < _FEW_SAMPLES and settings.needs_data:
            warnings.append(
                f"static ranges from {len(samples)} samples clip what these did not show: use "
                f"{_FEW_SAMPLES} or more samples like your data."
            )
        found["warnings"] = (*warnings, *found.get("warnings", ()))
        found["average_weight_bits"] = _average_bits(modules)
        return _report(calibration, modules)


@yield_to_others()
def round_and_pack(model: nn.Module, settings: CalibrationSettings) -> CalibrationReport:
    """Rounds a model in place to nearest, without data.

    That is possible for weight-only schemes, and where inputs have a range per token found at run
    time.

    Args:
        model: a full-precision Transformers model; a family without a row is read by structure.
        settings: with `needs_data` False.

    Raises:
        ValueError: the scheme needs calibration data, or as `calibrate_and_pack`.
    """
    if settings.needs_data:
        raise ValueError(
            "this scheme has activation ranges to calibrate: give dataset=, or "
            "activation_granularity='dynamic_token'."
        )
    structure = read_without_row(model, settings)
    with experts_split(model, keep=True):
        segments = resolve_segments(model, settings) if structure is None else structure.segments
        check_weights(segments)
        calibration = Calibration(model=model, settings=settings, segments=segments)
        with transformed(calibration):
            modules = round_modules(calibration)
        replace_modules(model, modules)
        schemes = {name: module.scheme for name, module in modules.items()}
        return rounding_report(model, calibration.segments, schemes, settings, structure)


def _deal(calibration: Calibration) -> list[int]:
    """The batches that this process runs; all, where there is one process."""
    remedy = f", give more samples, or a smaller batch_size than {calibration.settings.batch_size}"
    return ranks.shard_batches(
        ["pixel_values" in batch.inputs for batch in calibration.data], remedy
    )


@contextmanager
def transformed(calibration: Calibration) -> Iterator[None]:
    """Folds rotation and equalization into the weights; an error inside undoes it."""
    model, settings = calibration.model, calibration.settings
    equalized = settings.equalization and settings.activation_bits < 16 and calibration.data
    with undone_on_error(model) if settings.rotation or equalized else nullcontext():
        with calibration.timed("transform"):
            if settings.rotation is not None:
                rotate(model, rotation_plan(model), seed=settings.seed)
            if equalized:
                equalize(model, scale_paths(model, calibration.segments), calibration.own_data)
        yield


def make_modules(calibration: Calibration) -> _Modules:
    """The quantized modules of a transformed model, which itself stays as it is.

    Args:
        calibration: with data; its model inside `transformed`.

    Raises:
        ValueError: as `calibrate_and_pack`.
    """
    kept = calibration.kept
    with calibration.timed("inputs"):
        _capture_segment_inputs(calibration)
    with calibration.timed("sensitivity"):
        choose = partial(choose_precisions, calibration)
        calibration.precisions, measured = kept.once("precisions", choose)
        calibration.found |= measured
    if calibration.settings.token_importance:
        with calibration.timed("importance"):
            measure = partial(token_importance, calibration)
            # of several processes each has its own batches, and the first one alone keeps steps
            several = ranks.world_size() > 1
            calibration.importance = measure() if several else kept.once("importance", measure)
    learn_vision_ranges(calibration)
    return _search(calibration)


def round_modules(calibration: Calibration) -> _Modules:
    """The quantized modules of a transformed model, rounded to nearest without data."""
    model = calibration.model
    schemes = rounding_schemes(model, calibration.segments, calibration.settings)
    return {name: _round(model, name, scheme) for name, scheme in schemes.items()}


def _capture_segment_inputs(calibration: Calibration) -> None:
    """Records what enters every segment in full precision."""
    captured = capture_inputs(calibration.model, calibration.own_data, calibration.segments)
    calibration.inputs |= captured
    origins = (origin for batch in calibration.data for origin in batch.origins)
    samples = sum(origin != WRITTEN for origin in origins)
    for segment in calibration.segments:
        if captured[segment.name]:
            continue
        none = f"calibration did not reach {segment.name}: none of the {samples}"
        if segment.component == "language":
            raise ValueError(f"{none} samples has text.")
        parts, modules = find_parts(calibration.model), calibration.model.named_modules()
        names = [name for name, module in modules if module in (parts.vision, parts.projector)]
        raise ValueError(
            f"{none} samples has a picture; add pictures to the dataset, or leave the vision side "
            f"alone (modules_to_not_convert={[name.rpartition('.')[2] for name in names]})."
        )


def _search(calibration: Calibration) -> _Modules:
    """Entropy, partition and joint search, segment after segment; returns the packed modules."""
    model, settings = calibration.model, calibration.settings
    modules: _Modules = {}
    segments: list[SegmentReport] = []
    sites: list[SiteReport] = []
    routing: list[RoutingReport] = []
    layers = sum(len(segment.layers) for segment in calibration.segments)
    steps = calibration.steps("search", layers)
    with ExitStack() as below:
        for place, segment in enumerate(calibration.segments):
            # eq. 4: how much each layer depends on the one before it
            measure = partial(layer_dependencies, calibration, segment)
            with calibration.timed("entropy"):
                dependencies, threshold = calibration.dependencies.get(segment.name) or (
                    calibration.kept.once(f"entropies-{place}", measure),
                    settings.entropy_threshold,
                )
            # eq. 7: layers that depend on each other form a block
            blocks, threshold = partition_layers(
                dependencies, max_block_depth=settings.max_block_depth, threshold=threshold
            )
            # eq. 3: ranges of a block are searched jointly, on the outputs of the quantized layers
            record = partial(_quantized_inputs, calibration, segment, first=not modules)
            reports: list[BlockReport | None] = []
            quantized: list[QuantizedSite] = []
            for block in search_segment(calibration, segment, blocks, record):
                modules |= _pack_block(model, block)
                reports.append(block.report)
                if segment is not calibration.segments[-1]:
                    quantized += block.sites
                steps.advance(len(block.layers))
                sites += [
                    SiteReport(modules=site.site.modules, candidate=site.chosen.range)
                    for site in block.sites
                ]
                routing += routing_reports(block.sites)
            segments.append(
                SegmentReport(
                    component=segment.component,
                    layers=tuple(layer.name for layer in segment.layers),
                    entropies=tuple(dependencies),
                    threshold=threshold,
                    blocks=tuple(report for report in reports if report),
                )
            )
            # from here on the segment runs as quantized, and the next one sees its real output
            below.enter_context(installed(quantized))
            del calibration.inputs[segment.name]
    calibration.found |= {
        "segments": tuple(segments),
        "sites": tuple(sites),
        "routing": tuple(routing),
    }
    return modules


def _quantized_inputs(
    calibration: Calibration, segment: Segment, *, first: bool
) -> list[LayerInput]:
    """What enters a segment now that those below it run quantized; below the first is none."""
    if first:
        return calibration.inputs[segment.name]
    with calibration.timed("inputs"):
        return capture_inputs(calibration.model, calibration.own_data, [segment])[segment.name]


def _pack_block(model: nn.Module, block: SearchedBlock) -> _Modules:
    """The quantized module of every linear of a searched block."""
    packed = {}
    for site in (part for whole in block.sites for part in whole.parts):
        for name, quantized in zip(site.site.modules, site.quantized_weights(), strict=True):
            tensors = packed_tensors(quantized, site.scheme, site.input_qparams)
            tensors = {part: keep(tensor) for part, tensor in tensors.items()}
            packed[name] = QVLMLinear.from_packed(get_linear(model, name), site.scheme, tensors)
        site.free_integers()
    return packed


def _round_head(model: nn.Module, settings: CalibrationSettings) -> _Modules:
    """The output head rounded to nearest, if the settings ask for it."""
    scheme = settings.head_scheme()
    return {} if scheme is None else {(name := output_head(model)): _round(model, name, scheme)}


def _round(model: nn.Module, name: str, scheme: QuantScheme) -> QVLMLinear:
    linear = get_linear(model, name)
    weight = linear.weight.detach().float()
    if scheme.hadamard is not None:
        weight = block_hadamard(weight, scheme.hadamard)
    return QVLMLinear.from_packed(linear, scheme, rounded_tensors(weight, scheme))


def _replace_and_check(
    calibration: Calibration, modules: _Modules, head: _Modules, answers: AnswerComparison
) -> tuple[_Modules, list[str]]:
    """Puts the modules into the model; a head that moves the answers goes back out.

    Returns the modules that stay, and warnings of the self-check. Any error restores the model.
    """
    model = calibration.model
    floating = {name: get_linear(model, name) for name in (*modules, *head)}
    try:
        replace_modules(model, modules)
        check = with_head = answers.measure()
        if head:
            replace_modules(model, head)
            with_head = answers.measure()
        harmful = head_warning(check, with_head)
        chosen = calibration.settings.activation_granularity is not None
        collapsed = collapse_warning(check, ranges_chosen=chosen)
        warnings = [warning for warning in (collapsed, harmful) if warning]
        if calibration.settings.strict and warnings:
            raise ValueError(f"strict=True: {warnings[0]}")
    except BaseException:
        replace_modules(model, floating)
        raise
    if harmful:
        replace_modules(model, {name: floating[name] for name in head})
    calibration.found["self_check"] = check if harmful else with_head
    return modules if harmful else head | modules, warnings


def _average_bits(modules: _Modules) -> float:
    sizes = {name: module.in_features * module.out_features for name, module in modules.items()}
    bits = sum(size * modules[name].scheme.weight_bits for name, size in sizes.items())
    return bits / sum(sizes.values())


def _report(calibration: Calibration, modules: _Modules) -> CalibrationReport:
    segments = calibration.segments
    untouched = full_precision_modules(calibration.model, segments)
    report = CalibrationReport(
        settings=settings_dict(calibration.settings),
        modules={name: module.scheme for name, module in modules.items()},
        dead=tuple(layer.name for segment in segments for layer in segment.layers if layer.dead),
        full_precision=tuple(name for name in untouched if name not in modules),
        **calibration.found,
    )
    return with_coverage(report, calibration.model, calibration.settings)
