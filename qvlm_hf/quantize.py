"""From a model to a quantized one, with data or without: what stands around the method.

`quantize_with_data` is Q-VLM (arXiv 2410.08119) as docs/algorithm.md maps it. In the order it runs:

1. recipe: where several are to be compared, qvlm_hf/recipes.py does that;
2. begin: a `Calibration` holds batches, settings and report, and walks through the rest;
3. modules: the method, qvlm_hf/method.py, READ THAT FIRST;
4. replace and check: the packed model's answers beside those of full precision;
5. report.

`quantize_without_data` rounds to nearest, for schemes whose inputs need no calibrated ranges.

Rotation and equalization fold into the weights early, and an error undoes them. Modules are
replaced at the very end, when all are ready. So an error on the way leaves the model as it was.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qvlm_hf.calibration.measure.not_finite import naming_the_source
from qvlm_hf.calibration.measure.self_check import AnswerComparison, collapse_warning, head_warning
from qvlm_hf.calibration.measure.written_text import with_text
from qvlm_hf.calibration.plan import check_weights, resolve_segments
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.waiting import yield_to_others
from qvlm_hf.calibration.record.inputs_hash import made_from
from qvlm_hf.calibration.record.provenance import provenance
from qvlm_hf.calibration.record.quantized_share import with_coverage
from qvlm_hf.calibration.record.report import CalibrationReport, RecipeTrial
from qvlm_hf.calibration.record.resume import SavedSteps, alone_in
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import (
    IGNORE_INDEX,
    Processor,
    Sample,
    batches,
    by_picture,
    fingerprint,
)
from qvlm_hf.calibration.search.routing import few_tokens_warning
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.without_data import read_without_row, rounding_report
from qvlm_hf.method import Modules, make_modules, round_head, round_modules, transformed
from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.folds import why_not_rotatable
from qvlm_hf.models.graph import full_precision_modules, get_linear
from qvlm_hf.nn.replace import replace_modules
from qvlm_hf.recipes import best_recipe

__all__ = ["CHECK_SAMPLES", "quantize_with_data", "quantize_without_data"]

CHECK_SAMPLES = 16  # held-out samples of the self-check
# Seen: four equal samples at W8A8 cost the demo model 60 points, and their own self-check could not
# know.
_FEW_SAMPLES = 16


@yield_to_others()
def quantize_with_data(
    model: nn.Module,
    settings: CalibrationSettings,
    samples: Sequence[Sample],
    processor: Processor,
    *,
    held_out: Sequence[Sample] = (),
    callbacks: Sequence[Any] = (),
    resume_dir: Path | None = None,
) -> CalibrationReport:
    """Quantizes a model in place with the paper's cross-layer-dependency search.

    Args:
        model: a full-precision Transformers model of a known family, in eval mode.
        settings: bits, candidates, depth, seed; with `recipe` "auto" recipes are compared first.
        samples: calibration chats, answers included.
        processor: of the model.
        held_out: samples that calibration does not see, for the self-check; without any it uses
            calibration samples and says so.
        callbacks: objects with `on_step(name, done, total)`.
        resume_dir: from `check_resume_dir`; keeps finished steps. Those of a calibration that was
            stopped are not repeated.

    Raises:
        ValueError: unsupported model, a module that no sample reaches, a sample that it has no
            positions for, NaN in weights or activations; under `settings.strict` also a model that
            collapsed; steps in `resume_dir` that are of another calibration. The model is then
            unchanged.
        OSError: a step cannot be kept, as on a full disk. Likewise.
    """
    everything, kept = [*samples, *held_out], SavedSteps()
    with ranks.sharing_errors(), alone_in(resume_dir):
        ranks.check_alike(fingerprint(everything), "samples")
        if resume_dir is not None:
            data = batches(by_picture(samples), processor, settings.batch_size)
            kept = SavedSteps(resume_dir, made_from(model, settings, everything, data))
        with naming_the_source(model, everything, processor), experts_split(model, keep=True):
            check_weights(resolve_segments(model, settings))
            chosen = settings.activation_granularity is not None  # by the user, no recipe
            start = time.perf_counter()
            settings, trials = best_recipe(
                model, settings, samples, processor,
                held_out=held_out, callbacks=callbacks, kept=kept,
            )  # fmt: skip
            compared = time.perf_counter() - start
            calibration = _begin(model, settings, samples, processor, callbacks, kept)
            if trials:
                calibration.report.seconds["recipes"] = compared
            check_on = (held_out or samples)[:CHECK_SAMPLES]
            checks = list(batches(check_on, processor, settings.batch_size, model=model))
            answers = AnswerComparison(model, checks, held_out=bool(held_out))
            with transformed(calibration):
                modules = make_modules(calibration)
                with calibration.timed("check"):
                    modules, warnings = _replace_and_check(calibration, modules, answers, chosen)
            warnings += _too_little_data(calibration, len(samples))
            return _report(calibration, modules, trials, warnings)


@yield_to_others()
def quantize_without_data(model: nn.Module, settings: CalibrationSettings) -> CalibrationReport:
    """Rounds a model in place to nearest, without data.

    That is possible for weight-only schemes, and where inputs have a range per token found at run
    time.

    Args:
        model: a full-precision Transformers model; a family without a row is read by structure.
        settings: with `needs_data` False.

    Raises:
        ValueError: the scheme needs calibration data, or as `quantize_with_data`.
    """
    if settings.needs_data:
        raise ValueError(
            "this scheme has activation ranges to calibrate: give dataset=, or "
            "activation_granularity='dynamic_token'."
        )
    settings = replace(settings, recipe="fixed")  # nothing to compare recipes by
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


def _begin(
    model: nn.Module,
    settings: CalibrationSettings,
    samples: Sequence[Sample],
    processor: Processor,
    callbacks: Sequence[Any],
    kept: SavedSteps,
) -> Calibration:
    """A calibration with its batches, and those of them that this process runs."""
    obstacle = why_not_rotatable(model) if settings.rotation == "auto" else ""
    settings = settings.for_model(rotatable=not obstacle)
    calibration = Calibration(
        model=model,
        settings=settings,
        segments=resolve_segments(model, settings),
        data=list(batches(by_picture(samples), processor, settings.batch_size, model=model)),
        callbacks=callbacks,
        kept=kept,
    )
    origin = provenance(samples, calibration.data, settings)
    if obstacle:
        origin["rotation"] = f"none: {obstacle}"
    calibration.report = replace(calibration.report, provenance=origin)
    calibration.data = with_text(model, calibration.data, settings)
    remedy = f", give more samples, or a smaller batch_size than {settings.batch_size}"
    calibration.places = ranks.shard_batches(
        ["pixel_values" in batch.inputs for batch in calibration.data], remedy
    )
    return calibration


def _too_little_data(calibration: Calibration, samples: int) -> list[str]:
    """Warnings about ranges that too few tokens or samples have shown, and missing answers."""
    few_tokens = few_tokens_warning(calibration.report.routing)
    warnings = [few_tokens] if few_tokens else []
    if not any((batch.labels != IGNORE_INDEX).any() for batch in calibration.data):
        warnings.append(
            f"none of the {samples} samples has an answer: token importance, guard and self-check "
            f"need some, so they did nothing: give samples with answers."
        )
    if samples < _FEW_SAMPLES and calibration.settings.needs_data:
        warnings.append(
            f"static ranges from {samples} samples clip what these did not show: use "
            f"{_FEW_SAMPLES} or more samples like your data."
        )
    return warnings


def _replace_and_check(
    calibration: Calibration, modules: Modules, answers: AnswerComparison, ranges_chosen: bool
) -> tuple[Modules, list[str]]:
    """Puts the modules into the model, and a quantized head unless that moves the answers.

    Returns the modules that stay, and warnings of the self-check. Any error restores the model.
    `ranges_chosen` is that of `collapse_warning`.
    """
    model, settings = calibration.model, calibration.settings
    head = round_head(model, settings)
    floating = {name: get_linear(model, name) for name in (*modules, *head)}
    try:
        replace_modules(model, modules)
        check = with_head = answers.measure()
        if head:
            replace_modules(model, head)
            with_head = answers.measure()
        harmful = head_warning(check, with_head)
        collapsed = collapse_warning(check, ranges_chosen=ranges_chosen)
        warnings = [warning for warning in (collapsed, harmful) if warning]
        if settings.strict and warnings:
            raise ValueError(f"strict=True: {warnings[0]}")
    except BaseException:
        replace_modules(model, floating)
        raise
    if harmful:
        replace_modules(model, {name: floating[name] for name in head})
    self_check = check if harmful else with_head
    calibration.report = replace(calibration.report, self_check=self_check)
    return modules if harmful else head | modules, warnings


def _average_bits(modules: Modules) -> float:
    sizes = {name: module.in_features * module.out_features for name, module in modules.items()}
    bits = sum(size * modules[name].scheme.weight_bits for name, size in sizes.items())
    return bits / sum(sizes.values())


def _report(
    calibration: Calibration,
    modules: Modules,
    trials: tuple[RecipeTrial, ...],
    warnings: Sequence[str],
) -> CalibrationReport:
    segments = calibration.segments
    untouched = full_precision_modules(calibration.model, segments)
    report = replace(
        calibration.report,
        modules={name: module.scheme for name, module in modules.items()},
        dead=tuple(layer.name for segment in segments for layer in segment.layers if layer.dead),
        full_precision=tuple(name for name in untouched if name not in modules),
        average_weight_bits=_average_bits(modules),
        recipes=trials,
        warnings=(*warnings, *calibration.report.warnings),
    )
    return with_coverage(report, calibration.model, calibration.settings)
