"""`recipe="auto"`: the values of a few fields that are best on the model at hand.

Where a model's outliers sit decides which recipe is best (docs/results.md), so it is measured: each
is tried on few samples, layer by layer, without guard and token importance, and compared with full
precision by its answers to other samples and by text that the model writes itself.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from qvlm_hf.calibration import ranks
from qvlm_hf.calibration.measure.self_check import AnswerComparison
from qvlm_hf.calibration.not_finite import naming_the_source
from qvlm_hf.calibration.options import Options
from qvlm_hf.calibration.plan import check_weights, resolve_segments
from qvlm_hf.calibration.progress import Steps
from qvlm_hf.calibration.report import CalibrationReport, RecipeTrial
from qvlm_hf.calibration.resume import SavedSteps, alone_in, made_from
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import (
    Processor,
    Sample,
    batches,
    by_picture,
    fingerprint,
    hold_out,
)
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.transforms.rotation import take_snapshot
from qvlm_hf.calibration.waiting import yield_to_others
from qvlm_hf.calibration.written_text import text_rows, with_text, written_text
from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.folds import why_not_rotatable
from qvlm_hf.models.graph import get_linear
from qvlm_hf.nn.replace import replace_modules
from qvlm_hf.quantize import calibrate_and_pack, make_modules, transformed

__all__ = ["calibrate_with_best_recipe", "compare_recipes", "trial"]

_TRIAL_SAMPLES = 16  # that a recipe is tried on, and as many others that it is judged by
# What a trial leaves out: parts that help every recipe, and cost more than all the rest.
_QUICK: dict[str, Any] = {
    "max_block_depth": 1,
    "guard": False,
    "token_importance": False,
    "optimize_vision": None,
    "precision_budget": None,
}
_VARIED = ("equalization", "written_text")
_GROUPS = {"activation_granularity": "dynamic_group"}

Recipe = dict[str, Any]


def calibrate_with_best_recipe(
    model: nn.Module,
    settings: CalibrationSettings,
    samples: Sequence[Sample],
    processor: Processor,
    *,
    held_out: Sequence[Sample] = (),
    callbacks: Sequence[Any] = (),
    resume_dir: Path | None = None,
) -> CalibrationReport:
    """`calibrate_and_pack`, after a comparison of recipes where `settings.recipe` is "auto".

    The arguments and errors are those of `calibrate_and_pack`; the report tells the trials.
    `resume_dir`, from `check_resume_dir`, keeps finished steps, and those of a calibration that was
    stopped are not repeated; ValueError if they are of another one.
    """
    with ranks.sharing_errors(), alone_in(resume_dir):
        ranks.check_alike(fingerprint([*samples, *held_out]), "samples")
        everything, kept = [*samples, *held_out], SavedSteps()
        if resume_dir is not None:
            data = batches(by_picture(samples), processor, settings.batch_size)
            kept = SavedSteps(resume_dir, made_from(model, settings, everything, data))
        given: dict[str, Any] = {"held_out": held_out, "callbacks": callbacks, "kept": kept}
        with naming_the_source(model, everything, processor):
            if settings.recipe is None:
                return calibrate_and_pack(model, settings, samples, processor, **given)
            with experts_split(model), ranks.apart():
                compare = partial(_try_recipes, model, settings, samples, processor, **given)
                trials = kept.once("recipes", compare)
            best = json.loads(ranks.told_by_first(json.dumps(trials[0].fields)))
            settings = replace(settings, recipe=None, **best)
            report = calibrate_and_pack(model, settings, samples, processor, **given)
            return replace(report, recipes=trials)


@yield_to_others()
def _try_recipes(
    model: nn.Module,
    settings: CalibrationSettings,
    samples: Sequence[Sample],
    processor: Processor,
    held_out: Sequence[Sample],
    callbacks: Sequence[Any],
    kept: SavedSteps,
) -> tuple[RecipeTrial, ...]:
    """Tries every recipe on few samples, judged by others; the best one first."""
    check_weights(resolve_segments(model, settings))
    prepared = partial(batches, processor=processor, batch_size=settings.batch_size, model=model)
    few, rest = hold_out(samples, min(_TRIAL_SAMPLES, (len(samples) + 1) // 2), settings.seed)
    data = list(prepared(by_picture(few)))
    judges = list(prepared((held_out or rest)[:_TRIAL_SAMPLES]))
    answers = AnswerComparison(model, judges, held_out=True)
    # of another seed than the text that is calibrated on
    written = written_text(model, text_rows(_TRIAL_SAMPLES), seed=settings.seed + 1)
    text = AnswerComparison(model, written, held_out=True)

    def measure(recipe: Recipe) -> RecipeTrial:
        quick = trial(settings, recipe)
        calibration = Calibration(
            model=model, settings=quick, segments=resolve_segments(model, quick), data=data
        )
        calibration.data = with_text(calibration)
        restore, floating = take_snapshot(model), dict[str, nn.Module]()
        try:
            with transformed(calibration):
                modules = make_modules(calibration)
                floating |= {name: get_linear(model, name) for name in modules}
                replace_modules(model, modules)
                checks = (answers.measure(), text.measure())
        finally:
            replace_modules(model, floating)
            restore()
        kls = [check.kl for check in checks if check is not None]
        return RecipeTrial(fields=recipe, answer_kl=kls[0], text_kl=kls[-1])  # text is never None

    def measure_once(recipe: Recipe) -> RecipeTrial:
        return kept.once(f"recipe-{next(numbers)}", partial(measure, recipe))

    numbers, progress = count(), Calibration(model=model, settings=settings, callbacks=callbacks)
    rotatable = settings.rotation != "auto" or not why_not_rotatable(model)
    # GPU kernels leave ranges per group to the reference, which is slow
    groups = next(model.parameters()).device.type == "cpu"
    return compare_recipes(
        settings, measure_once, progress.steps, rotatable=rotatable, groups=groups
    )


def compare_recipes(
    settings: CalibrationSettings,
    measure: Callable[[Recipe], RecipeTrial],
    steps: Callable[[str, int], Steps],
    *,
    rotatable: bool,
    groups: bool,
) -> tuple[RecipeTrial, ...]:
    """Measures rotation and ranges together, then the other fields one by one on the best of these.

    Ranges per token and group come between the two, on the best so far.

    Args:
        settings: whose `recipe` is "auto"; a field that is not at its default is fixed.
        measure: tries a recipe, the values of the open fields.
        steps: makes a counter, from its name and total.
        rotatable: whether the model can be rotated.
        groups: whether ranges per token and group are worth a trial.

    Returns:
        All trials, the best one first.
    """
    first = _first_recipes(settings, rotatable)
    others = [n for n in _VARIED if getattr(settings, n) == getattr(Options, n)]
    groups &= settings.activation_granularity is None and settings.group_size != -1
    counter = steps("recipes", len(first) + groups + len(others))
    trials: list[RecipeTrial] = []

    def take(recipe: Recipe) -> None:
        trials.append(measure(recipe))
        counter.advance()

    for recipe in first:
        take(recipe)
    if groups:
        take(_best(trials).fields | _GROUPS)
    best = _best(trials)
    for name in others:
        take(best.fields | {name: not getattr(settings, name)})
    best = _best(trials)
    return (best, *(tried for tried in trials if tried is not best))


def _first_recipes(settings: CalibrationSettings, rotatable: bool) -> list[Recipe]:
    rotations = [None, "hadamard"] if settings.rotation == "auto" else [settings.rotation]
    ranges = [settings.activation_granularity]
    if ranges == [None]:
        ranges.append("dynamic_token")
    return [
        {"rotation": rotation, "activation_granularity": granularity}
        for rotation in rotations
        for granularity in ranges
        if rotatable or rotation is None or settings.rotation != "auto"
    ]


def _best(trials: Sequence[RecipeTrial]) -> RecipeTrial:
    """The lowest sum of divergences.

    A product would have no floor: where one divergence is next to nothing, its noise would decide.
    """
    return min(trials, key=lambda found: found.answer_kl + found.text_kl)


def trial(settings: CalibrationSettings, recipe: Recipe) -> CalibrationSettings:
    """The settings of a quick trial of a recipe."""
    return replace(settings, recipe=None, **recipe, **_QUICK)
