"""`recipe="auto"`: the values of a few fields that are best on the model at hand.

Where a model's outliers sit decides which recipe is best (docs/results.md), so it is measured: each
is tried on few samples, layer by layer, without guard and token importance, and compared with full
precision by its answers to other samples. Text that the model writes itself must not clearly suffer
more than from plain rounding.

Divergences are geometric means over samples. Of 64 samples the worst three hold two fifths of the
sum, so that an arithmetic mean tells chance (docs/decisions/0029-the-typical-sample-decides.md).
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import fmean, stdev
from typing import Any, NamedTuple

from torch import nn

from qvlm_hf.calibration.measure.self_check import AnswerComparison
from qvlm_hf.calibration.measure.written_text import with_text, written_text
from qvlm_hf.calibration.options import Options
from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.progress import Steps
from qvlm_hf.calibration.record.report import RecipeTrial
from qvlm_hf.calibration.record.resume import SavedSteps
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import (
    Batch,
    Processor,
    Sample,
    batches,
    by_picture,
    hold_out,
)
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.transforms.rotation import take_snapshot
from qvlm_hf.errors import first_line
from qvlm_hf.method import make_modules, round_modules, transformed
from qvlm_hf.models.folds import why_not_rotatable
from qvlm_hf.models.graph import get_linear
from qvlm_hf.nn.replace import replace_modules

__all__ = [
    "JUDGES",
    "JUDGING_TEXTS",
    "TRIAL_SAMPLES",
    "Tried",
    "best_recipe",
    "clearly_above",
    "compare_recipes",
    "likely",
    "plain_rounding",
    "planned_recipes",
    "trial_settings",
    "try_settings",
    "typical",
]

TRIAL_SAMPLES = 16  # that a recipe is tried on
JUDGES = 64  # other samples that it is judged by, at most
JUDGING_TEXTS = 16  # that the model writes, to judge it by as well
_FEW_BITS = 6  # of inputs
_LONGEST_GROUP = 128  # inputs that share a range in the kernels of a GPU
_LEAST = 1e-9  # nats: less is rounding of float32, and has no logarithm
# What a trial leaves out: parts that help every recipe, and cost more than all the rest. Error
# compensation stays: what it makes good differs between recipes
# (docs/decisions/0034-trials-with-compensation.md).
_QUICK: dict[str, Any] = {
    "max_block_depth": 1,
    "guard": False,
    "token_importance": False,
    "optimize_vision": None,
    "precision_budget": None,
}
_PLAIN: dict[str, Any] = {
    "rotation": None,
    "lm_head_bits": None,  # with data a trial leaves it out by itself
}

Recipe = dict[str, Any]


class Tried(NamedTuple):
    """A trial, and its divergence of the answers to every sample in nats a token."""

    trial: RecipeTrial
    answer_kls: Sequence[float]


def best_recipe(
    model: nn.Module,
    settings: CalibrationSettings,
    samples: Sequence[Sample],
    processor: Processor,
    *,
    held_out: Sequence[Sample],
    callbacks: Sequence[Any],
    kept: SavedSteps,
) -> tuple[CalibrationSettings, tuple[RecipeTrial, ...]]:
    """The settings with the best recipe, and all trials, the best one first.

    Where `settings.recipe` is not "auto" they come back as they are, without trials. The arguments
    are those of `quantize_with_data`, and `kept` its finished steps.
    """
    if settings.recipe == "fixed":
        return settings, ()

    def compare() -> tuple[RecipeTrial, ...]:
        trials = _Trials(model, settings, samples, processor, held_out=held_out, kept=kept)
        first, changes = planned_recipes(settings, rotatable=not why_not_rotatable(model))
        steps = Steps("recipes", callbacks if ranks.is_main() else (), 1 + len(changes))
        return compare_recipes(first, changes, trials.measure, steps)

    with ranks.no_sync():
        trials = kept.once("recipes", compare)
    taken = ranks.broadcast_object(trials[0].fields)
    return replace(settings, recipe="fixed", **taken), trials


class _Trials:
    """Recipes on few samples of a model, judged by its answers to others and by its own text.

    Args: those of `best_recipe`.

    Raises:
        ValueError: no sample has an answer, and the model writes no text.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: CalibrationSettings,
        samples: Sequence[Sample],
        processor: Processor,
        *,
        held_out: Sequence[Sample],
        kept: SavedSteps,
    ) -> None:
        prepared = partial(
            batches, processor=processor, batch_size=settings.batch_size, model=model
        )
        few, rest = hold_out(samples, min(TRIAL_SAMPLES, (len(samples) + 1) // 2), settings.seed)
        self._model, self._settings, self._kept = model, settings, kept
        self._data = with_text(model, list(prepared(by_picture(few))), settings)
        self._comparisons = [
            AnswerComparison(model, judges, held_out=True)
            for judges in (
                list(prepared([*held_out, *rest][:JUDGES])),
                _own_text(model, settings.seed),
            )
        ]
        self._steps = (f"recipe-{number}" for number in count())
        _, self._plain_text = self._divergences("plain", plain_rounding(settings), ())
        if not self._plain_text:
            raise ValueError(
                "recipe='auto' compares answers: no sample has one, and the model writes no text "
                "without a picture. Give samples with answers, or recipe='fixed'."
            )

    def measure(self, recipe: Recipe) -> Tried:
        """Tries a recipe, or reads how it did before the calibration was stopped."""
        settings = trial_settings(self._settings, recipe)
        answer_kls, text_kls = self._divergences(next(self._steps), settings, self._data)
        trial = RecipeTrial(
            fields=recipe,
            answer_kl=typical(answer_kls),
            text_kl=typical(text_kls),
            keeps_text=not clearly_above(text_kls, self._plain_text, errors=2),
        )
        return Tried(trial, answer_kls)

    def _divergences(
        self, step: str, settings: CalibrationSettings, data: Sequence[Batch]
    ) -> tuple[list[float], list[float]]:
        """Of the answers and of the text; where there are none the others stand for both."""
        tried = partial(try_settings, self._model, settings, data, self._comparisons)
        answer_kls, text_kls = self._kept.once(step, tried)
        return answer_kls or text_kls, text_kls or answer_kls


def _own_text(model: nn.Module, seed: int) -> list[Batch]:
    """What the model writes, to judge by; none where it cannot without a picture."""
    try:
        # of another seed than the text that is calibrated on
        return written_text(model, JUDGING_TEXTS, seed=seed + 1)
    except Exception as error:
        logging.getLogger(__name__).warning(
            "recipes are compared by answers alone: %s writes no text without a picture (%s)",
            type(model).__name__, first_line(error),
        )  # fmt: skip
        return []


def compare_recipes(
    first: Recipe, changes: Sequence[Recipe], measure: Callable[[Recipe], Tried], steps: Steps
) -> tuple[RecipeTrial, ...]:
    """Tries a recipe, then one change after another, each on the recipe that is best by then.

    Args:
        first: the recipe that is likely best.
        changes: of `planned_recipes`.
        measure: tries a recipe.
        steps: counts what was tried.

    Returns:
        All trials, the best one first, of those that keep text: the earliest that none is clearly
        better than. If none keeps text it is the one with the lowest divergence of text.
    """
    tried = [measure(first)]
    steps.advance()
    for change in changes:
        tried.append(measure(_best(tried).fields | change))
        steps.advance()
    best = _best(tried)
    return (best, *(one.trial for one in tried if one.trial is not best))


def planned_recipes(
    settings: CalibrationSettings, *, rotatable: bool
) -> tuple[Recipe, list[Recipe]]:
    """The recipe that is likely best, and the changes to try: ranges, rotation, equalization.

    Measured (docs/results.md), likely best are ranges per token and group without rotation. Next to
    them searched ranges pay where bits are few, and ranges per token where they are not. Weights
    alone are likely best as they are. A field that is not at its default is fixed.

    Args:
        settings: whose `recipe` is "auto".
        rotatable: whether the model can be rotated.
    """
    rotations = settings.rotations(rotatable=rotatable)
    ranges = [settings.activation_granularity]
    if ranges == [None] and settings.activation_bits < 16:
        ranges = [None, "dynamic_token"]
        if 0 < settings.group_size <= _LONGEST_GROUP:
            rotations = tuple(sorted(rotations, key=bool))
            few = settings.activation_bits <= _FEW_BITS
            ranges = ["dynamic_group", None if few else "dynamic_token"]
    first: Recipe = {"rotation": rotations[0], "activation_granularity": ranges[0]}
    changes: list[Recipe] = [{"activation_granularity": other} for other in ranges[1:]]
    changes += [{"rotation": other} for other in rotations[1:]]
    if settings.equalization == Options.equalization:
        if settings.activation_bits < 16:
            changes.append({"equalization": not Options.equalization})
        else:  # docs/decisions/0037-weights-alone-are-equalized.md
            first["equalization"] = not Options.equalization
            changes.insert(0, {"equalization": Options.equalization})
    return first, changes


def _best(tried: Sequence[Tried]) -> RecipeTrial:
    sound = [one for one in tried if one.trial.keeps_text]
    if not sound:
        return min(tried, key=lambda one: one.trial.text_kl).trial
    best = sound[0]
    for one in sound[1:]:
        if clearly_above(best.answer_kls, one.answer_kls, errors=1):
            best = one
    return best.trial


def likely(settings: CalibrationSettings, *, rotatable: bool) -> CalibrationSettings:
    """The settings with the recipe that is tried first, where `settings` leave it open."""
    if settings.recipe == "fixed":
        return settings
    first, _ = planned_recipes(settings, rotatable=rotatable)
    return replace(settings, recipe="fixed", **first)


def trial_settings(settings: CalibrationSettings, recipe: Recipe) -> CalibrationSettings:
    """The settings of a quick trial of a recipe."""
    return replace(settings, recipe="fixed", **recipe, **_QUICK)


def plain_rounding(settings: CalibrationSettings) -> CalibrationSettings:
    """The settings of rounding to nearest without data, inputs with a range per token."""
    ranges = None if settings.activation_bits == 16 else "dynamic_token"
    fields = _QUICK | _PLAIN | {"activation_granularity": ranges}
    return replace(settings, recipe="fixed", **fields)


def try_settings(
    model: nn.Module,
    settings: CalibrationSettings,
    data: Sequence[Batch],
    comparisons: Sequence[AnswerComparison],
) -> list[list[float]]:
    """Quantizes a model, compares it with full precision, and puts it back.

    Args:
        model: in full precision.
        settings: of a trial, so that layers are searched one by one.
        data: to calibrate on; without any, weights are rounded to nearest.
        comparisons: of that model.

    Returns:
        Of each comparison every sample's divergence, in nats a token.
    """
    segments = resolve_segments(model, settings)
    calibration = Calibration(model=model, settings=settings, segments=segments, data=data)
    calibration.measures_entropy = False  # layers that are searched one by one need none
    restore, floating = take_snapshot(model), dict[str, nn.Module]()
    try:
        with transformed(calibration):
            modules = make_modules(calibration) if data else round_modules(calibration)
            floating |= {name: get_linear(model, name) for name in modules}
            replace_modules(model, modules)
            return [comparison.divergences() for comparison in comparisons]
    finally:
        replace_modules(model, floating)
        restore()


def typical(divergences: Sequence[float]) -> float:
    """The geometric mean of samples' divergences, in nats."""
    return math.exp(fmean(map(_logarithm, divergences)))


def clearly_above(divergences: Sequence[float], others: Sequence[float], *, errors: float) -> bool:
    """Whether the geometric mean is above that of `others`, by more than some standard errors.

    Both are of the same samples, whose ratios count. Fewer than two samples tell nothing.
    """
    if len(divergences) < 2:
        return False
    ratios = [_logarithm(a) - _logarithm(b) for a, b in zip(divergences, others, strict=True)]
    return fmean(ratios) > errors * stdev(ratios) / math.sqrt(len(ratios))


def _logarithm(divergence: float) -> float:
    return math.log(max(divergence, _LEAST))
