"""Damaged and hostile checkpoints: each a ValueError of one line that names the file or the tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_llava
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.core_model_loading import WeightRenaming

from qvlm_hf import QVLMConfig
from qvlm_hf.cli import main
from qvlm_hf.format.files import weight_files
from qvlm_hf.hf import checkpoint, key_names
from qvlm_hf.hub.saved import SavedModel

UP = "language_model.model.layers.0.mlp.up_proj"
FC = "vision_tower.encoder.layers.0.mlp.fc1"
HEAD = "language_model.lm_head"
INDEX = "model.safetensors.index.json"
Change = Callable[[Any], Any]


def load(path, **options):
    return AutoModelForImageTextToText.from_pretrained(path, **options)


def refused(path, message, **options):
    with pytest.raises(ValueError, match=message) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ask(folder, capsys):
    """The status of `qvlm ask`, and what it says on stderr."""
    picture = str(folder.parent / "0.png")
    Image.new("RGB", (8, 8)).save(picture)
    words = ["ask", str(folder), "what colour ?", "--image", picture, "--max-new-tokens", "1"]
    return main(words), capsys.readouterr().err


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a model with "token" and "channel" modules, to be damaged."""
    return Path(shutil.copytree(saved["paper", "float32"].path, tmp_path / "damaged"))


@pytest.fixture
def sharded(saved, tmp_path):
    """A copy of a model in several files, to be damaged."""
    return Path(shutil.copytree(saved["searched", "float32"].path, tmp_path / "sharded"))


def change_tensor(path, name, change):
    """Replaces a tensor by what `change` makes of it, or takes it out."""
    tensors = load_file(path / "model.safetensors")
    old = tensors.pop(name, None)
    if change is not None:
        tensors[name] = change(old).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def at(position, value):
    def change(tensor):
        tensor[position] = value
        return tensor

    return change


def new(*shape):
    return lambda old: torch.ones(shape)


POSITIVE = "holds a value that is not finite and above 0"
TENSORS = [
    (f"{UP}.weight", Tensor.float, r"model.safetensors: \S+: is F32 \[104, 8\], must be I32 \[104"),
    (f"{UP}.weight", Tensor.long, r"is I64 .* must be I32"),
    (f"{UP}.weight", lambda t: t[:, :4], r"is I32 \[104, 4\], must be I32 \[104, 8\]"),
    (f"{UP}.weight", None, r"layers.0.mlp.up_proj.weight: is missing from the checkpoint"),
    (f"{UP}.weight_scale", Tensor.char, r"weight_scale: is I8 .* must be BF16 \[104, 1\]"),
    (f"{UP}.weight_scale", Tensor.float, r"is F32 .* must be BF16"),
    (f"{UP}.weight_scale", None, r"up_proj.weight_scale: is missing"),
    (f"{UP}.weight_scale", at((0, 0), torch.nan), f"layers.0.mlp.up_proj.weight_scale: {POSITIVE}"),
    (f"{UP}.weight_scale", at((3, 0), 0), f"weight_scale: {POSITIVE}"),
    (f"{UP}.weight_zero_point", Tensor.int, r"is I32 .* must be U8"),
    (f"{UP}.weight_zero_point", None, r"up_proj.weight_zero_point: is missing"),
    (f"{UP}.weight_zero_point", at((1, 0), 16), r"zero_point: holds a value outside 0 ... 15"),
    (f"{UP}.input_scale", lambda t: t[:5], r"input_scale: is F32 \[5\], must be F32 \[64\]"),
    (f"{UP}.input_scale", None, r"up_proj.input_scale: is missing"),
    (f"{UP}.input_scale", at(1, -1), f"input_scale: {POSITIVE}"),
    (f"{UP}.input_zero_point", at(1, -1), r"input_zero_point: holds a value outside 0 ... 15"),
    (f"{UP}.bias", new(104), r"up_proj.bias: has no place in a module with its scheme \(channel\)"),
    (f"{FC}.input_scale", lambda t: t[:5], r"zero_point: is I32 \[17\], must be I32 \[5\]"),
    (f"{FC}.input_scale", new(), r"input_scale: is F32 \[\], must be F32 \[1\]"),
    (f"{FC}.input_scale", new(2**20 + 1), r"1048577 positions must be 1 to 1048576"),
    (f"{FC}.input_scale", at(1, torch.inf), f"input_scale: {POSITIVE}"),
    (f"{FC}.input_zero_point", None, r"fc1.input_zero_point: is missing"),
    (f"{FC}.bias", Tensor.int, r"bias: is I32 \[88\], must be F32 or F16 or BF16 \[88\]"),
    (f"{FC}.bias", None, r"fc1.bias: is missing"),
    (f"{FC}.bias", at(0, torch.nan), r"fc1.bias: holds NaN or infinity"),
    (f"{HEAD}.weight", None, r"1 tensors are missing, among them lm_head.weight"),
    (f"{HEAD}.weight", at((0, 0), torch.inf), r"lm_head.weight: holds NaN or infinity"),
    (f"{HEAD}.weight_scale", new(2), "a quantized module that config.json does not list"),
    ("language_model.model.norm.weight", at(0, torch.nan), r"norm.weight: holds NaN or infinity"),
]


@pytest.mark.parametrize(("name", "change", "message"), TENSORS)
def test_damaged_tensors(damaged, name, change, message):
    change_tensor(damaged, name, change)
    refused(damaged, message)


def test_a_key_that_a_rule_leads_astray_keeps_its_name(tmp_path, monkeypatch):
    """As in Transformers' loading."""
    rules = [WeightRenaming("^lm_head", "nowhere")]
    monkeypatch.setattr(key_names, "get_model_conversion_mapping", lambda model: rules)
    model = tiny_llava()
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    assert set(checkpoint.read_headers(model, [tmp_path / "a.safetensors"])) == {"lm_head.weight"}


def test_memory_that_loading_did_not_fill_is_refused(damaged):
    model = load(damaged)
    checkpoint.check_loaded(model)
    linear = model.get_submodule(MODULE)
    linear.weight_scale = torch.nn.Parameter(linear.weight_scale.clone(), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight_scale: is not in the checkpoint: downl"):
        checkpoint.check_loaded(model)


def test_no_option_waves_damage_through(damaged, tmp_path):
    change_tensor(damaged, f"{UP}.weight_scale", at((0, 0), torch.nan))
    offloaded = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    refused(damaged, f"weight_scale: {POSITIVE}", **offloaded)
    change_tensor(damaged, f"{UP}.weight", lambda t: t[:, :4])
    refused(damaged, r"is I32 \[104, 4\]", ignore_mismatched_sizes=True)


MODULE = "model.language_model.layers.0.mlp.up_proj"
ENTRIES = [  # of the module in config.json
    ({"weight_bits": 10**9}, rf"modules: {MODULE}: weight_bits=1000000000"),
    ({"weight_bits": "x"}, r"weight_bits='x' must be"),
    ({"weight_bits": 8}, r"is I32 \[104, 8\], must be I32 \[104, 16\]"),
    ({"input_transform": {"hadamard": 128}}, "a Hadamard block of 128 does not divide its 64"),
    ({"granularity": "dynamic_token"}, "input_scale: has no place in a module"),
    ({"symmetric": True}, "weight_zero_point: has no place"),
]
FIELDS = [  # of quantization_config
    (lambda q: q["modules"].pop(MODULE), "a quantized module that config.json does not list"),
    (lambda q: q["modules"].update({"model.x": q["modules"][MODULE]}), "lists 'model.x', which"),
    (lambda q: q["modules"].update({"lm_head": q["modules"][MODULE]}), "lm_head.*: is missing"),
    (lambda q: q["modules"].clear(), "lists no modules"),
    (lambda q: q.update(scheme="W9A9"), "scheme='W9A9' is not"),
    (lambda q: q.update(load_fast=True), r"unknown fields \['load_fast'\]"),
    (lambda q: q.update(format_version=2), "upgrade qvlm_hf"),
]


@pytest.mark.parametrize(("change", "message"), [*ENTRIES, *FIELDS])
def test_a_damaged_configuration(damaged, change, message):
    def damage(config):
        saved = config["quantization_config"]
        if callable(change):
            change(saved)
        else:
            saved["modules"][MODULE].update(change)

    change_json(damaged / "config.json", damage)
    refused(damaged, message)


def test_a_configuration_of_more_layers(damaged):
    more = lambda config: config["text_config"].update(num_hidden_layers=40)  # noqa: E731
    change_json(damaged / "config.json", more)
    refused(damaged, r"\d+ tensors are missing, among them model.language_model.layers.2")


def test_files_that_are_no_safetensors(damaged):
    weights = damaged / "model.safetensors"
    for content in (weights.read_bytes()[:-100], b"\xff" * 64):
        weights.write_bytes(content)
        refused(damaged, r"model.safetensors: is no readable safetensors file \(.*\): download or")
    weights.unlink()
    torch.save({"a": torch.ones(1)}, damaged / "pytorch_model.bin")
    refused(damaged, "quantized weights must be safetensors, and no pickle is ever opened")
    config = AutoConfig.from_pretrained(damaged)
    with pytest.raises(ValueError, match="pass a directory or a Hub id, not a state_dict"):
        LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict={})


def test_a_shard_index_stays_in_its_directory(sharded, tmp_path):
    files = json.loads((sharded / INDEX).read_text())["weight_map"]
    first = min(files.values())
    (sharded / "sub").mkdir()
    message = "the shard index names files in other directories .*: do not trust this checkpoint"
    for outside in ("../x.safetensors", f"{tmp_path}/x.safetensors", "sub/x.safetensors"):
        shutil.copy(sharded / first, sharded / outside)
        for moved in ([key for key in files if files[key] == first], files):  # some, all
            places = files | dict.fromkeys(moved, outside)
            change_json(sharded / INDEX, lambda index, to=places: index.update(weight_map=to))
            refused(sharded, message)
    shutil.copy(sharded / first, sharded / "copy.safetensors")
    places = files | {next(key for key in files if files[key] != first): "copy.safetensors"}
    change_json(sharded / INDEX, lambda index: index.update(weight_map=places))
    refused(sharded, r"the tensor is also in .*: the directory mixes two models")


def test_extra_tensors_are_only_reported(damaged, saved, inputs):
    change_tensor(damaged, "unrelated", new(3))
    model, info = load(damaged, output_loading_info=True)
    assert list(info["unexpected_keys"]) == ["unrelated"]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, saved["paper", "float32"].logits)


# What Transformers would report with a KeyError, or a page of tensor names


def test_a_damaged_index(sharded, capsys):
    (sharded / INDEX).write_text("{")
    found = refused(sharded, f"^{sharded / INDEX}: is no JSON: download or quantize the model")
    assert ask(sharded, capsys) == (1, f"qvlm: error: {found}\n")


def test_a_damaged_index_of_a_model_to_be_quantized(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    index = tmp_path / "model" / INDEX
    index.write_text(index.read_text()[:-20])
    refused(index.parent, "is no JSON", quantization_config=QVLMConfig(scheme="W4A16"))


def test_an_index_beside_the_single_file_is_not_read(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / INDEX).write_text("{")
    assert load(tmp_path, quantization_config=QVLMConfig(scheme="W4A16")).is_quantized


def test_a_whole_directory_passes(sharded):
    SavedModel(sharded).check_weights()
    assert len(weight_files(sharded)) > 1


def test_a_quantized_directory_without_weights(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors: download"):
        SavedModel(damaged).check_weights()
    tiny_llava().config.save_pretrained(damaged)
    SavedModel(damaged).check_weights()  # of another format: Transformers' business


@pytest.mark.parametrize("value", [None, {}, ...], ids=["null", "empty", "missing"])
def test_packed_weights_without_their_configuration(sharded, capsys, value):
    def configure(config):
        config["quantization_config"] = value
        if value is ...:
            del config["quantization_config"]

    change_json(sharded / "config.json", configure)
    status, said = ask(sharded, capsys)
    assert status == 1
    assert said.startswith(f"qvlm: error: {sharded}: its config.json has no quantization_config")
    assert ".weight_scale is of a quantized model: download or quantize the model again." in said


def test_null_is_harmless_in_a_full_precision_model(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", lambda c: c.update(quantization_config=None))
    assert ask(tmp_path / "model", capsys)[0] == 0
