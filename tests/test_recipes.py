"""Which recipes are compared, which wins, and the text that the model writes for it."""

import math

import pytest
import torch
from demo_model.outliers import plant_outliers
from tiny_calibrations import calibrate, tiny_samples
from tiny_models import tiny_llava, tiny_messages

from qvlm_hf.calibration.measure.written_text import written_text
from qvlm_hf.calibration.process.progress import Steps
from qvlm_hf.calibration.record.report import RecipeTrial
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.recipes import (
    Tried,
    clearly_above,
    compare_recipes,
    planned_recipes,
    trial_settings,
    typical,
)

RANGES = {"vision": "channel", "language": "dynamic_token"}


def auto(**options):
    return CalibrationSettings(recipe="auto", **options)


class Told:
    def __init__(self):
        self.steps = []

    def on_step(self, name, done, total):
        self.steps.append((name, done, total))


def compare(settings, kls, rotatable=True):
    """The trials in the order in which they were made; `kls` of a recipe's values.

    Of three samples one is a fifth harder than the others, another one each time.
    """
    made, told, noise = [], Told(), [1.2, 1.0, 1.0]

    def measure(recipe):
        answers, text, *keeps = kls(recipe)
        trial = RecipeTrial(fields=recipe, answer_kl=answers, text_kl=text, keeps_text=all(keeps))
        made.append(trial)
        noise.append(noise.pop(0))
        return Tried(trial, [answers * factor for factor in noise])

    first, changes = planned_recipes(settings, rotatable=rotatable)
    steps = Steps("recipes", [told], 1 + len(changes))
    found = compare_recipes(first, changes, measure, steps)
    assert told.steps == [("recipes", done, len(made)) for done in range(len(made) + 1)]
    assert sorted(map(id, found)) == sorted(map(id, made))
    return made, found[0]


FIXED = {"equalization": False}
GROUPS = "dynamic_group"


@pytest.mark.parametrize(
    ("options", "rotatable", "expected"),
    [
        ({}, True, [(None, GROUPS), (None, None), ("hadamard", GROUPS)]),
        (
            {"group_size": -1, "activation_bits": 8},
            True,
            [("hadamard", None), ("hadamard", "dynamic_token"), (None, None)],
        ),
        ({}, False, [(None, GROUPS), (None, None)]),
        ({"rotation": None}, True, [(None, GROUPS), (None, None)]),
        ({"rotation": "hadamard"}, False, [("hadamard", GROUPS), ("hadamard", None)]),
        ({"activation_granularity": RANGES}, True, [(None, RANGES), ("hadamard", RANGES)]),
        ({"rotation": None, "activation_granularity": "channel"}, True, [(None, "channel")]),
    ],
)
def test_fixed_fields_stay(options, rotatable, expected):
    made, _ = compare(auto(**FIXED, **options), lambda _: (0.1, 0.1), rotatable)
    found = [(m.fields["rotation"], m.fields["activation_granularity"]) for m in made]
    assert found == expected


def test_every_change_is_tried_on_what_is_best_by_then():
    def kls(recipe):  # rotation is good, ranges at run time are not
        rotated, dynamic = recipe["rotation"], recipe["activation_granularity"]
        return (0.1 if rotated else 0.2) * (2 if dynamic else 1), 0.3

    made, best = compare(auto(), kls)
    start = {"rotation": None, "activation_granularity": GROUPS}
    searched = {"rotation": None, "activation_granularity": None}
    rotated = {"rotation": "hadamard", "activation_granularity": None}
    varied = {**rotated, "equalization": False}
    assert [one.fields for one in made] == [start, searched, rotated, varied]
    assert best.fields == rotated
    assert len(compare(auto(**FIXED), kls)[0]) == 3


@pytest.mark.parametrize(
    ("kept", "rotation"),
    [((True, True), "hadamard"), ((True, False), None), ((False, False), None)],
)
def test_text_must_not_suffer_more_than_from_plain_rounding(kept, rotation):
    """Rotated answers are better and text is worse: it is out, or all are and text decides."""

    def kls(recipe):
        return (0.1, 0.3, kept[1]) if recipe["rotation"] else (0.4, 0.1, kept[0])

    _, best = compare(auto(**FIXED), kls)
    assert best.fields["rotation"] == rotation


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_likely_to_be_best_gives_way_to_what_is_clearly_better_alone(bits):
    """Ranges per token and group without rotation."""
    for better, rotation in ((0.095, None), (0.05, "hadamard")):
        kls = lambda recipe, kl=better: (kl if recipe["rotation"] else 0.1, 0.1)  # noqa: E731
        _, best = compare(auto(**FIXED, activation_bits=bits), kls)
        assert best.fields == {"rotation": rotation, "activation_granularity": GROUPS}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"activation_bits": 4}, {GROUPS, None}),
        ({"activation_bits": 6}, {GROUPS, None}),
        ({"activation_bits": 8}, {GROUPS, "dynamic_token"}),
        ({"group_size": -1}, {None, "dynamic_token"}),
        ({"group_size": 256}, {None, "dynamic_token"}),  # of which GPUs have no kernel
        ({"activation_granularity": "channel"}, {"channel"}),
        ({"activation_granularity": "dynamic_token"}, {"dynamic_token"}),
        ({"activation_bits": 16}, {None}),  # weights alone: rotation and equalization
    ],
)
def test_ranges_per_group_are_tried_where_kernels_take_them(options, expected):
    made, _ = compare(auto(**options), lambda _: (0.1, 0.1))
    assert {one.fields["activation_granularity"] for one in made} == expected
    assert [one.fields["rotation"] for one in made].count("hadamard") == 1
    assert {one.fields.get("equalization", True) for one in made} == {True, False}


def test_weights_alone_are_tried_as_they_are_and_then_equalized():
    made, best = compare(
        auto(activation_bits=16), lambda recipe: (0.2 - recipe["equalization"] / 10,) * 2
    )
    order = [(one.fields["equalization"], one.fields["rotation"]) for one in made]
    assert order == [(False, None), (True, None), (True, "hadamard")]
    assert best is made[1]
    made, _ = compare(auto(activation_bits=16, equalization=False), lambda _: (0.1, 0.1))
    assert [one.fields["rotation"] for one in made] == [None, "hadamard"]


def test_the_typical_sample_decides():
    """One broken answer of a hundred costs as much as all others, and tells little."""
    good, broken = [0.001] * 99, [0.1]
    assert typical([0.002] * 100) > typical(good + broken)
    assert sum([0.002] * 100) == pytest.approx(sum(good + broken), rel=0.01)
    assert typical([0.0, 0.0]) == pytest.approx(1e-9)


@pytest.mark.parametrize("errors", [1, 2])
def test_only_what_is_clear_is_above(errors):
    others = [0.001, 0.002, 0.1, 0.003]
    assert clearly_above(
        [2.2 * kl for kl in others[:2]] + [1.8 * kl for kl in others[2:]], others, errors=errors
    )
    # two better, two worse
    assert not clearly_above([0.01, 0.0005, 0.2, 0.002], others, errors=errors)
    assert not clearly_above([kl / 2 for kl in others], others, errors=errors)
    assert not clearly_above(others, others, errors=errors)


def test_a_trial_is_quick_and_compares_nothing_itself():
    settings = trial_settings(auto(num_samples=5), {"rotation": "hadamard"})
    assert settings == CalibrationSettings(
        recipe="fixed",
        num_samples=5,
        rotation="hadamard",
        max_block_depth=1,
        guard=False,
        token_importance=False,
    )


def test_without_answers_and_text_nothing_can_be_compared(monkeypatch):
    monkeypatch.setattr("qvlm_hf.recipes._own_text", lambda *_: [])
    questions = [{"messages": row["messages"][:-1]} for row in tiny_messages(4)]
    with pytest.raises(ValueError, match=r"no sample has one.*or recipe='fixed'"):
        calibrate(tiny_llava(), data=load_samples(questions), recipe="auto")


def test_written_text_is_the_models_own():
    model = tiny_llava().eval()
    state = torch.get_rng_state()
    batches = written_text(model, 3, seed=3)
    assert [batch.labels.shape for batch in batches] == [(2, 64), (1, 64)]
    assert torch.equal(torch.get_rng_state(), state)
    again, other = (written_text(model, 3, seed=seed) for seed in (3, 4))
    nats = []
    for batch, same, different in zip(batches, again, other, strict=True):
        ids = batch.inputs["input_ids"]
        assert torch.equal(ids, same.inputs["input_ids"])
        assert not torch.equal(ids, different.inputs["input_ids"])
        assert torch.equal(batch.labels[:, 1:], ids[:, 1:])
        assert (batch.labels[:, 0] == -100).all()
        with torch.no_grad():
            logits = model(**batch.inputs).logits[:, :-1]
        nats.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    assert max(nats) < math.log(model.config.text_config.vocab_size)  # text that it expects


@torch.no_grad()
def plant_massive_tokens(model):
    """Every token of text is massive in one channel, as attention sinks are.

    No scale of a channel undoes that: the next token is massive in the next one.
    """
    rows = model.model.language_model.embed_tokens.weight
    rows[torch.arange(len(rows)), torch.arange(len(rows)) % rows.shape[1]] = 10.0


def test_where_the_outliers_sit_decides_the_recipe():
    """Planted outlier channels are undone by scales, and rotation spoils that; tokens want it."""
    chosen = {}
    for plant in (plant_outliers, plant_massive_tokens):
        model = tiny_llava()
        plant(model)
        _, report = calibrate(
            model,
            data=tiny_samples(16),
            recipe="auto",
            weight_bits=8,  # rounding of weights would hide what inputs lose
            quantize_vision=False,
            quantize_projector=False,
            max_block_depth=1,
            guard=False,
            token_importance=False,
        )
        kls: dict[str | None, list[float]] = {None: [], "hadamard": []}
        for tried in report.recipes:
            if tried.fields.get("equalization", True):
                kls[tried.fields["rotation"]].append(tried.answer_kl)
        chosen[plant] = report.recipes[0].fields["rotation"]
        best, other = sorted(map(min, kls.values()))
        assert other > 1.4 * best  # far from chance
    assert chosen == {plant_outliers: None, plant_massive_tokens: "hadamard"}


def test_weights_alone_are_compared_too():
    """Columns of outlier channels are small, and rounded away unless scales make them alike."""
    model = tiny_llava()
    plant_outliers(model)
    _, report = calibrate(
        model, data=tiny_samples(16), recipe="auto", activation_bits=16, token_importance=False
    )
    kls = {
        (tried.fields["rotation"], tried.fields.get("equalization", True)): tried.answer_kl
        for tried in report.recipes
    }
    assert len(kls) == 3
    assert next(iter(kls)) == (None, True)
    assert kls[None, False] > 1.4 * kls[None, True]
