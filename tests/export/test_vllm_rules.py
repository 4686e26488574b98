"""Exports pass vLLM's rules; each rule finds what breaks it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, save_quantized
from qvlm_hf.export import vllm_check
from qvlm_hf.export.checkpoint import export
from qvlm_hf.export.vllm_check import check_for_vllm

VISION = {"vision_hidden_size": 128, "vision_intermediate_size": 256}
WIDE = VISION | {"text_hidden_size": 128, "text_intermediate_size": 384}
ROW = {"scheme": "W8A8", "symmetric": True, "group_size": -1}
KINDS = {
    "W4A16": {"scheme": "W4A16", "symmetric": True, "group_size": 64},
    "zero points": {"scheme": "W4A16", "group_size": 32},
    "W8A16": {"scheme": "W8A16", "symmetric": True, "group_size": 64, "lm_head_bits": 8},
    "W8A8": {**ROW, "activation_granularity": "dynamic_token", "lm_head_bits": 8},
    "tiny": {"scheme": "W2A16", "group_size": 8},
}
UP = "language_model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Kind -> exported directory; "tiny" has awkward sizes, the others those of real models in
    small.
    """
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


@pytest.mark.parametrize("kind", ["W4A16", "zero points", "W8A16", "W8A8"])
def test_exports_are_right_on_one_gpu_and_on_two(exports, kind):
    assert check_for_vllm(exports[kind]) == []
    assert check_for_vllm(exports[kind], tensor_parallel=2) == []


@pytest.mark.parametrize("kind", ["W4A16", "W8A8"])
def test_exports_are_right_on_a_cpu(exports, kind):
    assert check_for_vllm(exports[kind], device="cpu") == []


def group(config):
    return config["quantization_config"]["config_groups"]["group_0"]


def ignore_one(config):
    config["quantization_config"]["ignore"].append("re:.*layers.0.self_attn.k_proj$")


def split(config):
    other = json.loads(json.dumps(group(config)))
    other["targets"], other["weights"]["group_size"] = [UP], 32
    config["quantization_config"]["config_groups"]["group_9"] = other


def weights(**fields):
    return lambda config: group(config)["weights"].update(fields)


def flatten(tensors):
    for name in [name for name in tensors if name.startswith("vision_tower.vision_model.")]:
        tensors[name.replace("vision_model.", "")] = tensors.pop(name)


def halve(tensors):
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"][:, :1].contiguous()
    tensors[f"{UP}.weight_packed"] = tensors[f"{UP}.weight_packed"].to(torch.int64)


def same(content):
    """Changes nothing."""


CPU, FLOATS = {"device": "cpu"}, "must be F32 or F16 or BF16"
GATE = UP.replace("up_proj", "gate_proj")
Q = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj and 1 more"
DOWN = "language_model.model.layers.0.mlp.down_proj and 1 more"
RUN_BY_NONE = ", weights per channel, inputs per token, is run by no scheme"
CASES = [  # kind, change of the config, of the tensors, where it runs, what is found
    ("W8A16", same, same, CPU, "kernel", "no CPU kernel has 8-bit weights"),
    ("tiny", same, same, {}, "kernel", "Humming runs it; Marlin has no 2-bit asymmetric weights"),
    ("tiny", same, same, {}, "groups", f"{GATE} and 1 more: packed zero points of 104 outputs do"),
    ("zero points", lambda c: c["text_config"].update(intermediate_size=352), same, {}, "kernel",
     f"{DOWN}: Marlin pads 352 inputs and 128 outputs at every step"),
    ("W4A16", lambda c: c.update(dtype="float32"), same, CPU, "kernel", "serve with --dtype bf"),
    ("W4A16", same, same, {"tensor_parallel": 3}, "parallel",
     "language model and 1 more: 4 attention heads are not divided by 3 devices"),
    ("W4A16", same, same, {"tensor_parallel": 4}, "groups", "not whole groups of 64"),
    ("W4A16", same, flatten, {}, "names", "the tensor is missing"),
    ("W4A16", same, flatten, {}, "names", "vLLM has no place for the tensor"),
    ("W4A16", same, halve, {}, "tensors", f"{UP}.weight_scale: is BF16 [384, 1], {FLOATS} [384, 2"),
    ("W4A16", same, halve, {}, "tensors", f"{UP}.weight_packed: is I64 [384, 16], must be I32 [38"),
    ("W4A16", ignore_one, same, {}, "fused",
     f"{Q}: some of q_proj, k_proj, v_proj are quantized and some are not"),
    ("W4A16", split, same, {}, "fused", f"{GATE}: gate_proj, up_proj are in different config group"),
    ("W4A16", split, same, {}, "tensors", f"{UP}.weight_scale: is BF16 [384, 2], {FLOATS} [384, 4"),
    ("W8A8", weights(symmetric=False), same, {}, "scheme", f"int-quantized W8A8{RUN_BY_NONE}"),
    ("W8A8", weights(strategy="group", group_size=64), same, {}, "scheme", "weights per group, inp"),
    ("W8A8", lambda c: group(c)["input_activations"].update(num_bits=4), same, {}, "scheme", "W8A4"),
    ("W4A16", weights(type="float"), same, {}, "scheme", "weights must be static integers"),
    ("W4A16", weights(num_bits=1), same, {}, "scheme", "pack-quantized weights of 1 bits"),
    ("W4A16", weights(group_size=96), same, {}, "groups", "not whole groups of 96"),
    ("W4A16", lambda c: c.update(architectures=["Idefics3ForConditionalGeneration"]), same, {},
     "model", "is no LLaVA that these rules know"),
]  # fmt: skip
NOTES = ("Humming", "Marlin pads", "serve with")  # it runs all the same


@pytest.mark.parametrize(("kind", "configure", "retensor", "options", "rule", "text"), CASES)
def test_what_breaks_a_rule_is_found(change, kind, configure, retensor, options, rule, text):
    found = check_for_vllm(change(kind, configure, retensor), **options)
    fatal = {one.fatal for one in found if one.rule == rule and text in one.text}
    assert fatal == {not any(note in text for note in NOTES)}
    assert found == sorted(found, key=lambda one: not one.fatal)
    if retensor is not same or rule == "model":
        assert {one.rule for one in found} == {rule}


def test_names_that_vllm_renames_are_right(change):
    def rename(tensors):
        for name in list(tensors):
            other = name.replace("language_model.lm_head", "lm_head")
            other = other.replace("language_model.model", "model.language_model")
            tensors[other] = tensors.pop(name)

    assert check_for_vllm(change("W4A16", retensor=rename)) == []


def test_a_group_without_a_format_has_the_models(change):
    assert check_for_vllm(change("W4A16", lambda config: group(config).pop("format"))) == []


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


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("qvlm W4A16", {}, "quant_method is 'qvlm', which vLLM does not run as it is: qvlm export"),
        ("wide", {}, "quant_method is None"),
        (".", {}, "holds no config"),
        ("W4A16", {"tensor_parallel": 0}, "tensor_parallel=0"),
        ("W4A16", {"device": "tpu"}, "device='tpu'"),
    ],
)
def test_refusals(exports, folder, options, message):
    with pytest.raises(ValueError, match=message):
        check_for_vllm(exports["W4A16"].parent / folder, **options)


def test_the_docs_have_a_row_for_every_rule():
    page = (Path(__file__).parent.parent.parent / "docs" / "serving.md").read_text()
    named = set(re.findall(r'_Broken\("(\w+)"', Path(vllm_check.__file__).read_text()))
    table = page.partition("| rule |")[2].partition("\n\n")[0]
    assert named == set(re.findall(r"^\| (\w+) \|", table, re.MULTILINE))
    assert f"vLLM {vllm_check.VLLM_VERSION}" in page
