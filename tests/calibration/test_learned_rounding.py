"""Learned rounding lowers the error on samples that it does not see, or leaves everything as it was."""

import copy

import pytest
import torch
from tiny_models import tiny_llava, tiny_messages, tiny_processor

from qvlm_hf.calibration import learned_rounding
from qvlm_hf.calibration.layers import capture_inputs, run_layer
from qvlm_hf.calibration.search.ranges import initialize_sites
from qvlm_hf.calibration.learned_rounding import learn_rounding
from qvlm_hf.calibration.recombination import recombined
from qvlm_hf.calibration.samples import Batch, batches, load_samples
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.models.graph import resolve
from qvlm_hf.quantize import calibrate_and_pack


def block(count=64):
    """The language model's two layers, rounded to nearest at 3 bits."""
    model = tiny_llava(seed=1).eval()
    data = list(batches(load_samples(tiny_messages(count, seed=0)), tiny_processor(), 16))
    layers = resolve(model)[2].layers
    inputs = capture_inputs(model, data, [layers[0].name])[layers[0].name]
    hidden = [entry.hidden for entry in inputs]
    settings = CalibrationSettings(weight_bits=3, activation_bits=8, group_size=32, activation_granularity="channel")
    targets, modules = hidden, [model.get_submodule(layer.name) for layer in layers]
    for module in modules:
        targets = run_layer(module, inputs, targets)
    sites = initialize_sites(model, layers, "language", inputs, hidden, settings)
    return modules, sites, inputs, hidden, targets


def error(modules, sites, inputs, hidden, targets, held_out):
    with installed(site for row in sites for site in row):
        for module in modules:
            hidden = run_layer(module, inputs, hidden)
    wrong = norm = 0.0
    for index in held_out:
        keep = inputs[index].keep
        wrong += float((hidden[index] - targets[index])[keep].square().sum())
        norm += float(targets[index][keep].square().sum())
    return wrong / norm


def test_lowers_the_error_of_held_out_batches():
    parts = block()
    weights = [parameter.clone() for module in parts[0] for parameter in module.parameters()]
    before = error(*parts, [1, 3])
    start, end = learn_rounding(*parts, None, [1, 3])
    assert end < 0.97 * start
    assert error(*parts, [1, 3]) < 0.97 * before
    assert all(torch.equal(a, b) for a, b in zip(weights, (p for m in parts[0] for p in m.parameters()), strict=True))
    assert all(parameter.requires_grad for module in parts[0] for parameter in module.parameters())
    assert not any("forward" in vars(linear) for row in parts[1] for site in row for linear in site.linears)


def test_keeps_the_start_where_nothing_is_better(monkeypatch):
    monkeypatch.setattr(learned_rounding, "_LEARNING_RATE", 1.0)  # every step is a wild one
    parts = block()
    before = copy.deepcopy([site.quantized_weights() for row in parts[1] for site in row])
    start, end = learn_rounding(*parts, None, [1, 3])
    assert end == start
    for old, new in zip(before, (site.quantized_weights() for row in parts[1] for site in row), strict=True):
        assert all(torch.equal(a.values, b.values) for a, b in zip(old, new, strict=True))


def test_nothing_held_out_means_nothing_is_learned():
    assert learn_rounding(*block(16), None, []) == (0.0, 0.0)


@pytest.mark.parametrize("importance", [True, False])
def test_the_whole_calibration_with_it(importance):
    def calibrate(rounding):
        model = tiny_llava(seed=1).eval()
        settings = CalibrationSettings(
            weight_bits=3, activation_bits=8, group_size=32, batch_size=4, max_block_depth=2, rotation=None,
            weight_rounding=rounding, token_importance=importance,
        )  # fmt: skip
        samples = load_samples(tiny_messages(24, seed=0))
        return model, calibrate_and_pack(model, settings, samples[:16], tiny_processor(), held_out=samples[16:])

    learned, report = calibrate("learned")
    plain = calibrate("gptq")[1]
    assert report.self_check.kl < plain.self_check.kl
    again, repeated = calibrate("learned")
    assert repeated == report
    assert all(torch.equal(a, b) for a, b in zip(learned.state_dict().values(), again.state_dict().values(), strict=True))


def test_recombined_batches_have_other_pictures_and_the_same_questions():
    data = list(batches(load_samples(tiny_messages(8, seed=0)), tiny_processor(), 4))
    more = recombined(data, 3, seed=1)
    assert len(more) == 6
    pool = [picture for batch in data for picture in batch.inputs["pixel_values"]]
    known = [p.flip(axes) for p in pool for axes in ([], [-1], [-2], [-1, -2])]
    changed = 0
    for new, old in zip(more, data * 3, strict=True):
        assert torch.equal(new.inputs["input_ids"], old.inputs["input_ids"])
        assert new.inputs["pixel_values"].shape == old.inputs["pixel_values"].shape
        for picture, before in zip(new.inputs["pixel_values"], old.inputs["pixel_values"], strict=True):
            assert any(torch.equal(picture, one) for one in known)
            changed += not torch.equal(picture, before)
    assert changed > 12
    again = recombined(data, 3, seed=1)
    assert all(torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"]) for a, b in zip(more, again, strict=True))


def test_pictures_of_several_shapes_are_not_recombined():
    def batch(*size):
        inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "pixel_values": torch.zeros(1, 3, *size)}
        return Batch(inputs=inputs, labels=torch.ones(1, 3, dtype=torch.long), origins=("a",))

    assert recombined([batch(8, 8), batch(8, 16)], 2, seed=0) == []
    text = Batch(inputs={"input_ids": torch.ones(1, 3, dtype=torch.long)}, labels=torch.ones(1, 3, dtype=torch.long), origins=("a",))
    assert recombined([text], 2, seed=0) == []
    assert len(recombined([text, batch(8, 8)], 2, seed=0)) == 2
