"""Hostile and damaged checkpoints (the table of the Hub page): every one a ValueError of one line that names the file or the tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

UP = "language_model.model.layers.0.mlp.up_proj"
FC = "vision_tower.encoder.layers.0.mlp.fc1"
Tensors = dict[str, torch.Tensor]


def load(path: Path, **options: Any) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(path, **options)


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def damaged(saved: dict, tmp_path: Path) -> Path:
    """A copy of a model with "token" and "channel" modules, to be damaged."""
    return Path(shutil.copytree(saved["paper", "float32"].path, tmp_path / "damaged"))


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def set_to(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(key, value(tensors[key]).contiguous())


def put(key: str, position: Any, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[key].__setitem__(position, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_to(f"{UP}.weight", lambda t: t.float()),
            rf"model.safetensors: {UP}.weight: is F32 \[104, 8\], must be I32 \[104, 8\]",
        ),
        (set_to(f"{UP}.weight", lambda t: t.long()), r"is I64 .* must be I32"),
        (set_to(f"{UP}.weight", lambda t: t[:, :4]), r"is I32 \[104, 4\], must be I32 \[104, 8\]"),
        (
            set_to(f"{UP}.weight_scale", lambda t: t.to(torch.int8)),
            r"weight_scale: is I8 .* must be BF16 \[104, 1\]",
        ),
        (set_to(f"{UP}.weight_scale", lambda t: t.float()), r"is F32 .* must be BF16"),
        (set_to(f"{UP}.weight_zero_point", lambda t: t.int()), r"is I32 .* must be U8"),
        (
            set_to(f"{UP}.input_scale", lambda t: t[:5]),
            r"input_scale: is F32 \[5\], must be F32 \[64\]",
        ),
        (
            set_to(f"{FC}.input_scale", lambda t: t[:5]),
            r"input_zero_point: is I32 \[17\], must be I32 \[5\]",
        ),
        (
            set_to(f"{FC}.input_scale", lambda t: torch.ones(2**20 + 1)),
            r"1048577 positions must be 1 to 1048576",
        ),
        (
            set_to(f"{FC}.bias", lambda t: t.int()),
            r"bias: is I32 \[88\], must be F32 or F16 or BF16 \[88\]",
        ),
        (
            lambda t: t.pop(f"{UP}.weight"),
            r"layers.0.mlp.up_proj.weight: is missing from the checkpoint",
        ),
        (lambda t: t.pop(f"{UP}.weight_scale"), r"up_proj.weight_scale: is missing"),
        (lambda t: t.pop(f"{UP}.weight_zero_point"), r"up_proj.weight_zero_point: is missing"),
        (lambda t: t.pop(f"{UP}.input_scale"), r"up_proj.input_scale: is missing"),
        (lambda t: t.pop(f"{FC}.input_zero_point"), r"fc1.input_zero_point: is missing"),
        (lambda t: t.pop(f"{FC}.bias"), r"fc1.bias: is missing"),
        (
            lambda t: t.__setitem__(f"{UP}.bias", torch.zeros(104)),
            r"up_proj.bias: has no place in a module with its scheme \(channel\)",
        ),
        (
            lambda t: t.pop("language_model.lm_head.weight"),
            r"1 tensors are missing, among them lm_head.weight",
        ),
        (
            lambda t: t.__setitem__("language_model.lm_head.weight_scale", torch.ones(2)),
            "a quantized module that config.json does not list",
        ),
        (
            put(f"{UP}.weight_scale", (0, 0), torch.nan),
            r"layers.0.mlp.up_proj.weight_scale: holds a value that is not finite and above 0",
        ),
        (
            put(f"{UP}.weight_scale", (3, 0), 0),
            r"weight_scale: holds a value that is not finite and above 0",
        ),
        (put(f"{UP}.input_scale", 1, -1), r"input_scale: holds a value that is not finite"),
        (put(f"{FC}.input_scale", 1, torch.inf), r"input_scale: holds a value that is not finite"),
        (
            put(f"{UP}.weight_zero_point", (1, 0), 16),
            r"weight_zero_point: holds a value outside 0 ... 15",
        ),
        (put(f"{UP}.input_zero_point", 1, -1), r"input_zero_point: holds a value outside 0 ... 15"),
        (put(f"{FC}.bias", 0, torch.nan), r"fc1.bias: holds NaN or infinity"),
        (
            put("language_model.lm_head.weight", (0, 0), torch.inf),
            r"lm_head.weight: holds NaN or infinity",
        ),
        (
            put("language_model.model.norm.weight", 0, torch.nan),
            r"norm.weight: holds NaN or infinity",
        ),
    ],
)
def test_damaged_tensors(damaged: Path, change: Callable[[Tensors], object], message: str) -> None:
    change_tensors(damaged, change)
    refused(damaged, message)


def test_mismatched_sizes_cannot_be_waved_through_and_offloading_hides_nothing(
    damaged: Path, tmp_path: Path
) -> None:
    change_tensors(damaged, put(f"{UP}.weight_scale", (0, 0), torch.nan))
    refused(
        damaged,
        "weight_scale: holds a value that is not finite",
        device_map={"": "disk"},
        offload_folder=tmp_path / "offload",
    )
    change_tensors(damaged, set_to(f"{UP}.weight", lambda t: t[:, :4]))
    refused(damaged, r"is I32 \[104, 4\]", ignore_mismatched_sizes=True)


def quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda config: change(config["quantization_config"])


MODULE = "model.language_model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            quantization(lambda q: q["modules"][MODULE].update(weight_bits=10**9)),
            rf"modules: {MODULE}: weight_bits=1000000000",
        ),
        (
            quantization(lambda q: q["modules"][MODULE].update(weight_bits="x")),
            r"weight_bits='x' must be",
        ),
        (
            quantization(lambda q: q["modules"][MODULE].update(weight_bits=8)),
            r"is I32 \[104, 8\], must be I32 \[104, 16\]",
        ),
        (
            quantization(lambda q: q["modules"][MODULE].update(input_transform={"hadamard": 128})),
            "a Hadamard block of 128 does not divide its 64",
        ),
        (
            quantization(lambda q: q["modules"][MODULE].update(granularity="dynamic_token")),
            "input_scale: has no place in a module",
        ),
        (
            quantization(lambda q: q["modules"][MODULE].update(symmetric=True)),
            "weight_zero_point: has no place",
        ),
        (
            quantization(lambda q: q["modules"].pop(MODULE)),
            "belongs to a quantized module that config.json does not list",
        ),
        (
            quantization(lambda q: q["modules"].update({"model.extra": q["modules"][MODULE]})),
            "lists 'model.extra', which the model does not have",
        ),
        (
            quantization(lambda q: q["modules"].update({"lm_head": q["modules"][MODULE]})),
            r"lm_head.weight_scale: is missing",
        ),
        (quantization(lambda q: q["modules"].clear()), "lists no modules"),
        (quantization(lambda q: q.update(scheme="W9A9")), "scheme='W9A9' is not"),
        (quantization(lambda q: q.update(load_fast=True)), r"unknown fields \['load_fast'\]"),
        (quantization(lambda q: q.update(format_version=2)), "upgrade qvlm_hf"),
        (
            lambda c: c["text_config"].update(num_hidden_layers=40),
            r"\d+ tensors are missing, among them model.language_model.layers.2",
        ),
    ],
)
def test_damaged_configuration(
    damaged: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_config(damaged, change)
    refused(damaged, message)


def test_files_that_are_no_safetensors(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    refused(
        damaged,
        r"model.safetensors: is no readable safetensors file \(.*\): download or quantize the model again",
    )
    weights.write_bytes(b"\xff" * 64)
    refused(damaged, "is no readable safetensors file")
    weights.unlink()
    torch.save({"a": torch.ones(1)}, damaged / "pytorch_model.bin")
    refused(damaged, "quantized weights must be safetensors, and no pickle is ever opened")
    with pytest.raises(ValueError, match="pass a directory or a Hub id, not a state_dict"):
        LlavaForConditionalGeneration.from_pretrained(
            None, config=AutoConfig.from_pretrained(damaged), state_dict={"a": torch.ones(1)}
        )


def test_a_shard_index_stays_in_its_directory(saved: dict, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved["searched", "float32"].path, tmp_path / "sharded"))
    index = path / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    first = min(original["weight_map"].values())
    for outside in (
        "../stolen.safetensors",
        str(tmp_path / "stolen.safetensors"),
        "sub/stolen.safetensors",
    ):
        (path / "sub").mkdir(exist_ok=True)
        shutil.copy(path / first, path / outside)
        moved = {
            key: outside if file == first else file for key, file in original["weight_map"].items()
        }
        index.write_text(json.dumps(original | {"weight_map": moved}))
        refused(
            path,
            "the shard index names files in other directories .*: do not trust this checkpoint",
        )
    everything = dict.fromkeys(original["weight_map"], "../stolen.safetensors")
    index.write_text(json.dumps(original | {"weight_map": everything}))
    refused(path, "names files in other directories")
    index.write_text(json.dumps(original))
    shutil.copy(path / first, path / "copy.safetensors")
    key = next(key for key, file in original["weight_map"].items() if file != first)
    index.write_text(
        json.dumps(original | {"weight_map": original["weight_map"] | {key: "copy.safetensors"}})
    )
    refused(path, r"the tensor is also in .*: the directory mixes two models")


def test_extra_tensors_are_only_reported(
    damaged: Path, saved: dict, inputs: dict, ask: Callable
) -> None:
    change_tensors(damaged, lambda tensors: tensors.__setitem__("unrelated", torch.ones(3)))
    model, info = load(damaged, output_loading_info=True)
    assert list(info["unexpected_keys"]) == ["unrelated"]
    assert torch.equal(ask(model, inputs)[0], saved["paper", "float32"].logits)
