"""Which sites bear few bits, and what guard and budget make of it."""

import math
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_calibrations import TEXT, tiny_batches, tiny_calibration
from tiny_calibrations import calibrate as run
from tiny_models import tiny_llava

from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits
from qvlm_hf.calibration.options import size_in_bytes
from qvlm_hf.calibration.search import sensitivity
from qvlm_hf.calibration.search.budget import allocate_bits
from qvlm_hf.calibration.search.ranges import held_out_half, initialize_sites
from qvlm_hf.calibration.search.sensitivity import site_parameters
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.nn.replace import quantized_modules

DOWN = "model.language_model.layers.0.mlp.down_proj"


def calibrate(model, **options):
    fields = {
        "max_block_depth": 1,
        "weight_rounding": "nearest",
        "activation_granularity": "channel",
        "equalization": False,
    }
    return run(model, **{**fields, **options})


def broken_model():
    """Answers hang on a product of small numbers in one site; a large channel hides them."""
    model = tiny_llava(seed=1)
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight[::2] *= 40
        layer.mlp.down_proj.weight *= 3
    return model


def curve_cases():
    widths = (2, 3, 4)
    values = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(
        lambda v: dict(zip(widths, sorted(v, reverse=True), strict=True))
    )
    return st.lists(st.tuples(values, st.integers(1, 50)), min_size=1, max_size=5)


@given(curve_cases(), st.floats(2, 4))
@settings(max_examples=200, deadline=None)
def test_the_budget_holds_and_nothing_more_would_fit(cases, budget):
    curves = {str(i): curve for i, (curve, _) in enumerate(cases)}
    parameters = {str(i): size for i, (_, size) in enumerate(cases)}
    bits = allocate_bits(curves, parameters, budget)
    total = sum(parameters.values())
    spent = sum(bits[name] * parameters[name] for name in bits)
    assert spent <= budget * total + 1e-9
    for name in bits:
        for wider in (3, 4):
            assert (
                wider <= bits[name]
                or spent + (wider - bits[name]) * parameters[name] > budget * total - 1e-9
            )


def test_whole_budgets_are_met_exactly_and_close_to_the_best_allocation():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        # convex curves, as rounding errors give: each bit a quarter
        curves = {
            name: {b: float(s) * 4.0**-b for b in (2, 3, 4)}
            for name, s in zip("abcd", torch.rand(4, generator=generator), strict=True)
        }
        parameters = dict.fromkeys("abcd", 10)
        bits = allocate_bits(curves, parameters, 3.0)
        assert sum(bits.values()) == 12
        best = min(
            sum(curves[name][b] for name, b in zip("abcd", choice, strict=True))
            for choice in product((2, 3, 4), repeat=4)
            if sum(choice) <= 12
        )
        assert sum(curves[name][b] for name, b in bits.items()) <= best * 1.3


def test_a_site_that_matters_gets_more_bits():
    curves = {"matters": {2: 1.0, 3: 0.5, 4: 0.1}, "not": {2: 1e-3, 3: 9e-4, 4: 8e-4}}
    assert allocate_bits(curves, {"matters": 10, "not": 10}, 3.0) == {"matters": 4, "not": 2}


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match=r"precision_budget=1\.5 is below 2 bits"):
        allocate_bits({"a": {2: 1.0, 3: 0.5}}, {"a": 10}, 1.5)


@pytest.mark.parametrize("budget", [2.5, 3.5, 4.0, 6.0])
def test_a_calibrated_model_keeps_to_its_budget(budget):
    model, report = calibrate(tiny_llava(), precision_budget=budget, guard=False)
    modules = dict(quantized_modules(model))
    sizes = {name: module.in_features * module.out_features for name, module in modules.items()}
    bits = {name: module.scheme.weight_bits for name, module in modules.items()}
    average = sum(sizes[name] * bits[name] for name in modules) / sum(sizes.values())
    assert average <= budget
    assert average == pytest.approx(report.average_weight_bits)
    largest = max(site_parameters(tiny_calibration()).values())
    # no raise of a site that matters is left over
    assert budget - average < 2 * largest / sum(sizes.values())
    assert len(set(bits.values())) > 1
    assert {module.scheme.activation_bits for module in modules.values()} == {4}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True, "rotation": "hadamard"},
        {"lm_head_bits": 8},
        {"activation_granularity": "dynamic_token"},
        {"activation_granularity": "dynamic_group"},
        {"activation_granularity": None, "activation_bits": 16},
    ],
)
def test_a_budget_in_megabytes_is_what_the_file_takes(options, tmp_path):
    options = {"guard": False, "max_block_depth": 1, "token_importance": False} | options
    model, _ = calibrate(tiny_llava(), precision_budget="0.3MB", **options)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert 0.97 * 300_000 < file.stat().st_size <= 300_000
    assert len({module.scheme.weight_bits for _, module in quantized_modules(model)}) > 1


def test_a_size_that_the_fewest_bits_exceed_is_refused(monkeypatch, tmp_path):
    model = tiny_llava()
    message = r"'0\.01MB' is below (0\.\d\dMB), which the model takes with"
    monkeypatch.setattr(sensitivity, "_Probe", None)  # nothing is measured before
    with pytest.raises(ValueError, match=message) as error:
        calibrate(model, precision_budget="0.01MB", guard=False)
    assert not dict(quantized_modules(model))
    monkeypatch.undo()
    enough = re.search(message, str(error.value))[1]
    calibrate(model, precision_budget=enough, guard=False)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size <= size_in_bytes(enough) < file.stat().st_size + 20_000


def test_the_guard_raises_what_four_bits_break_and_says_so():
    _, report = calibrate(broken_model(), guard=True)
    assert report.lifts
    worst = max(report.sensitivities, key=report.sensitivities.get)
    assert report.lifts[0].site == worst
    for lift in report.lifts:
        assert lift.before == report.sensitivities[lift.site] > 1e-3
        assert lift.after < lift.before
        assert lift.activation_bits == 8
        assert report.modules[lift.site].activation_bits == 8
        assert report.modules[lift.site].weight_bits == lift.weight_bits
    lifted = {lift.site for lift in report.lifts}
    assert len(lifted) <= 0.1 * len(report.sensitivities)
    plain, without = calibrate(broken_model(), guard=False)
    assert not without.lifts
    assert not without.sensitivities
    assert {module.scheme.activation_bits for _, module in quantized_modules(plain)} == {4}
    assert report.self_check.kl < without.self_check.kl


@pytest.mark.parametrize("budget", [2.5, 4.0, "0.3MB"])
def test_with_a_budget_the_guard_raises_inputs_alone_and_tells_the_final_bits(budget):
    options = {"precision_budget": budget, "activation_granularity": "dynamic_token"}
    _, plain = calibrate(broken_model(), guard=False, **options)
    _, report = calibrate(broken_model(), guard=True, **options)
    assert report.lifts
    for lift in report.lifts:
        scheme = report.modules[lift.site]
        assert (scheme.weight_bits, scheme.activation_bits) == (lift.weight_bits, 8)
        assert lift.weight_bits == plain.modules[lift.site].weight_bits
        assert lift.before == report.sensitivities[lift.site] > lift.after
    assert report.average_weight_bits == plain.average_weight_bits
    # what is told was measured at these bits
    widths = {name: scheme.weight_bits for name, scheme in report.modules.items()}
    worst = report.lifts[0]
    calibration = tiny_calibration(broken_model(), **options, equalization=False)
    precision = replace(calibration.settings.precision, activation_bits=8)
    found = sensitivity._Probe(calibration, 1).divergences(precision, [worst.site], widths)
    assert found == {worst.site: pytest.approx(worst.after, rel=1e-3)}


def guard_divergences(model, data=None, **options):
    calibration = tiny_calibration(model, data, **options)
    return calibration, sensitivity._Probe(calibration, 1).divergences(
        calibration.settings.precision
    )


@pytest.mark.parametrize("batch_size", [2, 4])
def test_divergences_are_those_of_whole_model_runs(batch_size, monkeypatch):
    monkeypatch.setattr(sensitivity, "_DIRECTIONS", 200)
    model, data = tiny_llava(seed=1).eval(), tiny_batches(12, batch_size)
    calibration, found = guard_divergences(model, data, activation_bits=6)
    held_out = held_out_half(data)
    before = [row for batch in held_out for row in answer_logits(model, batch)]
    logs = []
    for segment in calibration.segments:
        inputs, live = calibration.inputs[segment.name], live_layers(segment)
        hidden = [entry.hidden for entry in inputs]
        rows = initialize_sites(calibration, segment.component, live, inputs, hidden)
        for site in (site for row in rows for site in row):
            with installed([site]):
                after = [row for batch in held_out for row in answer_logits(model, batch)]
            exact = [answer_kl(*pair) for pair in zip(before, after, strict=True)]
            logs.append((math.log(sum(exact) / len(exact)), math.log(found[site.site.name])))
    exact, estimated = torch.tensor(logs, dtype=torch.float64).T
    assert torch.corrcoef(torch.stack([exact, estimated]))[0, 1] > 0.9
    assert (estimated - exact).mean().abs() < 0.3
    assert (estimated - exact).abs().max() < 1.5


def test_a_layer_runs_as_often_in_a_deeper_model():
    runs = []
    for layers in (2, 4, 6):
        model, count = tiny_llava(text_layers=layers).eval(), 0

        def see(*_):
            nonlocal count
            count += 1

        for layer in model.model.language_model.layers:
            layer.mlp.register_forward_pre_hook(see)
        calibration, found = guard_divergences(model)
        assert len(found) == sum(len(live_layers(s)) * 4 for s in calibration.segments) - 2
        runs.append(count)
    assert runs[2] - runs[1] == runs[1] - runs[0]


def test_batches_without_pictures_are_held_out_apart():
    """Every second batch is text alone: the vision side holds out others than the text."""
    pictured, text = tiny_batches(8, 2), tiny_batches(batch_size=2, rows=TEXT)
    data = [batch for pair in zip(pictured, text * 2, strict=True) for batch in pair]
    _, found = guard_divergences(tiny_llava().eval(), data)
    assert all(kl > 0 for kl in found.values())
    assert any("vision" in name for name in found)


def test_eight_bits_need_no_guard():
    _, report = calibrate(tiny_llava(), weight_bits=8, activation_bits=8, guard=True)
    assert not report.sensitivities
    assert report.average_weight_bits == 8
