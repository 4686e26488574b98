"""How many percent of the weights are quantized, and the reasons for the rest."""

import pytest
from tiny_families import tiny_family
from torch import nn

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.models.coverage import left_out_by_row, measure_coverage
from qvlm_hf.models.graph import Selection
from qvlm_hf.nn.linear import QVLMLinear

# fields of the configuration -> reason -> the parts of the model that have it
CASES = {
    "all": ({}, {"output head": ["lm_head"]}),
    "head": ({"lm_head_bits": 8}, {}),
    "tower": (
        {"quantize_vision": False},
        {"output head": ["lm_head"], "quantize_vision=False": ["model.vision_tower"]},
    ),
    "projector": (
        {"quantize_projector": False},
        {"quantize_projector=False": ["model.multi_modal_projector"], "output head": ["lm_head"]},
    ),
    "patterns": (
        {"modules_to_not_convert": ["v_proj", "lm_head"]},
        {"modules_to_not_convert": ["v_proj", "lm_head"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stays_has_its_reason_and_every_weight_is_counted(case):
    fields, expected = CASES[case]
    model = tiny_family()
    names = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    total = sum(parameter.numel() for parameter in model.parameters())
    report = quantize_model(model, QVLMConfig(scheme="W8A16", **fields))
    options = {name: value for name, value in fields.items() if name != "lm_head_bits"}
    coverage = measure_coverage(model, report.modules, left_out_by_row(model, Selection(**options)))
    assert coverage.summary() == report.provenance["coverage"]
    assert coverage.parameters == total
    quantized = [module for module in model.modules() if isinstance(module, QVLMLinear)]
    held = sum(module.in_features * module.out_features for module in quantized)
    assert coverage.percent == pytest.approx(100 * held / total)
    kept = {part.name: part.reason for part in coverage.kept}
    for name in names - set(report.modules):
        (reason,) = (
            reason
            for reason, parts in expected.items()
            if any(f".{part}." in f".{name}." for part in parts)
        )
        assert kept[name] == reason
    reasons = set(expected) | {"embedding", "norm", "bias", "convolution"}
    assert set(kept.values()) == reasons | {"a bare parameter of 1 dimensions"}


def test_a_part_that_the_row_leaves_out_has_the_rows_reason():
    model = tiny_family("video_llava")
    total = sum(parameter.numel() for parameter in model.model.video_tower.parameters())
    report = quantize_model(model, QVLMConfig(scheme="W8A16"))
    coverage = measure_coverage(model, report.modules, left_out_by_row(model))
    parts = [part for part in coverage.kept if part.reason == "samples hold no videos"]
    assert {part.name.split(".")[1] for part in parts} == {"video_tower"}
    assert sum(part.parameters for part in parts) == total


@pytest.mark.parametrize(("words", "few"), [(128, False), (4096, True)])
def test_few_percent_are_a_warning_and_shared_weights_count_once(words, few):
    model = tiny_family(decoder="gemma")
    model.resize_token_embeddings(words)
    share = 100 * words * 48 / sum(parameter.numel() for parameter in model.parameters())
    report = quantize_model(model, QVLMConfig(scheme="W4A16"))
    found = report.provenance["coverage"]
    assert found["kept"]["embedding"] == pytest.approx(share, abs=3)  # of positions too
    assert "output head" not in found["kept"]
    warned = [f"only {found['percent']}% of the weights are quantized; the rest: embedding"]
    assert [text for text in report.warnings if text.startswith(warned[0])] == list(report.warnings)
    assert bool(report.warnings) == few
