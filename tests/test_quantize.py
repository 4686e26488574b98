"""The whole recipe on a tiny LLaVA: what it quantizes, refuses, and leaves as it was."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_calibrations import calibrate, tiny_samples
from tiny_models import tiny_llava
from torch import nn

from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.calibration.search import segments
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.quantize import quantize_without_data


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(held_out=tiny_samples(4, seed=9))


def test_every_linear_but_the_head_is_quantized(calibrated):
    model, report = calibrated
    found = dict(quantized_modules(model))
    assert set(found) == set(report.modules)
    assert report.full_precision == ("lm_head",)
    assert len(found) == 3 * 6 + 2 + 2 * 7
    assert [segment.component for segment in report.segments] == ["vision", "projector", "language"]
    assert report.dead == ("model.vision_tower.encoder.layers.2",)
    for segment in report.segments:
        live = [name for name in segment.layers if name not in report.dead]
        assert [name for block in segment.blocks for name in block.layers] == live
        assert len(segment.entropies) == len(live) - 1


def test_the_report_survives_json(calibrated):
    _, report = calibrated
    assert CalibrationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.provenance["samples"] == 8
    assert report.provenance["images"] == 8
    assert report.self_check.held_out
    with pytest.raises(ValueError, match="damaged or from another version"):
        CalibrationReport.from_dict({"modules": {}})


def test_the_report_says_where_the_time_went(calibrated):
    _, report = calibrated
    assert {"sensitivity", "importance", "ranges", "search", "rounding"} <= set(report.seconds)
    assert all(seconds > 0 for seconds in report.seconds.values())
    older = report.to_dict()
    del older["seconds"]
    assert CalibrationReport.from_dict(older) == report


def test_two_runs_give_the_same_tensors(calibrated):
    again, report = calibrate(held_out=tiny_samples(4, seed=9))
    first, second = calibrated[0].state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert report == calibrated[1]


def test_the_default_dtype_of_the_process_changes_nothing(calibrated):
    model, samples, usual = tiny_llava().eval(), tiny_samples(4, seed=9), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, _ = calibrate(model, held_out=samples)
    finally:
        torch.set_default_dtype(usual)
    found, expected = model.state_dict(), calibrated[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_gptq_lowers_the_block_errors():
    options = {"activation_granularity": "channel", "max_block_depth": 1}
    # the errors are measured before a block's own GPTQ: the last one shows what those below gained
    plain, gptq = (
        calibrate(weight_rounding=rounding, **options)[1].segments[-1].blocks[-1].joint
        for rounding in ("nearest", "gptq")
    )
    assert gptq < 0.9 * plain


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_llava().eval()

    def linears():
        return {
            name: (id(module), module.weight.data_ptr())
            for name, module in model.named_modules()
            if type(module) is nn.Linear
        }

    before, calls, search_block = linears(), [], segments.search_block

    def fail(search):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stop")
        return search_block(search)

    monkeypatch.setattr(segments, "search_block", fail)
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model)
    assert linears() == before
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_text_only_data_names_the_module_and_the_remedy():
    data = load_samples([{"image": None, "question": "what colour ?", "answer": "red"}] * 4)
    message = r"did not reach model\.vision_tower.*modules_to_not_convert=\['vision_tower'"
    with pytest.raises(ValueError, match=message):
        calibrate(data=data)
    for options in (
        {"quantize_vision": False, "quantize_projector": False},
        {"modules_to_not_convert": ["vision_tower", "multi_modal_projector"]},
    ):
        _, report = calibrate(data=data, max_block_depth=1, **options)
        assert [segment.component for segment in report.segments] == ["language"]
    assert any("static ranges from 4 samples" in warning for warning in report.warnings)


def test_samples_without_answers_are_told_of():
    data = [replace(sample, messages=sample.messages[:1]) for sample in tiny_samples(4)]
    _, report = calibrate(data=data, max_block_depth=1)
    assert report.self_check is None
    assert not any(report.sensitivities.values())
    (line,) = (warning for warning in report.warnings if "answer" in warning)
    assert line.startswith("none of the 4 samples has an answer: ")
    _, report = calibrate(data=[*data, *tiny_samples(1)], max_block_depth=1)
    assert not any("has an answer" in warning for warning in report.warnings)


def test_broken_weights_and_activations_are_named():
    model = tiny_llava().eval()
    model.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    message = r"weight of model\.language_model\.layers\.1\.mlp\.up_proj holds NaN"
    with pytest.raises(ValueError, match=message):
        calibrate(model)
    model = tiny_llava().eval()
    model.model.language_model.embed_tokens.weight.data[:] = torch.inf
    with pytest.raises(ValueError, match="NaN"):
        calibrate(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_keep_their_dtype(dtype):
    model, report = calibrate(
        tiny_llava(dtype=dtype).eval(), max_block_depth=1, weight_bits=8, activation_bits=8
    )
    assert model.lm_head.weight.dtype == dtype
    assert all(
        module.bias is None or module.bias.dtype == dtype for _, module in quantized_modules(model)
    )
    assert report.self_check.kl < 0.01


def test_collapse_is_a_warning_and_under_strict_an_error_that_leaves_the_model():
    options = {
        "weight_bits": 2,
        "activation_bits": 3,
        "activation_granularity": "dynamic_token",
        "max_block_depth": 1,
    }
    _, report = calibrate(weight_rounding="nearest", **options)
    assert len(report.warnings) == 1
    assert "agrees with full precision on only" in report.warnings[0]
    assert "leave out activation_granularity=" in report.warnings[0]
    (line, *_) = calibrate(weight_bits=2, activation_bits=3, max_block_depth=1, guard=False)[
        1
    ].warnings
    assert "agrees with full precision on only" in line
    assert "activation_granularity" not in line  # which nobody gave
    (line, *_) = calibrate(
        weight_bits=2, activation_bits=3, max_block_depth=1, guard=False, recipe="auto"
    )[1].warnings
    assert "agrees with full precision on only" in line
    assert "activation_granularity" not in line  # which the recipe chose
    model = tiny_llava().eval()
    with pytest.raises(ValueError, match="strict=True: "):
        calibrate(model, strict=True, weight_rounding="nearest", **options)
    assert next(quantized_modules(model), None) is None


def test_head_tied_and_untied():
    model, report = calibrate(lm_head_bits=8, max_block_depth=1)
    assert report.modules["lm_head"].weight_bits == 8
    assert model(input_ids=torch.tensor([[1, 5, 6]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="shares its weight"):
        calibrate(tiny_llava(tie_word_embeddings=True).eval(), lm_head_bits=8)


def test_a_head_that_moves_the_answers_stays_in_full_precision():
    def model():
        model = tiny_llava().eval()
        with torch.no_grad():
            model.lm_head.weight *= 50  # answers that are sure of themselves
            # shifts all logits alike: no answer changes, but 8 bits cannot hold it as well
            model.lm_head.weight[:, 0] = 1e4
        return model

    options = {"max_block_depth": 1, "weight_bits": 8, "activation_bits": 8}
    quantized, report = calibrate(model(), lm_head_bits=8, **options)
    assert type(quantized.lm_head) is nn.Linear
    assert "lm_head" not in report.modules
    assert "lm_head" in report.full_precision
    assert "the head stays in full precision" in report.warnings[0]
    _, without = calibrate(model(), **options)
    assert report.self_check == without.self_check
    untouched = model()
    with pytest.raises(ValueError, match="strict=True: lm_head_bits"):
        calibrate(untouched, lm_head_bits=8, strict=True, **options)
    assert next(quantized_modules(untouched), None) is None


def test_rounding_without_data():
    model, weights_only = tiny_llava().eval(), CalibrationSettings(activation_bits=16)
    report = quantize_without_data(model, weights_only)
    assert {scheme.granularity for scheme in report.modules.values()} == {"none"}
    with pytest.raises(ValueError, match="give dataset="):
        quantize_without_data(tiny_llava().eval(), CalibrationSettings())
    with pytest.raises(ValueError, match="quantized already"):
        quantize_without_data(model, weights_only)


def test_a_segment_is_searched_on_what_quantized_segments_give_it(monkeypatch):
    alike, initialize_sites = {}, segments.initialize_sites

    def see(calibration, component, layers, inputs, hidden):
        if component not in alike:  # its first layer
            pairs = zip(hidden, calibration.inputs[layers[0].name], strict=True)
            alike[component] = [torch.equal(now, full.hidden) for now, full in pairs]
        return initialize_sites(calibration, component, layers, inputs, hidden)

    monkeypatch.setattr(segments, "initialize_sites", see)
    calibrate(max_block_depth=1)
    assert alike == {"vision": [True] * 2, "projector": [False] * 2, "language": [False] * 2}


def test_excluded_modules_stay_and_progress_reaches_the_end():
    steps = []

    class Recorder:
        def on_step(self, name, done, total):
            steps.append((name, done, total))

    model, report = calibrate(
        modules_to_not_convert=["mlp.down_proj", "vision_tower"], callbacks=[Recorder()]
    )
    assert type(model.model.language_model.layers[0].mlp.down_proj) is nn.Linear
    assert not any("vision_tower" in name for name in report.modules)
    assert list(dict.fromkeys(name for name, _, _ in steps)) == ["sensitivity", "search"]
    for step in ("sensitivity", "search"):
        counts = [(done, total) for name, done, total in steps if name == step]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1]


def test_auto_takes_the_recipe_that_it_measured_best():
    options = {"activation_granularity": "channel", "max_block_depth": 1, "guard": False}
    model, report = calibrate(recipe="auto", **options)
    assert {tried.fields["rotation"] for tried in report.recipes} == {None, "hadamard"}
    best = report.recipes[0]
    assert not any(tried.keeps_text for tried in report.recipes)  # so it is text that decides
    assert best.text_kl == min(tried.text_kl for tried in report.recipes)
    fixed, expected = calibrate(**options | best.fields)
    first, second = model.state_dict(), fixed.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert report.seconds["recipes"] > 0
    assert "recipes" not in expected.seconds
    assert report.settings == expected.settings  # trials left no trace, and the record is fixed
    assert CalibrationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
