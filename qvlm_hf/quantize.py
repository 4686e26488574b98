"""The whole method, top to bottom: READ THIS FIRST.

    samples -> rotation, equalization -> capture -> sensitivity, token importance, visual encoder
            optimisation -> (per segment) entropy -> partition -> joint search -> pack -> self-check

`calibrate_and_pack` is the paper's recipe (Q-VLM, arXiv 2410.08119) as docs/algorithm.md maps it:
activation entropy measures how much a layer depends on the one before it (eq. 4-6), layers that
depend on each other form a block (eq. 7), rounding functions are searched jointly inside a block
(eq. 3), segment after segment: vision encoder, projector, language model. Each is calibrated on
what the already quantized modules below it produce. `round_and_pack` is for schemes that need no
data.

The model is changed only at the very end, when every module is ready: an error on the way leaves it
as it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from qvlm_hf.calibration.layers import LayerInput, capture_inputs
from qvlm_hf.calibration.measure.answers import answer_logits
from qvlm_hf.calibration.measure.importance import token_importance
from qvlm_hf.calibration.measure.self_check import collapse_warning, compare_answers, head_warning
from qvlm_hf.calibration.progress import Steps
from qvlm_hf.calibration.provenance import provenance
from qvlm_hf.calibration.report import (
    BlockReport,
    CalibrationReport,
    Lift,
    SegmentReport,
    SiteReport,
    settings_dict,
)
from qvlm_hf.calibration.rounding import rounding_report, rounding_schemes
from qvlm_hf.calibration.samples import (
    Batch,
    Processor,
    Sample,
    batches,
    by_picture,
    longest_sample,
)
from qvlm_hf.calibration.search.blocks import partition_layers
from qvlm_hf.calibration.search.segments import (
    Evidence,
    SearchedBlock,
    layer_dependencies,
    search_segment,
)
from qvlm_hf.calibration.search.sensitivity import (
    SensitivityProbe,
    allocate_bits,
    guard_sites,
    measure_widths,
    site_parameters,
)
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.calibration.settings import CalibrationSettings, Precision
from qvlm_hf.calibration.transforms.equalization import equalize
from qvlm_hf.calibration.transforms.rotation import rotate, undone_on_error
from qvlm_hf.calibration.vision_encoder import OptimizedVision, optimize_vision
from qvlm_hf.calibration.waiting import yield_to_others
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.format.weight_grid import not_finite, quantize_weight
from qvlm_hf.models.graph import (
    Segment,
    full_precision_modules,
    get_linear,
    output_head,
    resolve,
    rotation_plan,
    scale_paths,
    why_empty,
)
from qvlm_hf.nn.linear import QVLMLinear, packed_tensors
from qvlm_hf.nn.replace import replace_modules

__all__ = ["CHECK_SAMPLES", "calibrate_and_pack", "round_and_pack"]

_FEW_SAMPLES = 16  # seen: four equal samples at W8A8 cost the demo model 60 points, and their own self-check could not know
_GUARDED_BITS = 4  # schemes with more bits than this break no site
CHECK_SAMPLES = 16  # held-out samples of the self-check


@yield_to_others()
def calibrate_and_pack(
    model: nn.Module,
    settings: CalibrationSettings,
    samples: Sequence[Sample],
    processor: Processor,
    *,
    held_out: Sequence[Sample] = (),
    callbacks: Sequence[Any] = (),
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

    Returns:
        What was measured, chosen and kept.

    Raises:
        ValueError: unsupported model, a module that no sample reaches, a sample that it has no
            positions for, NaN in weights or activations; under `settings.strict` also a model that
            collapsed. The model is then unchanged.
    """
    segments = _resolve(model, settings)
    longest = longest_sample(model)
    data = list(batches(by_picture(samples), processor, settings.batch_size, max_tokens=longest))
    checked = list(islice(held_out or samples, CHECK_SAMPLES))
    checks = list(batches(checked, processor, settings.batch_size, max_tokens=longest))
    reference = [logits.cpu() for batch in checks for logits in answer_logits(model, batch)]
    with _transformed(model, settings, segments, data):
        full = capture_inputs(model, data, [segment.layers[0].name for segment in segments])
        for segment in segments:
            if not full[segment.layers[0].name]:
                raise ValueError(_unreached(segment, len(samples)))
        precisions, sensitivities, lifts = _choose_precisions(
            model, segments, full, data, settings, callbacks
        )
        importance = (
            token_importance(model, segments, data, seed=settings.seed)
            if settings.token_importance
            else {}
        )
        vision = _optimize_vision(model, segments, full, data, settings, precisions, callbacks)
        evidence = (
            Evidence(precisions, importance, vision.ranges, vision.dependencies)
            if vision
            else Evidence(precisions, importance)
        )
        modules, segment_reports, site_reports = _search(
            model, segments, full, data, settings, evidence, callbacks
        )
        head = _pack_head(model, settings)
        floating = {name: get_linear(model, name) for name in (*modules, *head)}
        try:
            replace_modules(model, modules)
            check = compare_answers(model, checks, reference, held_out=bool(held_out))
            collapsed = collapse_warning(check)
            replace_modules(model, head)
            with_head = (
                compare_answers(model, checks, reference, held_out=bool(held_out))
                if head
                else check
            )
            harmful = head_warning(check, with_head)
            if settings.strict and (collapsed or harmful):
                raise ValueError(f"strict=True: {collapsed or harmful}")
        except BaseException:
            replace_modules(model, floating)
            raise
        if harmful:
            replace_modules(model, {name: floating[name] for name in head})
        else:
            modules, check = head | modules, with_head
    warnings = [
        warning
        for warning in (
            collapsed,
            harmful,
            _few_samples(samples, settings),
            _not_optimized(vision, settings),
        )
        if warning
    ]
    return CalibrationReport(
        settings=settings_dict(settings),
        provenance=provenance(samples, data, settings) | _vision_provenance(vision, settings),
        modules={name: module.scheme for name, module in modules.items()},
        segments=tuple(segment_reports),
        sites=tuple(site_reports),
        sensitivities=sensitivities,
        lifts=tuple(lifts),
        vision=None if vision is None else vision.report,
        average_weight_bits=_average_bits(modules),
        dead=tuple(layer.name for segment in segments for layer in segment.layers if layer.dead),
        full_precision=tuple(
            name for name in full_precision_modules(model, segments) if name not in modules
        ),
        self_check=check,
        warnings=tuple(warnings),
    )


@yield_to_others()
def round_and_pack(model: nn.Module, settings: CalibrationSettings) -> CalibrationReport:
    """Rounds a model in place to nearest, without data: weight-only schemes, and inputs with a range per token found at run time.

    Args:
        model: a full-precision Transformers model of a known family.
        settings: with `needs_data` False.

    Raises:
        ValueError: the scheme needs calibration data, or as `calibrate_and_pack`.
    """
    if settings.needs_data:
        raise ValueError(
            "this scheme has activation ranges to calibrate: give dataset=, or "
            "activation_granularity='dynamic_token'."
        )
    segments = _resolve(model, settings)
    schemes = rounding_schemes(model, segments, settings)
    with _transformed(model, settings):
        modules = {name: _round(model, name, scheme) for name, scheme in schemes.items()}
    replace_modules(model, modules)
    return rounding_report(model, segments, schemes, settings)


@contextmanager
def _transformed(
    model: nn.Module,
    settings: CalibrationSettings,
    segments: Sequence[Segment] = (),
    data: Sequence[Batch] = (),
) -> Iterator[None]:
    """Folds the rotation and the scales that the settings ask for into the weights; an error inside leaves the model as it was."""
    equalized = settings.equalization and settings.activation_bits < 16 and len(data) > 0
    with undone_on_error(model) if settings.rotation or equalized else nullcontext():
        if settings.rotation is not None:
            rotate(model, rotation_plan(model), seed=settings.seed)
        if equalized:
            equalize(model, scale_paths(model, segments), data)
        yield


def _choose_precisions(
    model: nn.Module,
    segments: Sequence[Segment],
    inputs: Mapping[str, Sequence[LayerInput]],
    data: Sequence[Batch],
    settings: CalibrationSettings,
    callbacks: Sequence[Any],
) -> tuple[dict[str, Precision], dict[str, float], list[Lift]]:
    """Bits of the sites that differ from the scheme (guard, budget), and for the report each site's divergence and the lifts."""
    guarded = (
        settings.guard and min(settings.weight_bits, settings.activation_bits) <= _GUARDED_BITS
    )
    if not guarded and settings.precision_budget is None:
        return {}, {}, []
    parameters = site_parameters(model, segments)
    probe = SensitivityProbe(
        model,
        segments,
        inputs,
        data,
        settings,
        Steps("sensitivity", callbacks, len(parameters)).advance,
    )
    sensitivities, lifts = guard_sites(probe, settings) if guarded else ({}, [])
    precisions = {
        lift.site: Precision(weight_bits=lift.weight_bits, activation_bits=lift.activation_bits)
        for lift in lifts
    }
    if settings.precision_budget is not None:
        for name, bits in allocate_bits(
            measure_widths(probe), parameters, settings.precision_budget
        ).items():
            precisions[name] = replace(precisions.get(name, settings.precision), weight_bits=bits)
    return precisions, sensitivities, lifts


def _optimize_vision(
    model: nn.Module,
    segments: Sequence[Segment],
    inputs: Mapping[str, Sequence[LayerInput]],
    data: Sequence[Batch],
    settings: CalibrationSettings,
    precisions: Mapping[str, Precision],
    callbacks: Sequence[Any],
) -> OptimizedVision | None:
    if settings.optimize_vision is None:
        return None
    advance = Steps("vision", callbacks, settings.optimize_vision.epochs).advance
    vision = optimize_vision(model, segments, inputs, data, settings, precisions, advance)
    if vision is None and settings.strict:
        raise ValueError(f"strict=True: {_not_optimized(vision, settings)}")
    return vision


def _not_optimized(vision: OptimizedVision | None, settings: CalibrationSettings) -> str | None:
    """One line if the visual encoder optimisation was asked for and could not run."""
    if settings.optimize_vision is None or vision is not None:
        return None
    return (
        "optimize_vision did not run: it needs at least two batches with pictures (a smaller "
        "batch_size=, or more samples) and a vision "
        "encoder or projector to quantize."
    )


def _vision_provenance(
    vision: OptimizedVision | None, settings: CalibrationSettings
) -> dict[str, str]:
    """What came of `optimize_vision`, for config.json, which otherwise holds only that it was asked for."""
    if settings.optimize_vision is None:
        return {}
    return {
        "optimize_vision": "did not run"
        if vision is None
        else "kept"
        if vision.report.kept
        else "not kept: no better"
    }


def _search(
    model: nn.Module,
    segments: Sequence[Segment],
    full: dict[str, list[LayerInput]],
    data: Sequence[Batch],
    settings: CalibrationSettings,
    evidence: Evidence,
    callbacks: Sequence[Any],
) -> tuple[dict[str, QVLMLinear], list[SegmentReport], list[SiteReport]]:
    """Entropy, partition and joint search of one segment after the other; returns the packed modules and what was found."""
    modules: dict[str, QVLMLinear] = {}
    segment_reports: list[SegmentReport] = []
    site_reports: list[SiteReport] = []
    progress = Steps("search", callbacks, sum(len(segment.layers) for segment in segments))
    with ExitStack() as below:
        for segment in segments:
            first = segment.layers[0].name
            dependencies, threshold = evidence.dependencies.get(segment.component) or (
                layer_dependencies(model, segment, full[first], settings), settings.entropy_threshold,
            )  # fmt: skip
            blocks, threshold = partition_layers(
                dependencies, max_block_depth=settings.max_block_depth, threshold=threshold
            )
            inputs = capture_inputs(model, data, [first])[first] if modules else full[first]
            searched = []
            for found in search_segment(
                model, segment, blocks, full[first], inputs, settings, evidence
            ):
                modules |= _pack_block(model, found)
                searched.append(found)
                progress.advance(len(found.layers))
            segment_reports.append(_segment_report(segment, dependencies, threshold, searched))
            sites = [site for found in searched for row in found.sites for site in row]
            site_reports += [
                SiteReport(modules=site.site.modules, candidate=site.chosen) for site in sites
            ]
            # from here on the segment runs as quantized, so that the next one sees what it will see
            below.enter_context(installed(sites))
            del full[first]
    return modules, segment_reports, site_reports


def _average_bits(modules: Mapping[str, QVLMLinear]) -> float:
    sizes = {name: module.in_features * module.out_features for name, module in modules.items()}
    return sum(size * modules[name].scheme.weight_bits for name, size in sizes.items()) / sum(
        sizes.values()
    )


def _resolve(model: nn.Module, settings: CalibrationSettings) -> tuple[Segment, ...]:
    """The segments to quantize, their weights checked: a broken checkpoint fails here and not after the search."""
    segments = resolve(
        model,
        quantize_vision=settings.quantize_vision,
        quantize_projector=settings.quantize_projector,
        modules_to_not_convert=settings.modules_to_not_convert,
        rotated=settings.rotation is not None,
    )
    for segment in segments:
        for name in (
            name for layer in segment.layers for site in layer.sites for name in site.modules
        ):
            linear = get_linear(model, name)
            if linear.weight.is_meta:
                raise ValueError(f"{name} {why_empty(linear)}, then quantize it.")
            if not torch.isfinite(linear.weight).all():
                raise ValueError(f"the weight of {name} {not_finite(linear.weight.dtype)}")
    return segments


def _pack_block(model: nn.Module, found: SearchedBlock) -> dict[str, QVLMLinear]:
    """The quantized module of every linear of a searched block."""
    packed = {}
    for site in (site for row in found.sites for site in row):
        for name, quantized in zip(site.site.modules, site.quantized_weights(), strict=True):
            tensors = packed_tensors(quantized, site.scheme, site.input_qparams)
            packed[name] = QVLMLinear.from_packed(get_linear(model, name), site.scheme, tensors)
    return packed


def _pack_head(model: nn.Module, settings: CalibrationSettings) -> dict[str, QVLMLinear]:
    scheme = settings.head_scheme()
    return {} if scheme is None else {(name := output_head(model)): _round(model, name, scheme)}


def _round(model: nn.Module, name: str, scheme: QuantScheme) -> QVLMLinear:
    linear = get_linear(model, name)
    weight = linear.weight.detach().float()
    transformed = weight if scheme.hadamard is None else block_hadamard(weight, scheme.hadamard)
    return QVLMLinear.from_packed(
        linear, scheme, packed_tensors(quantize_weight(transformed, scheme), scheme, None)
    )


def _few_samples(samples: Sequence[Sample], settings: CalibrationSettings) -> str | None:
    """One line if the ranges come from so few samples that they cannot be trusted on others."""
    if len(samples) >= _FEW_SAMPLES or not settings.needs_data:
        return None
    return f"static ranges from {len(samples)} samples clip what these did not show: use {_FEW_SAMPLES} or more samples like your data."


def _unreached(segment: Segment, samples: int) -> str:
    if segment.component == "language":
        return f"calibration did not reach {segment.layers[0].name}: none of the {samples} samples has text."
    return (
        f"calibration did not reach {segment.layers[0].name}: none of the {samples} samples has a "
        f"picture; add pictures to the dataset, "
        "or leave the vision side alone (modules_to_not_convert=['vision_tower', "
        "'multi_modal_projector'])."
    )


def _segment_report(
    segment: Segment,
    dependencies: Sequence[float],
    threshold: float,
    searched: Sequence[SearchedBlock],
) -> SegmentReport:
    blocks = tuple(
        BlockReport(
            layers=tuple(layer.name for layer in found.layers),
            initial=found.result.initial,
            greedy=found.result.greedy,
            joint=found.result.joint,
            evaluations=found.result.evaluations,
        )
        for found in searched
        if found.result is not None
    )
    return SegmentReport(
        component=segment.component,
        layers=tuple(layer.name for layer in segment.layers),
        entropies=tuple(dependencies),
        threshold=threshold,
        blocks=blocks,
    )
