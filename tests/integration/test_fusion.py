"""Fused norms and attention of a quantized model: whose class changes, what stays, and that nothing else does."""

import copy
import io

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

import qvlm_hf
from qvlm_hf import QVLMConfig
from qvlm_hf.integration import fusion
from qvlm_hf.integration.fusion import FusedLlamaAttention, FusedLlamaRMSNorm, fuse, unfuse

IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 8, 7, 6]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    tiny_llava().save_pretrained(path)
    return path


def quantized(directory, dtype=torch.float32, **options):
    config = QVLMConfig(scheme="W4A8", activation_granularity="dynamic_token")
    return AutoModelForImageTextToText.from_pretrained(directory, quantization_config=config, dtype=dtype, **options)


def classes(model):
    return {type(module) for module in model.modules() if isinstance(module, LlamaRMSNorm | LlamaAttention)}


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=IDS, **inputs).logits


def test_quantized_models_are_fused_and_others_are_not(directory, tmp_path):
    assert classes(AutoModelForImageTextToText.from_pretrained(directory)) == {LlamaRMSNorm, LlamaAttention}
    plain = tiny_llava()
    fuse(plain)
    assert classes(plain) == {LlamaRMSNorm, LlamaAttention}
    model = quantized(directory)
    names = set(model.state_dict())
    assert classes(model) == {FusedLlamaRMSNorm, FusedLlamaAttention}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert classes(loaded) == {FusedLlamaRMSNorm, FusedLlamaAttention}
    assert torch.equal(logits(loaded), logits(model))
    assert set(loaded.state_dict()) == names
    assert classes(model.dequantize()) == {LlamaRMSNorm, LlamaAttention}


@pytest.mark.parametrize("implementation", ["qvlm", "sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_same_text(directory, implementation, cache):
    model = quantized(directory, attn_implementation=implementation)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0  # padded on the left

    def text():
        return model.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True
        )

    fused = text()
    unfuse(model)
    assert torch.equal(text(), fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(directory, dtype):
    model = quantized(directory, dtype)
    fused = logits(model)
    unfuse(model)
    assert torch.equal(logits(model), fused)


@pytest.mark.parametrize("name", ["norm", "layers.0.input_layernorm", "layers.0.self_attn"])
def test_a_wrapped_forward_pass_outlives_the_class(directory, name):
    """accelerate keeps the bound method that it found; dequantize() must not pull the rug from under it."""
    model, plain = quantized(directory), quantized(directory).dequantize()
    add_hook_to_module(model.model.language_model.get_submodule(name), ModelHook())
    assert torch.equal(logits(model.dequantize()), logits(plain))


def test_attentions_and_hidden_states_can_be_asked_for(directory):
    model = quantized(directory, attn_implementation="eager")
    results = []
    for change in (fuse, unfuse):
        change(model)
        with torch.no_grad():
            results.append(model(input_ids=IDS, output_attentions=True, output_hidden_states=True))
    fused, plain = results
    assert len(fused.attentions) == len(plain.attentions) == model.config.text_config.num_hidden_layers
    for a, b in zip((*fused.attentions, *fused.hidden_states), (*plain.attentions, *plain.hidden_states), strict=True):
        assert torch.equal(a, b)


def test_gradients_go_the_plain_way(directory, monkeypatch):
    model = quantized(directory)
    monkeypatch.setattr(fusion, "rotary", None)  # a call would fail
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_the_reference_backend_fuses_nothing(directory, monkeypatch):
    model = quantized(directory)
    qvlm_hf.set_backend(model, "reference")
    monkeypatch.setattr(fusion, "rotary", None)
    monkeypatch.setattr("qvlm_hf.nn.fused.rms_norm", None)
    expected = logits(model)
    monkeypatch.undo()
    qvlm_hf.set_backend(model, "auto")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles_stay_fused(directory):
    model = quantized(directory)
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model.model.language_model.layers[0], file)
    file.seek(0)
    layer = torch.load(file, weights_only=False)
    assert classes(layer) == {FusedLlamaRMSNorm, FusedLlamaAttention}
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_what_somebody_else_put_on_a_norm_goes_first(directory):
    model = tiny_llava()
    norm = model.model.language_model.norm
    add_hook_to_module(norm, AlignDevicesHook(execution_device="cpu"))
    called = []
    hooked, norm.forward = norm.forward, lambda *args: called.append(1) or hooked(*args)
    qvlm_hf.quantize_model(model, QVLMConfig(scheme="W4A16"))
    logits(model)
    assert called == [1]


def test_a_subclass_is_left_alone(directory):
    class Own(LlamaRMSNorm):
        pass

    model = quantized(directory)
    model.model.language_model.norm.__class__ = Own
    fuse(model)
    assert type(model.model.language_model.norm) is Own
