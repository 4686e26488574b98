"""Exports pass vLLM's rules; each rule finds what breaks it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, save_quantized
from qvlm_hf.export.checkpoint import export
from qvlm_hf.export.vllm_check import check_for_vllm
from qvlm_hf.export.vllm_rules import RULES

WIDE = {
    "vision_hidden_size": 128,
    "vision_intermediate_size": 256,
    "text_hidden_size": 128,
    "text_intermediate_size": 384,
}
KINDS = {
    "W4A16": {"scheme": "W4A16", "symmetric": True, "group_size": 64},
    "zero points": {"scheme": "W4A16", "group_size": 32},
    "W8A16": {"scheme": "W8A16", "symmetric": True, "group_size": 64, "lm_head_bits": 8},
    "W8A8": {
        "scheme": "W8A8",
        "symmetric": True,
        "group_size": -1,
        "activation_granularity": "dynamic_token",
        "lm_head_bits": 8,
    },
    "tiny": {"scheme": "W2A16", "group_size": 8},
}
UP = "language_model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Kind -> exported directory; "tiny" has awkward sizes, the others those of real models in small."""
    root = tmp_path_factory.mktemp("rules")
    wide, tiny = (
        save_tiny(root / "wide", torch.bfloat16, **WIDE),
        save_tiny(root / "small", torch.bfloat16),
    )
    paths = {}
    for kind, fields in KINDS.items():
        model = AutoModelForImageTextToText.from_pretrained(
            tiny if kind == "tiny" else wide, quantization_config=QVLMConfig(**fields)
        )
        save_quantized(model, None, root / f"qvlm {kind}", report=None)
        paths[kind] = export(root / f"qvlm {kind}", root / kind).path
    return paths


@pytest.fixture
def change(exports, tmp_path):
    """A function: copies an export and lets the test change its config and tensors."""

    def changed(kind, configure=lambda config: None, retensor=lambda tensors: None):
        path = tmp_path / "changed"
        shutil.copytree(exports[kind], path)
        config, tensors = (
            json.loads((path / "config.json").read_text()),
            load_file(path / "model.safetensors"),
        )
        configure(config)
        retensor(tensors)
        (path / "config.json").write_text(json.dumps(config))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return changed


def fatal(path, **options):
    return {
        (finding.rule, finding.text) for finding in check_for_vllm(path, **options) if finding.fatal
    }


@pytest.mark.parametrize("kind", ["W4A16", "zero points", "W8A16", "W8A8"])
def test_exports_are_right_on_one_gpu_and_on_two(exports, kind):
    assert check_for_vllm(exports[kind]) == []
    assert check_for_vllm(exports[kind], tensor_parallel=2) == []


def test_on_a_cpu_only_4_bits_have_a_weight_only_kernel(exports):
    assert check_for_vllm(exports["W4A16"], device="cpu") == []
    assert check_for_vllm(exports["W8A8"], device="cpu") == []
    assert any(
        "no CPU kernel has 8-bit weights" in text
        for _, text in fatal(exports["W8A16"], device="cpu")
    )


def test_awkward_sizes_are_noted_or_refused(exports):
    notes = {finding.text for finding in check_for_vllm(exports["tiny"]) if not finding.fatal}
    assert any(
        "Humming runs it; Marlin has no 2-bit asymmetric weights in groups of 8" in note
        for note in notes
    )
    broken = fatal(exports["tiny"])
    assert {rule for rule, _ in broken} == {
        "groups"
    }  # zero points of gate and up meet in the middle of a word: 104 * 2 bits
    assert all("gate_proj" in text and "do not fill whole words" in text for _, text in broken)


def test_padding_is_noted(change):
    def narrow(config):
        config["text_config"]["intermediate_size"] = 352

    padded = {
        finding.text
        for finding in check_for_vllm(change("zero points", narrow))
        if "pads" in finding.text
    }
    assert padded == {
        "language_model.model.layers.0.mlp.down_proj and 1 more: Marlin pads 352 inputs and 128 "
        "outputs at every step"
    }


def test_float32_is_noted_on_a_cpu(change):
    def widen(config):
        config["dtype"] = "float32"

    assert any(
        "serve with --dtype bfloat16" in finding.text
        for finding in check_for_vllm(change("W4A16", widen), device="cpu")
    )


def test_parallel(exports):
    assert (
        "parallel",
        "language model and 1 more: 4 attention heads are not divided by 3 devices",
    ) in fatal(exports["W4A16"], tensor_parallel=3)
    assert any(
        rule == "groups" and "not whole groups of 64" in text
        for rule, text in fatal(exports["W4A16"], tensor_parallel=4)
    )


def test_names(change):
    def flatten(tensors):
        for name in [name for name in tensors if name.startswith("vision_tower.vision_model.")]:
            tensors[name.replace("vision_model.", "")] = tensors.pop(name)

    found = fatal(change("W4A16", retensor=flatten))
    assert {rule for rule, _ in found} == {"names"}
    assert len(found) == 2  # missing there, no place here


def test_names_that_vllm_renames_are_right(change):
    def rename(tensors):
        for name in list(tensors):
            tensors[
                name.replace("language_model.lm_head", "lm_head").replace(
                    "language_model.model", "model.language_model"
                )
            ] = tensors.pop(name)

    assert check_for_vllm(change("W4A16", retensor=rename)) == []


def test_tensors(change):
    def halve(tensors):
        tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"][:, :1].contiguous()
        tensors[f"{UP}.weight_packed"] = tensors[f"{UP}.weight_packed"].to(torch.int64)

    assert fatal(change("W4A16", retensor=halve)) == {
        ("tensors", f"{UP}.weight_scale: is BF16 [384, 1], must be F32 or F16 or BF16 [384, 2]"),
        ("tensors", f"{UP}.weight_packed: is I64 [384, 16], must be I32 [384, 16]"),
    }


def test_fused_parts_are_quantized_together(change):
    def ignore_one(config):
        config["quantization_config"]["ignore"].append("re:.*layers.0.self_attn.k_proj$")

    found = {text for rule, text in fatal(change("W4A16", ignore_one)) if rule == "fused"}
    assert found == {
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj and 1 more: "
        "some of q_proj, k_proj, v_proj are quantized and some are not"
    }


def test_fused_parts_are_quantized_alike(change):
    def split(config):
        groups = config["quantization_config"]["config_groups"]
        other = json.loads(json.dumps(groups["group_0"]))
        other["targets"] = [UP]
        other["weights"]["group_size"] = 32
        groups["group_9"] = other

    found = fatal(change("W4A16", split))
    gate = UP.replace("up_proj", "gate_proj")
    assert ("fused", f"{gate}: gate_proj, up_proj are in different config groups") in found
    assert (
        "tensors",
        f"{UP}.weight_scale: is BF16 [384, 2], must be F32 or F16 or BF16 [384, 4]",
    ) in found


@pytest.mark.parametrize(
    ("kind", "part", "fields", "reason"),
    [
        (
            "W8A8",
            "weights",
            {"symmetric": False},
            "int-quantized W8A8, weights per channel, inputs per token, is run by no scheme",
        ),
        (
            "W8A8",
            "weights",
            {"strategy": "group", "group_size": 64},
            "weights per group, inputs per token, is run by no scheme",
        ),
        ("W8A8", "input_activations", {"num_bits": 4}, "int-quantized W8A4"),
        ("W4A16", "weights", {"type": "float"}, "weights must be static integers"),
        ("W4A16", "weights", {"num_bits": 1}, "pack-quantized weights of 1 bits"),
    ],
)
def test_scheme(change, kind, part, fields, reason):
    def configure(config):
        config["quantization_config"]["config_groups"]["group_0"][part].update(fields)

    assert any(rule == "scheme" and reason in text for rule, text in fatal(change(kind, configure)))


def test_groups(change):
    def coarse(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 96

    assert any(
        rule == "groups" and "not whole groups of 96" in text
        for rule, text in fatal(change("W4A16", coarse))
    )


def test_a_group_without_a_format_has_the_models(change):
    def implied(config):
        del config["quantization_config"]["config_groups"]["group_0"]["format"]

    assert check_for_vllm(change("W4A16", implied)) == []


@pytest.mark.parametrize(
    "groups",
    [None, {}, {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}, {"group_0": {}}],
)
def test_an_incomplete_config_is_refused(change, groups):
    def cut(config):
        config["quantization_config"]["config_groups"] = groups

    path = change("W4A16", cut)
    with pytest.raises(ValueError, match="has no config_groups with targets and"):
        check_for_vllm(path)


def test_model(change):
    def other(config):
        config["architectures"] = ["Idefics3ForConditionalGeneration"]

    ((rule, text),) = fatal(change("W4A16", other))
    assert rule == "model"
    assert "is no LLaVA that these rules know" in text


def test_refusals(exports, tmp_path):
    with pytest.raises(
        ValueError,
        match="quant_method is 'qvlm', which vLLM does not run as it is: qvlm export writes",
    ):
        check_for_vllm(exports["W4A16"].parent / "qvlm W4A16")
    with pytest.raises(ValueError, match="quant_method is None"):
        check_for_vllm(exports["W4A16"].parent / "wide")
    with pytest.raises(ValueError, match="holds no config"):
        check_for_vllm(tmp_path)
    with pytest.raises(ValueError, match="tensor_parallel=0"):
        check_for_vllm(exports["W4A16"], tensor_parallel=0)
    with pytest.raises(ValueError, match="device='tpu'"):
        check_for_vllm(exports["W4A16"], device="tpu")


def test_the_table_in_the_docs_is_the_table():
    page = (Path(__file__).parent.parent.parent / "docs" / "serving.md").read_text()
    for rule in RULES:
        assert f"| {rule.name} | {rule.source} | {rule.says} |" in page
