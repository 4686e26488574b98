"""The check that a model decodes with its cache as without one: what passes, what does not."""

import dataclasses
import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_messages
from transformers import AutoModelForImageTextToText
from transformers.models.llama.modeling_llama import LlamaAttention

import qvlm_hf
from qvlm_hf import QVLMConfig
from qvlm_hf.calibration.record.report import CalibrationReport, DecodeCheck
from qvlm_hf.cli import main
from qvlm_hf.hf.runtime import decoding, growing_cache
from qvlm_hf.hf.runtime.decoding import check_decoding, decoding_problem, probe_inputs
from qvlm_hf.hf.runtime.growing_cache import GrowingLayer
from qvlm_hf.nn.linear import QVLMLinear

load = AutoModelForImageTextToText.from_pretrained

KINDS = ("rounded", "dynamic", "searched", "rotated", "paper")


def state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    schemes = {
        name: (module.scheme, list(module._parameters))
        for name, module in model.named_modules()
        if isinstance(module, QVLMLinear)
    }
    return {name: (id(t), t.data_ptr(), t.dtype) for name, t in tensors.items()}, schemes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sound_models_pass_and_stay_as_they_were(saved, processor, kind, dtype):
    model = load(saved[kind, dtype].path)
    before = state(model)
    check = check_decoding(model, probe_inputs(processor))
    assert state(model) == before
    assert check.tokens == 8
    assert abs(check.kl) < 1e-6
    assert decoding_problem(check) is None


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_rounded_meanwhile(saved, processor, monkeypatch, kind):
    """What is compared are the logits of the dequantized model."""
    model = load(saved[kind, "float32"].path)
    inputs, seen = probe_inputs(processor), []
    hook = model.register_forward_hook(lambda *args: seen.append(args[-1].logits))
    check_decoding(model, inputs)
    hook.remove()
    full = model.dequantize()
    with torch.no_grad():
        torch.testing.assert_close(
            seen[0][:, -1], full(**inputs).logits[:, -1], rtol=1e-3, atol=1e-3
        )


def forget(monkeypatch):
    """Attention that never uses its cache, as an argument of another name would make it."""
    own = LlamaAttention.forward
    name = "cache" if "cache" in inspect.signature(own).parameters else "past_key_values"

    def forward(self, *args, **kwargs):
        return own(self, *args, **(kwargs | {name: None}))

    forward.__signature__ = inspect.signature(own)
    monkeypatch.setattr(LlamaAttention, "forward", forward)


def test_an_attention_that_forgets_is_found(saved, processor, monkeypatch):
    model = load(saved["dynamic", "bfloat16"].path)
    forget(monkeypatch)
    check = check_decoding(model, probe_inputs(processor))
    assert check.kl > 0.01
    problem = decoding_problem(check)
    assert problem.startswith("with a key-value cache the model answers differently than without")
    assert f"torch {torch.__version__}" in problem
    assert "Transformers 5." in problem


def config(processor):
    return QVLMConfig(
        recipe="fixed",
        scheme="W4A4",
        dataset=tiny_messages(4),
        processor=processor,
        num_samples=4,
        batch_size=4,
    )


def quantize(source, processor):
    return load(source, quantization_config=config(processor))


def test_calibration_records_the_check(source, processor):
    model = quantize(source, processor)
    report = model.hf_quantizer.report
    assert report.decode_check.tokens == 8
    assert abs(report.decode_check.kl) < 1e-6
    entry = report.to_dict()
    assert CalibrationReport.from_dict(entry) == report
    del entry["decode_check"]  # as versions before this one wrote it
    assert CalibrationReport.from_dict(entry) == dataclasses.replace(report, decode_check=None)


def test_a_part_of_ours_that_fails_is_given_up(source, processor, monkeypatch):
    def lost(self, key_states, value_states, *args, **kwargs):
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    monkeypatch.setattr(GrowingLayer, "update", lost)
    monkeypatch.setattr(growing_cache, "difference", lambda model: None)
    with pytest.warns(UserWarning, match="which is slower"):
        model = quantize(source, processor)
    (warning,) = [w for w in model.hf_quantizer.report.warnings if "key-value cache" in w]
    rows = [row for row in qvlm_hf.precision_table(model) if row.kernel.startswith("transformers")]
    assert [row.module for row in rows] == ["RMSNorm", "key-value cache", "attention of one token"]
    assert all(warning in row.kernel for row in rows)
    inputs = probe_inputs(processor)
    assert decoding_problem(check_decoding(model, inputs)) is None


def test_what_fails_without_our_parts_is_an_error(source, processor, monkeypatch):
    forget(monkeypatch)
    with (
        pytest.warns(UserWarning, match="which is slower"),
        pytest.raises(RuntimeError, match="with a key-value cache the model answers differently"),
    ):
        quantize(source, processor)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("not enough memory")]
)
def test_a_check_that_cannot_run_loses_nothing(source, processor, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("qvlm_hf.hf.runtime.decoding.check_decoding", fails)
    report = quantize(source, processor).hf_quantizer.report
    assert report.decode_check is None
    assert any(f"was not checked ({type(error).__name__}: {error})" in w for w in report.warnings)


def test_a_model_that_fails_the_check_can_be_saved(source, processor, monkeypatch, tmp_path):
    model = load(source)
    with monkeypatch.context() as patched:
        forget(patched)
        with (
            pytest.warns(UserWarning, match="which is slower"),
            pytest.raises(RuntimeError, match="with a key-value cache"),
        ):
            qvlm_hf.quantize_model(model, config(processor))
    output = qvlm_hf.save_quantized(model, processor, tmp_path / "out", report=None)
    loaded = load(output)
    inputs = probe_inputs(processor)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


GENERATION = {
    "beams": {"num_beams": 3},
    "several texts": {"num_beams": 3, "num_return_sequences": 2},
    "stop strings": {"stop_strings": ["a"]},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "a time limit": {"max_time": 1e-6},
    "sampling": {"do_sample": True, "temperature": 5.0},
    "a static cache": {"cache_implementation": "static"},
    "a penalty": {"repetition_penalty": 2.0},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_the_models_own_way_to_generate_is_left_out(saved, processor, options):
    model = load(saved["dynamic", "bfloat16"].path)
    own = model.generation_config
    for name, value in options.items():
        setattr(own, name, value)
    check = check_decoding(model, probe_inputs(processor))
    assert check.tokens == 8
    assert abs(check.kl) < 1e-6
    assert model.generation_config is own


def test_dropout_is_off_meanwhile(saved, processor):
    model = load(saved["dynamic", "float32"].path)
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.attention_dropout = 0.3
    model.train()
    assert abs(check_decoding(model, probe_inputs(processor)).kl) < 1e-6
    assert all(module.training for module in model.modules())


def test_the_command(saved, monkeypatch, capsys):
    path = str(saved["searched", "bfloat16"].path)
    assert main(["check", path]) == 0
    out = capsys.readouterr().out
    assert out.startswith("loads with Transformers 5.")
    assert "8 tokens decoded with a key-value cache as without one" in out
    forget(monkeypatch)
    assert main(["check", path]) == 1
    assert "error: with a key-value cache the model answers differently" in capsys.readouterr().out


def test_the_command_on_what_it_was_not_made_for(saved, source, tmp_path, capsys):
    assert main(["check", str(source)]) == 0
    assert "note: nothing in this model is quantized" in capsys.readouterr().out
    assert main(["check", str(source), "--device", "cpu"]) == 1
    assert "are of vLLM: give --vllm" in capsys.readouterr().err
    folder = shutil.copytree(saved["rounded", "float32"].path, tmp_path / "model")
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"patch_size": 16}))
    assert main(["check", str(folder)]) == 1
    assert 'set "patch_size": 8 in the model' in capsys.readouterr().err


def test_offloaded_models_are_left_out(saved, processor, tmp_path):
    model = load(
        saved["dynamic", "float32"].path, device_map={"model": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path,
    )  # fmt: skip
    assert check_decoding(model, probe_inputs(processor)) is None


def test_the_threshold():
    assert decoding_problem(None) is None
    assert decoding_problem(DecodeCheck(tokens=8, kl=9e-4)) is None
    assert decoding_problem(DecodeCheck(tokens=8, kl=2e-3)) is not None


def test_no_token_is_decoded_that_stands_for_a_picture():
    config = SimpleNamespace(
        image_token_id=4, visual_indicator_token_ids=[7, 8], pad_token_id=None, image_token_index=-1,
        vocab_size=9,
    )  # fmt: skip
    assert decoding._special_tokens(config) == [4, 7, 8]
