"""Produce, save, reload in a fresh process: the same bits. Without the plugin: a loud failure."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from linear_calls import cpu_kernel
from safetensors import safe_open
from saved_models import KINDS
from tiny_models import save_tiny
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

import qvlm_hf
from qvlm_hf import CalibrationReport, QVLMConfig, QVLMLinear, quantize_model, save_quantized

load = AutoModelForImageTextToText.from_pretrained

TESTS = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16", "float16")


def fresh_process(script, *arguments):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    }
    command = [sys.executable, str(TESTS / "hf" / script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, saved, inputs):
    folder = tmp_path_factory.mktemp("fresh")
    torch.save(inputs, folder / "inputs.pt")
    fresh_process(
        "fresh_reload.py",
        folder / "inputs.pt",
        folder / "out.pt",
        *(saved[key].path for key in product(KINDS, DTYPES)),
    )
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_answers_bit_for_bit_the_same(saved, reloaded, kind, dtype):
    before, after = saved[kind, dtype], reloaded[str(saved[kind, dtype].path)]
    assert after["logits"].dtype == getattr(torch, dtype)
    assert torch.isfinite(before.logits).all()
    assert torch.equal(after["logits"], before.logits)
    assert torch.equal(after["tokens"], before.tokens)
    assert after["problems"] == {}
    assert after["report"] is None
    assert after["trainable"] == []
    # "rounded" has an 8-bit head, so nothing is left in full precision
    kernel = cpu_kernel().split()[0]
    assert after["rows"] == ({kernel} if kind == "rounded" else {kernel, "torch"})


def test_a_model_rounded_without_data_records_nothing_that_did_not_happen(saved):
    config = json.loads((saved["rounded", "float32"].path / "config.json").read_text())[
        "quantization_config"
    ]
    assert config["weight_rounding"] == "nearest"
    assert not any(
        config[field] for field in ("equalization", "token_importance", "guard", "optimize_vision")
    )


def test_a_pipeline_runs_on_a_saved_directory(reloaded):
    assert isinstance(reloaded["pipeline"], str)
    assert reloaded["pipeline"].strip()


def test_the_search_used_static_and_dynamic_ranges(saved):
    config = json.loads((saved["paper", "float32"].path / "config.json").read_text())[
        "quantization_config"
    ]
    assert {entry["granularity"] for entry in config["modules"].values()} >= {"token", "channel"}


def test_sharded_and_single_files_hold_what_they_should(saved, source):
    sharded, single = saved["searched", "float32"].path, saved["rounded", "float32"].path
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    with safe_open(source / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert (
        json.loads((sharded / "model.safetensors.index.json").read_text())["metadata"][
            "total_parameters"
        ]
        == count
    )
    assert [path.name for path in single.glob("*.safetensors")] == ["model.safetensors"]
    with safe_open(single / "model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "qvlm_format": "1",
            "total_parameters": str(count),
        }


def test_config_json_and_report_agree(saved):
    path = saved["searched", "bfloat16"].path
    config = json.loads((path / "config.json").read_text())
    report = CalibrationReport.from_dict(json.loads((path / "qvlm_report.json").read_text()))
    assert config["dtype"] == "bfloat16"
    assert QVLMConfig.from_dict(config["quantization_config"]).modules == report.modules
    assert config["quantization_config"]["provenance"] == report.provenance
    assert report.provenance["samples"] == 4
    assert not {"dataset", "processor", "callbacks", "strict"} & set(config["quantization_config"])


def test_without_the_plugin_loading_fails_at_every_width(tmp_path, source, hub_layout, saved):
    paths = [saved["searched", "float32"].path, saved["paper", "float16"].path]
    for bits in (2, 3, 4, 6, 8):
        origin = hub_layout if bits in (4, 8) else source
        model = load(origin, quantization_config=QVLMConfig(scheme=f"W{bits}A16"))
        model.save_pretrained(tmp_path / f"w{bits}")
        paths.append(tmp_path / f"w{bits}")
    outcomes = json.loads(fresh_process("fresh_without_plugin.py", *paths).splitlines()[-1])
    assert outcomes.pop("imported") is False
    assert len(outcomes) == 7
    assert all(outcome.startswith("RuntimeError") for outcome in outcomes.values()), outcomes


def test_the_key_layout_of_the_source_is_kept(tmp_path, hub_layout, source, inputs, ask):
    config = QVLMConfig(scheme="W4A16")
    model = load(hub_layout, quantization_config=config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight_scale" in keys
    assert (
        "model.vision_tower.encoder.layers.0.mlp.fc1"
        in model.hf_quantizer.quantization_config.modules
    )
    again = load(tmp_path)
    other = load(source, quantization_config=config)
    assert torch.equal(ask(again, inputs)[0], ask(model, inputs)[0])
    assert torch.equal(ask(other, inputs)[0], ask(model, inputs)[0])


def test_loading_can_cast_and_take_the_models_own_config_and_a_device_map(
    saved, tmp_path, inputs, ask
):
    path = saved["paper", "float32"].path
    model = load(path, dtype=torch.bfloat16)
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert (layer.weight_scale.dtype, layer.input_scale.dtype) == (torch.bfloat16, torch.float32)
    assert (
        model.lm_head.weight.dtype
        == model.model.multi_modal_projector.linear_1.bias.dtype
        == torch.bfloat16
    )
    same_config = load(path, config=model.config, dtype=torch.float32)
    mapped = load(path, device_map={"": "cpu"})
    offloaded = load(path, device_map={"": "disk"}, offload_folder=tmp_path)
    for other in (same_config, mapped, offloaded):
        assert torch.equal(ask(other, inputs)[0], saved["paper", "float32"].logits)
    with pytest.raises(ValueError, match="is offloaded: load the model without offloading"):
        offloaded.dequantize()
    mapped.to(torch.bfloat16)
    assert mapped.model.language_model.layers[0].mlp.up_proj.input_scale.dtype == torch.float32
    assert mapped.lm_head.weight.dtype == torch.bfloat16


def test_saving_again_keeps_every_byte(saved, tmp_path):
    for index in range(4):  # safetensors orders metadata at random: one file could be equal by luck
        first = saved["rounded", "float16"].path
        second = save_quantized(load(first), None, tmp_path / str(index), report=None)
        for name in ("model.safetensors", "config.json", "generation_config.json"):
            assert (second / name).read_bytes() == (first / name).read_bytes()


def test_the_base_model_alone_loads(saved, inputs):
    for kind in ("rounded", "paper"):
        path = saved[kind, "float32"].path
        base, whole = (AutoModel.from_pretrained(path), load(path))
        with torch.no_grad():
            assert torch.equal(
                base(**inputs).last_hidden_state, whole.model(**inputs).last_hidden_state
            )


def test_in_memory_and_on_load_give_the_same_model(source, saved, processor, inputs, ask, kinds):
    for kind in ("rounded", "searched"):
        model = load(source)
        config = kinds[kind](processor)
        report = quantize_model(model, config)
        assert model.hf_quantizer.report is report
        assert torch.equal(ask(model, inputs)[0], saved[kind, "float32"].logits)
        assert config.modules == {}
        stored = json.loads((saved[kind, "float32"].path / "qvlm_report.json").read_text())
        assert CalibrationReport.from_dict(stored) == report


def test_a_rotated_model_with_tied_embeddings_is_saved_untied(tmp_path, inputs, ask):
    source = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    full = load(source)
    model = load(source, quantization_config=QVLMConfig(scheme="W8A16", rotation="hadamard"))
    logits = ask(model, inputs)[0]
    assert (logits - ask(full, inputs)[0]).abs().max() < 0.1 * logits.std()
    save_quantized(model, None, tmp_path / "saved", report=None)
    again = load(tmp_path / "saved")
    assert torch.equal(ask(again, inputs)[0], logits)
    assert not again.config.tie_word_embeddings
    assert not torch.equal(again.lm_head.weight, again.model.language_model.embed_tokens.weight)


def test_dequantize_gives_an_ordinary_model(saved, tmp_path, inputs, ask, kinds):
    for kind in kinds:
        model = load(saved[kind, "float32"].path)
        model.dequantize()
        assert not any(isinstance(module, QVLMLinear) for module in model.modules())
        assert not hasattr(model, "hf_quantizer")
        logits = ask(model, inputs)[0]
        # weight-only: the float model with the same weights differs by the order of sums alone
        if "rounded" in kind:
            torch.testing.assert_close(logits, saved[kind, "float32"].logits, rtol=1e-3, atol=1e-3)
        model.save_pretrained(tmp_path / kind)
        assert "quantization_config" not in json.loads(
            (tmp_path / kind / "config.json").read_text()
        )
        plain = load(tmp_path / kind)
        assert torch.equal(ask(plain, inputs)[0], logits)
    outcomes = json.loads(
        fresh_process("fresh_without_plugin.py", *(tmp_path / kind for kind in kinds)).splitlines()[
            -1
        ]
    )
    assert outcomes.pop("imported") is False
    assert set(outcomes.values()) == {"loaded"}, outcomes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_takes_a_dtype(saved, dtype):
    model = load(saved["paper", "float32"].path)
    model.dequantize(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_precision_table_and_backends(saved):
    model = load(saved["paper", "bfloat16"].path)
    rows = {row.module: row for row in qvlm_hf.precision_table(model)}
    assert str(rows["lm_head"]) == "lm_head: W16A16 none (torch bfloat16)"
    assert rows["model.vision_tower.encoder.layers.0.mlp.fc1"].granularity == "token"
    assert len(rows) == 3 * 6 + 2 + 2 * 7 + 1
    text = qvlm_hf.format_precision_table(rows.values()).splitlines()
    assert text[0].split() == ["module", "weight_bits", "activation_bits", "granularity", "kernel"]
    assert len(text) == len(rows) + 1
    kernels = {}
    for name in ("reference", "auto"):
        qvlm_hf.set_backend(model, name)
        kernels[name] = {
            row.kernel for row in qvlm_hf.precision_table(model) if row.module != "lm_head"
        }
    assert kernels == {"reference": {"reference"}, "auto": {cpu_kernel()}}


@pytest.mark.parametrize("kind", ["rounded", "dynamic", "searched", "rotated", "paper"])
def test_kernels_and_reference_answer_alike(saved, inputs, kind):
    model = load(saved[kind, "float32"].path)
    logits = {}
    for name in ("auto", "reference"):
        qvlm_hf.set_backend(model, name)
        with torch.no_grad():
            logits[name] = model(**inputs).logits
    torch.testing.assert_close(
        logits["auto"],
        logits["reference"],
        rtol=1e-4,
        atol=1e-5 * float(logits["reference"].abs().max()),
    )
    assert torch.equal(logits["auto"].argmax(-1), logits["reference"].argmax(-1))
    message = "'triton' does not exist: this version has auto, reference"
    with pytest.raises(ValueError, match=message):
        qvlm_hf.set_backend(model, "triton")
    with pytest.raises(ValueError, match="nothing in this one is quantized"):
        qvlm_hf.set_backend(torch.nn.Linear(2, 2), "auto")


def test_the_processor_is_saved_with_the_model(saved):
    assert AutoProcessor.from_pretrained(saved["paper", "float16"].path).patch_size == 8
