"""Exported models: another process, without qvlm_hf, loads them in Transformers and computes what
we compute.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shrunken_families import tiny_model
from tiny_families import tiny_family, tiny_family_processor
from tiny_models import save_tiny, tiny_messages
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, quantize_model, save_quantized
from qvlm_hf.calibration.samples import collate, load_samples
from qvlm_hf.export.checkpoint import Exported, export, hub_name

load = AutoModelForImageTextToText.from_pretrained

LAYER = "model.language_model.layers.1.mlp.down_proj"
DYNAMIC = {"activation_granularity": "dynamic_token"}
ROW_W8A8 = {"scheme": "W8A8", "symmetric": True, "group_size": -1} | DYNAMIC
W4 = {"scheme": "W4A16", "symmetric": True, "group_size": 32}
SCHEMES = {
    "4 bits": W4,
    "4 bits with zero points": {"scheme": "W4A16", "group_size": 32},
    "3 bits in 4": W4 | {"scheme": "W3A16"},
    "5 bits in 8, with zero points": {"scheme": "W5A16", "group_size": 32},
    "2 bits by row, with zero points": {"scheme": "W2A16", "group_size": -1},
    "4 bits, head in 8": W4 | {"lm_head_bits": 8},
    "8 bits, projector in full": {
        "scheme": "W8A16",
        "symmetric": True,
        "quantize_projector": False,
    },
    "W8A8": ROW_W8A8,
    "W8A8 with its head": ROW_W8A8 | {"lm_head_bits": 8},
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A quantized model, its export, what it answers, and the weight of `LAYER`."""

    path: Path
    exported: Exported
    logits: torch.Tensor
    weight: torch.Tensor


@pytest.fixture(scope="module")
def make(processor, inputs, tmp_path_factory):
    """A function: makes a case."""

    def made(source, config, dtype=torch.float32):
        folder = tmp_path_factory.mktemp("export")
        options = {"dtype": dtype, "quantization_config": config}
        model = load(source, **options)
        save_quantized(model, processor, folder / "qvlm", report=model.hf_quantizer.report)
        fed = {key: t.to(dtype) if t.is_floating_point() else t for key, t in inputs.items()}
        with torch.no_grad():
            logits = model(**fed).logits
        exported = export(folder / "qvlm", folder / "exported", max_shard_size="60KB")
        return Case(folder / "qvlm", exported, logits, model.get_submodule(LAYER).dequantize())

    return made


@pytest.fixture(scope="module")
def cases(make, source, hub_layout, processor):
    """Name -> case; the ones that end in a dtype are of that dtype."""
    made = {name: make(source, QVLMConfig(**fields)) for name, fields in SCHEMES.items()}
    made["from the Hub's layout"] = make(hub_layout, QVLMConfig(**W4))
    search = {"recipe": "fixed", "num_samples": 4, "batch_size": 4, "dataset": tiny_messages(4)}
    budget = QVLMConfig(**W4, precision_budget=4.5, processor=processor, **search)
    made["budget"] = make(source, budget)
    for name, dtype in DTYPES.items():
        made[name] = make(source, QVLMConfig(**SCHEMES["4 bits with zero points"]), dtype)
    return made


@pytest.fixture(scope="module")
def loaded(cases, inputs, tmp_path_factory):
    """What a process without qvlm_hf made of the exports."""
    folder = tmp_path_factory.mktemp("loaded")
    torch.save(inputs, folder / "inputs.pt")
    script = Path(__file__).parent / "fresh_exported.py"
    paths = [str(case.exported.path) for case in cases.values()]
    done = subprocess.run(
        [sys.executable, script, folder / "inputs.pt", folder / "out.pt", *paths],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, torch.load(folder / "out.pt").values(), strict=True))


@pytest.mark.parametrize("name", [*SCHEMES, "from the Hub's layout", "budget"])
def test_another_program_computes_our_logits(cases, loaded, name):
    assert loaded[name]["problems"] == {}
    assert loaded[name]["processor"] == "LlavaProcessor"
    torch.testing.assert_close(loaded[name]["logits"], cases[name].logits, rtol=0, atol=1e-3)
    assert cases[name].logits.std() > 0.1  # so that the tolerance means something


@pytest.mark.parametrize("name", DTYPES)
def test_in_16_bits_the_weights_are_ours_rounded_once(cases, loaded, name):
    assert loaded[name]["problems"] == {}
    assert torch.equal(loaded[name]["weight"], cases[name].weight.to(DTYPES[name]))


def test_a_budget_becomes_several_config_groups(cases):
    widths = {kind.weight_bits for kind in cases["budget"].exported.modules.values()}
    assert len(widths) > 1
    groups = quantization(cases["budget"])["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == widths
    assert groups["group_0"]["targets"] == ["Linear"]


def test_the_head_is_named_because_vllm_has_a_class_of_its_own_for_it(cases):
    groups = quantization(cases["W8A8 with its head"])["config_groups"]
    assert groups["group_0"]["targets"] == ["re:.*lm_head$", "Linear"]
    assert quantization(cases["W8A8"])["ignore"] == ["re:.*lm_head$"]


def test_packed_4_bit_words_are_copied(cases):
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    with safe_open(cases["4 bits"].path / "model.safetensors", "pt") as before:
        assert torch.equal(tensors(cases["4 bits"])[f"{name}_packed"], before.get_tensor(name))


def test_what_is_packed_is_what_compressed_tensors_packs(cases):
    exported = tensors(cases["5 bits in 8, with zero points"])
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    shape = exported[f"{name}_shape"].tolist()
    scale = exported[f"{name}_scale"]
    values = unpack_from_int32(exported[f"{name}_packed"], 8, shape).float()
    zero_point = unpack_from_int32(
        exported[f"{name}_zero_point"], 8, scale.shape, packed_dim=0
    ).float()
    length = shape[1] // scale.shape[1]
    weight = (values - zero_point.repeat_interleave(length, 1)) * scale.repeat_interleave(length, 1)
    assert torch.equal(weight, cases["5 bits in 8, with zero points"].weight)


def test_names_are_those_of_llava_on_the_hub(cases):
    prefixes = {
        name.rpartition(".layers.")[0] for name in tensors(cases["4 bits"]) if ".layers." in name
    }
    assert prefixes == {"language_model.model", "vision_tower.vision_model.encoder"}
    assert tensors(cases["4 bits"]).keys() == tensors(cases["from the Hub's layout"]).keys()


FC1 = "encoder.layers.0.mlp.fc1.bias"
LINEAR = "multi_modal_projector.linear_1.weight"
HUB_NAMES = [
    ("lm_head.weight", True, "language_model.lm_head.weight"),
    ("model.language_model.norm.weight", True, "language_model.model.norm.weight"),
    (f"model.vision_tower.{FC1}", True, f"vision_tower.vision_model.{FC1}"),
    (f"model.vision_tower.vision_model.{FC1}", True, f"vision_tower.vision_model.{FC1}"),
    ("model.vision_tower.patch_conv.weight", False, "vision_tower.patch_conv.weight"),
    (f"model.{LINEAR}", True, LINEAR),
    ("model.image_newline", True, "image_newline"),
]


@pytest.mark.parametrize(("name", "nested", "expected"), HUB_NAMES)
def test_hub_name(name, nested, expected):
    assert hub_name(name, nested_vision=nested) == expected


def test_what_belongs_to_our_format_stays_behind(cases):
    names = {file.name for file in cases["4 bits"].exported.path.iterdir()}
    assert "qvlm_report.json" not in names
    assert {
        "config.json",
        "tokenizer.json",
        "processor_config.json",
        "model.safetensors.index.json",
    } <= names


def test_equal_models_are_equal_files(cases, tmp_path):
    export(cases["4 bits"].path, tmp_path / "again", max_shard_size="60KB")
    for file in cases["4 bits"].exported.path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


REFUSED = [
    (W4 | {"rotation": "hadamard"}, "quantize with rotation=None"),
    ({"scheme": "W3A8"} | DYNAMIC, "no consumer runs W3A8"),
    (ROW_W8A8 | {"symmetric": False}, "W8A8 with one scale per row and zero points: quantize with"),
    (ROW_W8A8 | {"group_size": 32}, "no consumer runs W8A8 with a scale per 32 inputs"),
    (W4 | {"symmetric": False, "lm_head_bits": 8}, r"of \[4, 8\] bits with zero points cannot be"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_scheme_that_nobody_runs_is_refused_and_nothing_written(
    source, processor, tmp_path, fields, message
):
    config = QVLMConfig(**fields)
    model = load(source, quantization_config=config)
    save_quantized(model, processor, tmp_path / "qvlm", report=None)
    with pytest.raises(ValueError, match=message) as caught:
        export(tmp_path / "qvlm", tmp_path / "exported")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["qvlm"]


FAMILIES = [
    ("deepseek_vl", "siglip", "llama"),
    ("idefics3", "idefics3", "llama"),
    ("internvl", "internvl", "qwen2"),
    ("llava", "pixtral", "phi3"),
    ("llava_next", "clip", "mistral"),
    ("mistral3", "pixtral", "mistral"),
    ("paligemma", "siglip", "gemma"),
]


@pytest.mark.parametrize("parts", FAMILIES, ids="-".join)
def test_families_with_a_row_are_exported(parts, tmp_path):
    model = tiny_family(*parts)
    whole = parts[1] != "siglip"
    config = QVLMConfig(scheme="W4A16", symmetric=True, group_size=16, quantize_vision=whole)
    report = quantize_model(model, config)
    model.save_pretrained(tmp_path / "qvlm", max_shard_size="50KB")
    exported = export(tmp_path / "qvlm", tmp_path / "exported")
    assert exported.modules.keys() == report.modules.keys()
    again, info = load(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values()), info
    processor = tiny_family_processor(*parts[:2])
    inputs = collate(load_samples(tiny_messages(2)), processor).inputs
    with torch.no_grad():
        expected, found = (one.eval()(**inputs).logits for one in (model, again))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.1


def test_a_quantized_siglip_tower_is_exported_for_vllm_alone(tmp_path):
    config = QVLMConfig(scheme="W4A16", symmetric=True, group_size=16)
    for family in ("llava", "deepseek_vl"):
        model = tiny_family(family, "siglip")
        quantize_model(model, config)
        model.save_pretrained(tmp_path / family)
    assert export(tmp_path / "llava", tmp_path / "exported").modules
    with pytest.raises(ValueError, match=r"of a 'deepseek_vl' is quantized.*quantize_vision=False"):
        export(tmp_path / "deepseek_vl", tmp_path / "none")


def test_a_family_without_a_row_is_not_exported(tmp_path):
    model = tiny_model("hunyuan_vl")
    quantize_model(model, QVLMConfig(scheme="W4A16", symmetric=True, group_size=16))
    model.save_pretrained(tmp_path / "qvlm")
    message = "model_type 'hunyuan_vl' cannot be exported: it has no row"
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "qvlm", tmp_path / "exported")


def test_refusals_of_directories(cases, source, tmp_path):
    ours, other = cases["4 bits"], cases["W8A8"].exported.path
    for read, written, message, options in (
        (ours.path, tmp_path / "x", "format='gguf' must be one of comp", {"format": "gguf"}),
        (ours.path, ours.path, "is, or lies in, the model that is read", {"overwrite": True}),
        (ours.path, ours.path / "x", "is, or lies in, the model that is read", {"overwrite": True}),
        (source, tmp_path / "x", "is not quantized by qvlm_hf", {}),
        (ours.exported.path, tmp_path / "x", "is not quantized by qvlm_hf", {}),
        (tmp_path, tmp_path / "x", "holds no config", {}),
        (ours.path, other, "exists and is not empty", {}),
    ):
        with pytest.raises(ValueError, match=message):
            export(read, written, **options)
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_is_not_exported(cases, tmp_path):
    shutil.copytree(cases["4 bits"].path, tmp_path / "damaged")
    held = load_file(tmp_path / "damaged" / "model.safetensors")
    del held["language_model.model.layers.0.mlp.up_proj.weight_scale"]
    save_file(held, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj"):
        export(tmp_path / "damaged", tmp_path / "x")
    (tmp_path / "damaged" / "model.safetensors").unlink()
    (tmp_path / "damaged" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="is no shard index"):
        export(tmp_path / "damaged", tmp_path / "x")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (".weight_scale", torch.nan, "not finite and above 0"),
        (".weight_scale", 0, "not finite"),
        ("norm.weight", torch.nan, "holds NaN or infinity"),
    ],
)
def test_values_that_loading_refuses_are_not_exported(cases, tmp_path, part, value, message):
    shutil.copytree(cases["4 bits"].path, tmp_path / "damaged")
    held = load_file(tmp_path / "damaged" / "model.safetensors")
    held[next(name for name in held if name.endswith(part))].view(-1)[0] = value
    save_file(held, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "damaged", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_overwrite_replaces_an_earlier_export(cases, tmp_path):
    export(cases["4 bits"].path, tmp_path / "x")
    export(cases["W8A8"].path, tmp_path / "x", overwrite=True)
    assert (
        json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]["format"]
        == "int-quantized"
    )


def test_exports_of_other_programs_are_never_deleted(cases, tmp_path):
    export(cases["4 bits"].path, tmp_path / "x")
    (tmp_path / "x" / "qvlm_files.json").rename(tmp_path / "list")  # other programs write none
    with pytest.raises(ValueError, match="holds no earlier result of qvlm_hf that lists its files"):
        export(cases["W8A8"].path, tmp_path / "x", overwrite=True)
    (tmp_path / "list").rename(tmp_path / "x" / "qvlm_files.json")
    (tmp_path / "x" / "notes.txt").write_text("kept")
    message = r"holds notes\.txt, which no earlier result of qvlm_hf wrote"
    with pytest.raises(ValueError, match=message):
        export(cases["W8A8"].path, tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "notes.txt").read_text() == "kept"


def test_a_sharded_checkpoint_is_read(processor, tmp_path, cases):
    model = load(cases["4 bits"].path)
    save_quantized(model, processor, tmp_path / "shards", report=None, max_shard_size="60KB")
    again = export(tmp_path / "shards", tmp_path / "exported")
    expected = tensors(cases["4 bits"])
    assert all(
        torch.equal(tensor, expected.pop(name))
        for name, tensor in load_file(again.path / "model.safetensors").items()
    )
    assert not expected


def test_a_tied_head_stays_tied(make, inputs, tmp_path):
    source = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    case = make(source, QVLMConfig(**W4))
    assert case.exported.full_precision == ("lm_head",)
    with torch.no_grad():
        logits = load(case.exported.path)(**inputs).logits
    torch.testing.assert_close(logits, case.logits, rtol=0, atol=1e-3)


def tensors(case):
    files = sorted(case.exported.path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def quantization(case):
    return json.loads((case.exported.path / "config.json").read_text())["quantization_config"]
