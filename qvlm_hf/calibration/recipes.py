"""What `recipe="auto"` compares: values of a few fields, and text that the model writes itself.

Where a model's outliers sit decides which recipe is best (docs/results.md), so it is measured on
the model at hand: each recipe is tried on few samples, layer by layer, without guard and token
importance, and its answers to other samples are compared with full precision.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from qvlm_hf.calibration.options import Options
from qvlm_hf.calibration.report import RecipeTrial
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch
from qvlm_hf.calibration.settings import CalibrationSettings

__all__ = ["TRIAL_SAMPLES", "best_recipe", "first_recipes", "trial", "variations", "written_text"]

TRIAL_SAMPLES = 16  # that a recipe is tried on, and as many others that it is judged by
_TEXTS, _TEXT_TOKENS = 4, 64
# What a trial leaves out: parts that help every recipe, and cost more than all the rest.
_QUICK: dict[str, Any] = {
    "max_block_depth": 1,
    "guard": False,
    "token_importance": False,
    "optimize_vision": None,
    "precision_budget": None,
}

Recipe = dict[str, Any]


def first_recipes(settings: CalibrationSettings, *, rotatable: bool) -> list[Recipe]:
    """Rotation with and without ranges per token at run time: the values of the open fields.

    Args:
        settings: whose `recipe` is "auto"; a field that is not at its default is fixed.
        rotatable: whether the model can be rotated.

    Returns:
        At least one.
    """
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


def variations(settings: CalibrationSettings, best: Recipe) -> Iterator[Recipe]:
    """The best of the first recipes with its other open field changed."""
    if settings.equalization == Options.equalization:
        yield best | {"equalization": not settings.equalization}


def trial(settings: CalibrationSettings, recipe: Recipe) -> CalibrationSettings:
    """The settings of a quick trial of a recipe."""
    return replace(settings, recipe=None, **recipe, **_QUICK)


def best_recipe(trials: Sequence[RecipeTrial]) -> RecipeTrial:
    """The trial whose divergences of answers and of text have the lowest product.

    A recipe may not buy one with the other; in a product only ratios count.
    """
    return min(trials, key=lambda found: found.answer_kl * found.text_kl)


@torch.no_grad()
def written_text(model: Any, seed: int) -> list[Batch]:
    """Text without pictures that the model writes itself, each from a word drawn at random.

    Args:
        model: in full precision, with Transformers' `generate`.
        seed: of words and text.

    Returns:
        One batch, every token but the first an answer.
    """
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().weight
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        first = torch.randint(0, len(vocabulary), (_TEXTS, 1)).to(device)
        ids = model.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            min_new_tokens=_TEXT_TOKENS - 1,
            max_new_tokens=_TEXT_TOKENS - 1,
        ).cpu()
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return [Batch(inputs=inputs, labels=labels, origins=("text of the model",) * _TEXTS)]
