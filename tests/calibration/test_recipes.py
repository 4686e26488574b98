import pytest
import torch
from tiny_models import tiny_llava

from qvlm_hf.calibration.recipes import (
    best_recipe,
    first_recipes,
    trial,
    variations,
    written_text,
)
from qvlm_hf.calibration.report import RecipeTrial
from qvlm_hf.calibration.settings import CalibrationSettings

RANGES = {"vision": "channel", "language": "dynamic_token"}


def auto(**options):
    return CalibrationSettings(recipe="auto", **options)


@pytest.mark.parametrize(
    ("options", "rotatable", "expected"),
    [
        ({}, True, [(None, None), (None, "dynamic_token"), ("hadamard", None), ("hadamard", "dynamic_token")]),
        ({}, False, [(None, None), (None, "dynamic_token")]),
        ({"rotation": None}, True, [(None, None), (None, "dynamic_token")]),
        ({"rotation": "hadamard"}, False, [("hadamard", None), ("hadamard", "dynamic_token")]),
        ({"activation_granularity": RANGES}, True, [(None, RANGES), ("hadamard", RANGES)]),
        ({"rotation": None, "activation_granularity": "channel"}, True, [(None, "channel")]),
    ],
)  # fmt: skip
def test_fixed_fields_stay(options, rotatable, expected):
    found = first_recipes(auto(**options), rotatable=rotatable)
    assert [(r["rotation"], r["activation_granularity"]) for r in found] == expected


def test_equalization_is_varied_unless_it_is_fixed():
    best = {"rotation": None}
    assert list(variations(auto(), best)) == [{"rotation": None, "equalization": False}]
    assert list(variations(auto(equalization=False), best)) == []


def test_a_trial_is_quick_and_compares_nothing_itself():
    settings = trial(auto(num_samples=5), {"rotation": "hadamard"})
    assert settings == CalibrationSettings(
        num_samples=5, rotation="hadamard", max_block_depth=1, guard=False, token_importance=False
    )


@pytest.mark.parametrize(
    "options", [{"activation_bits": 16}, {"activation_granularity": "dynamic_token"}]
)
def test_inputs_that_are_not_calibrated_leave_nothing_to_compare(options):
    with pytest.raises(ValueError, match="recipe='auto' compares ways .* leave it out"):
        auto(**options)


def test_the_best_recipe_buys_neither_answers_nor_text_with_the_other():
    trials = [
        RecipeTrial(fields={"rotation": name}, answer_kl=answers, text_kl=text)
        for name, answers, text in (("a", 0.1, 0.4), ("b", 0.11, 0.3), ("c", 0.02, 2.5))
    ]
    assert best_recipe(trials) is trials[1]


def test_written_text_is_the_models_own():
    model = tiny_llava().eval()
    state = torch.get_rng_state()
    (batch,) = written_text(model, seed=3)
    (again,) = written_text(model, seed=3)
    (other,) = written_text(model, seed=4)
    ids = batch.inputs["input_ids"]
    assert torch.equal(ids, again.inputs["input_ids"])
    assert not torch.equal(ids, other.inputs["input_ids"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch.labels[:, 1:], ids[:, 1:])
    assert (batch.labels[:, 0] == -100).all()
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(
            model(**batch.inputs).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
    chance = torch.log(torch.tensor(float(model.config.text_config.vocab_size)))
    assert nats < chance  # text that the model expects
