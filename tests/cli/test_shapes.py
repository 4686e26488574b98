"""Any configuration, inspected and timed: families with a row and without, no weights anywhere."""

import json
import re
from functools import partial

import pytest
import torch
from shrunken_families import tiny_config, tiny_model
from tiny_families import tiny_family

from qvlm_hf import QVLMConfig
from qvlm_hf.bench.machine import measure_limits
from qvlm_hf.bench.random_models import picture_tokens, random_model, random_prompt
from qvlm_hf.cli import main
from qvlm_hf.cli.shapes import plan
from qvlm_hf.hf.round_on_load import planned_report
from qvlm_hf.hub.saved import empty_model
from qvlm_hf.models.by_structure import read_structure
from qvlm_hf.nn.footprint import footprint

# family, tower, decoder -> what is said of rotation, tokens of a picture if `bench` can make one
WITH_ROW = {
    ("llava", "clip", "llama"): ("can be folded in", 16),
    ("llava", "siglip", "phi"): ("PhiDecoderLayer cannot be rotated, because its norms", 16),
    ("llava", "pixtral", "mistral"): ("can be folded in", 16),
    ("internvl", "internvl", "qwen2"): ("can be folded in", 4),
    ("idefics3", "idefics3", "llama"): ("can be folded in", None),
    ("paligemma", "siglip", "gemma2"): ("Gemma2DecoderLayer cannot be rotated, because", 16),
    ("deepseek_vl", "siglip", "llama"): ("can be folded in", 16),
}
WITHOUT_ROW = ("hunyuan_vl", "idefics2")


@pytest.mark.parametrize("parts", WITH_ROW, ids="-".join)
def test_inspect_a_configuration_of_a_family_with_a_row(parts, tmp_path, capsys):
    model = tiny_family(*parts)
    model.config.save_pretrained(tmp_path)
    words = ["inspect", str(tmp_path), "--scheme", "W4A4", "w8a16", "--group-size", "16"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"rotation: {WITH_ROW[parts][0]}" in printed
    config = QVLMConfig(scheme="W8A16", group_size=16)
    report = planned_report(model, config.settings())
    found = report.provenance["coverage"]
    assert f"{found['percent']}% of the weights quantized; the rest: " in printed
    assert f"{len(report.modules)} linear modules to quantize" in printed
    assert ("no ranges per position" in printed) == ("pixtral" in parts)
    assert "W4A4, group size 16, against bfloat16\n" in printed
    assert printed.endswith(
        f"W8A16, group size 16, against bfloat16\n{footprint(model, report.modules)}\n"
    )


def test_inspect_a_file_as_its_directory(tmp_path, capsys):
    tiny_family().config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    from_directory = capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out.replace("/config.json", "") == from_directory


@pytest.mark.parametrize("family", WITHOUT_ROW)
def test_inspect_a_configuration_of_a_family_without_a_row(family, tmp_path, capsys):
    tiny_config(family).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    structure = read_structure(tiny_model(family))
    assert "no calibration, rotation or equalization; at most these modules" in printed
    count = int(re.search(r"(\d+) linear modules to quantize", printed)[1])
    assert count >= sum(len(site.modules) for s in structure.segments for site in s.sites)
    assert "W4A16, group size 128, against bfloat16" in printed


@pytest.mark.parametrize("parts", WITH_ROW, ids="-".join)
@torch.no_grad()
def test_random_models_answer_prompts_with_pictures_where_they_can_be_made(parts):
    config, tokens = tiny_family(*parts).config, WITH_ROW[parts][1]
    empty = empty_model(config)
    assert picture_tokens(empty) == tokens
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    modules = plan(empty, "W4A8", group_size=16).report.modules
    made = random_model(config, modules=modules, **where)
    attention = made.config.get_text_config()._attn_implementation
    assert (attention == "qvlm") == (parts[2] != "gemma2")  # its scores are capped
    counts = {"images": int(tokens is not None), "image_tokens": tokens or 0}
    inputs = random_prompt(config, 2, prompt_tokens=24, **counts, **where)
    assert made(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("scheme", "group_size", "expected"),
    [
        ("W4A4", 32, {("dynamic_group", None)}),
        ("W8A8", 32, {("dynamic_group", None)}),
        ("W4A4", -1, {("channel", None)}),
        ("W4A16", 32, {("none", None)}),
    ],
)
def test_a_plan_takes_what_calibration_tries_first(scheme, group_size, expected):
    empty = empty_model(tiny_family("llava", "clip", "llama").config)
    modules = plan(empty, scheme, group_size=group_size).report.modules
    assert {(module.granularity, module.hadamard) for module in modules.values()} == expected


@pytest.mark.parametrize("family", ["idefics3", "hunyuan_vl"])
def test_bench_a_configuration(family, tmp_path, capsys, monkeypatch):
    quick = partial(measure_limits, size=64)
    monkeypatch.setattr("qvlm_hf.cli.bench_models.measure_limits", quick)
    config = (
        tiny_config(family) if family == "hunyuan_vl" else tiny_family(family, "idefics3").config
    )
    config.save_pretrained(tmp_path)
    words = ["bench", "--shape", str(tmp_path), "--scheme", "W4A8"]
    words += ["--rounds", "2", "--new-tokens", "2", "--json", str(tmp_path / "rows.json")]
    assert main(words) == 0
    result = json.loads((tmp_path / "rows.json").read_text())
    assert (result["settings"]["images"], result["settings"]["prompt_tokens"]) == (0, 32)
    assert [row["error"] for row in result["rows"]] == [None] * len(result["rows"])
    assert [row["way"] for row in result["rows"] if row["kernel"]] == ["qvlm_hf W4A8"]
    assert main([*words, "--images", "1"]) == 1
    assert "takes pictures in another form" in capsys.readouterr().err


MISTAKES = {
    "no JSON": ("{", "config.json"),
    "no model_type": ("{}", "model_type"),
    "another kind": ('{"model_type": "bert"}', "'bert' is no image-text-to-text model"),
    "quantized by others": (
        json.dumps({"model_type": "llava", "quantization_config": {"quant_method": "awq"}}),
        "is not quantized by qvlm_hf",
    ),
    "heads": (
        json.dumps({"model_type": "aya_vision"}),
        "no 'aya_vision' model can be built from it (embed_dim must be divisible by num_heads",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_configuration_that_is_none_is_one_line(mistake, tmp_path, capsys):
    text, message = MISTAKES[mistake]
    (tmp_path / "config.json").write_text(text)
    assert main(["inspect", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
