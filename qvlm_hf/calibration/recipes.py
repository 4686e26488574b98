"""What `recipe="auto"` compares: values of a few fields, and text that the model writes itself.

Where a model's outliers sit decides which recipe is best (docs/results.md), so it is measured on
the model at hand: each recipe is tried on few samples, layer by layer, without guard and token
importance, and its answers to other samples are compared with full precision.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qvlm_hf.calibration.options import Options
from qvlm_hf.calibration.progress import Steps
from qvlm_hf.calibration.report import RecipeTrial
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch
from qvlm_hf.calibration.settings import CalibrationSettings

__all__ = ["TRIAL_SAMPLES", "compare_recipes", "text_rows", "trial", "written_text"]

TRIAL_SAMPLES = 16  # that a recipe is tried on, and as many others that it is judged by
_TEXT_TOKENS = 64
# What a trial leaves out: parts that help every recipe, and cost more than all the rest.
_QUICK: dict[str, Any] = {
    "max_block_depth": 1,
    "guard": False,
    "token_importance": False,
    "optimize_vision": None,
    "precision_budget": None,
}
_VARIED = ("equalization", "written_text")

Recipe = dict[str, Any]


def compare_recipes(
    settings: CalibrationSettings,
    measure: Callable[[Recipe], RecipeTrial],
    steps: Callable[[str, int], Steps],
    *,
    rotatable: bool,
) -> tuple[RecipeTrial, ...]:
    """Measures rotation and ranges together, then the other fields one by one on the best of these.

    Args:
        settings: whose `recipe` is "auto"; a field that is not at its default is fixed.
        measure: tries a recipe, the values of the open fields.
        steps: makes a counter, from its name and total.
        rotatable: whether the model can be rotated.

    Returns:
        All trials, the best one first.
    """
    first = _first_recipes(settings, rotatable)
    others = [n for n in _VARIED if getattr(settings, n) == getattr(Options, n)]
    counter = steps("recipes", len(first) + len(others))
    trials: list[RecipeTrial] = []

    def take(recipe: Recipe) -> None:
        trials.append(measure(recipe))
        counter.advance()

    for recipe in first:
        take(recipe)
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


def text_rows(samples: int) -> int:
    """Texts among the data of so many samples: one for every four."""
    return max(2, samples // 4)


def trial(settings: CalibrationSettings, recipe: Recipe) -> CalibrationSettings:
    """The settings of a quick trial of a recipe."""
    return replace(settings, recipe=None, **recipe, **_QUICK)


@torch.no_grad()
def written_text(model: Any, rows: int, *, seed: int) -> list[Batch]:
    """Text without pictures that the model writes itself, each from a word drawn at random.

    Args:
        model: in full precision, with Transformers' `generate`.
        rows: how many texts, of 64 tokens each.
        seed: of words and text.

    Returns:
        Two batches (one of a single text), every token but the first an answer.
    """
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = torch.randint(0, len(vocabulary), (rows, 1)).to(device)
        ids = model.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            eos_token_id=len(vocabulary),  # no token: it writes on behind an end
            max_new_tokens=_TEXT_TOKENS - 1,
        ).cpu()
    return [_text_batch(half) for half in (ids[::2], ids[1::2]) if len(half)]


def _text_batch(ids: Tensor) -> Batch:
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs=inputs, labels=labels, origins=("text of the model",) * len(ids))
