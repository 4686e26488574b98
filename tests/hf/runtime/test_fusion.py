"""What plugs into a quantized model: it changes no answer, and steps aside where it must."""

import copy
import inspect
import io
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm

import qvlm_hf
from qvlm_hf import QVLMConfig
from qvlm_hf.hf.runtime.fusion import FusedLlamaRMSNorm, fuse, leave_to_transformers, unfuse
from qvlm_hf.hf.runtime.growing_cache import GrowingLayer
from qvlm_hf.nn.report import format_precision_table

IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 8, 7, 6]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    tiny_llava().save_pretrained(path)
    return path


def quantized(directory, dtype=torch.float32, **options):
    config = QVLMConfig(scheme="W4A8", activation_granularity="dynamic_token")
    return AutoModelForImageTextToText.from_pretrained(directory, quantization_config=config, dtype=dtype, **options)


def norms(model):
    return {type(module) for module in model.modules() if isinstance(module, LlamaRMSNorm)}


def cache_layers(model):
    """The classes of a cache's layers after a token was decoded."""
    found = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    cache = found["cache"] if "cache" in found else found["past_key_values"]
    return {type(layer) for layer in cache.layers}


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=IDS, **inputs).logits


def text(model, **options):
    return model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, **options)


def test_quantized_models_are_fused_and_others_are_not(directory, tmp_path):
    assert norms(AutoModelForImageTextToText.from_pretrained(directory)) == {LlamaRMSNorm}
    plain = tiny_llava()
    fuse(plain)
    assert norms(plain) == {LlamaRMSNorm}
    assert cache_layers(plain) == {DynamicLayer}
    model = quantized(directory)
    names = set(model.state_dict())
    for _ in range(2):
        assert norms(model) == {FusedLlamaRMSNorm}
        assert cache_layers(model) == {GrowingLayer}
        assert len(model.get_decoder()._forward_pre_hooks) == 1
        fuse(model)  # again: the same
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert norms(loaded) == {FusedLlamaRMSNorm}
    assert torch.equal(logits(loaded), logits(model))
    assert set(loaded.state_dict()) == names
    full = model.dequantize()
    assert norms(full) == {LlamaRMSNorm}
    assert cache_layers(full) == {DynamicLayer}
    assert not full.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize("implementation", ["qvlm", "sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_same_text(directory, implementation, cache):
    model = quantized(directory, attn_implementation=implementation)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0  # padded on the left
    options = {"attention_mask": mask, "cache_implementation": cache, "disable_compile": True}
    fused = text(model, **options)
    unfuse(model)
    assert torch.equal(text(model, **options), fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(directory, dtype):
    model = quantized(directory, dtype)
    fused = logits(model)
    unfuse(model)
    assert torch.equal(logits(model), fused)


@pytest.mark.parametrize("name", ["norm", "layers.0.input_layernorm", "layers.0.self_attn"])
def test_a_wrapped_forward_pass_outlives_the_class(directory, name):
    """accelerate keeps the bound method that it found; dequantize() must not break it."""
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
    layers = model.config.text_config.num_hidden_layers
    assert len(fused.attentions) == len(plain.attentions) == layers
    pairs = zip(
        (*fused.attentions, *fused.hidden_states),
        (*plain.attentions, *plain.hidden_states),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gradients_pass_the_norms(directory):
    model = quantized(directory)
    gradients = []
    for change in (fuse, unfuse):
        change(model)
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.sum().backward()
        gradients.append(embeddings.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_the_reference_backend_fuses_no_norm(directory, monkeypatch):
    model = quantized(directory)
    qvlm_hf.set_backend(model, "reference")
    monkeypatch.setattr("qvlm_hf.nn.fused.rms_norm", None)  # a call would fail
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
    assert norms(layer) == {FusedLlamaRMSNorm}
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    assert cache_layers(other) == {GrowingLayer}
    assert cache_layers(other.dequantize()) == {DynamicLayer}
    assert cache_layers(model) == {GrowingLayer}


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


# What a Transformers of tomorrow may do. Each replaces something, and the text must stay right.


def renamed_attention(monkeypatch):
    """The cache comes under another name, in the layer and in its attention."""
    layer, attention = LlamaDecoderLayer.forward, LlamaAttention.forward
    name = "cache" if "cache" in inspect.signature(attention).parameters else "past_key_values"

    def attention_forward(self, hidden_states, position_embeddings=None, attention_mask=None, memory=None, **kwargs):
        kwargs = {"position_embeddings": position_embeddings, name: memory} | kwargs
        return attention(self, hidden_states, attention_mask=attention_mask, **kwargs)

    class Renaming:
        """Stands for an attention while a layer calls it under the old name."""

        def __init__(self, module):
            self.module = module

        def __call__(self, **kwargs):
            return self.module(memory=kwargs.pop(name), **kwargs)

    def layer_forward(self, *args, **kwargs):
        module = self._modules.pop("self_attn")
        object.__setattr__(self, "self_attn", Renaming(module))
        try:
            return layer(self, *args, **kwargs)
        finally:
            object.__delattr__(self, "self_attn")
            self._modules["self_attn"] = module

    monkeypatch.setattr(LlamaAttention, "forward", attention_forward)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer_forward)
    return "attention of one token", "LlamaAttention.forward takes hidden_states"


def renamed_norm(monkeypatch):
    own = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, states: own(self, states))
    return "LlamaRMSNorm", "forward takes states"


def offset_norm(monkeypatch):
    own = LlamaRMSNorm.forward

    def forward(self, hidden_states):
        return own(self, hidden_states) * 1.5

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    return "LlamaRMSNorm", "forward computes something else"


def other_layers(monkeypatch):
    update = DynamicLayer.update

    def reversed_in_memory(self, key_states, value_states, *args, **kwargs):
        """Holds the newest position first, and hands out the usual order."""
        for part in ("keys", "values") if self.is_initialized else ():
            setattr(self, part, getattr(self, part).flip(-2))
        keys, values = update(self, key_states, value_states, *args, **kwargs)
        self.keys, self.values = keys.flip(-2), values.flip(-2)
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", reversed_in_memory)
    return "key-value cache", "DynamicLayer holds"


def other_sdpa(monkeypatch):
    """Attention means something else from now on, also where it is asked for by name."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, query, *args, **kwargs):
        return own(module, query * 0.3, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
    return "attention of one token", "sdpa computes something else"


CHANGES = [renamed_attention, renamed_norm, offset_norm, other_layers, other_sdpa]


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_is_not_as_known_is_left_to_transformers(directory, monkeypatch, change):
    part, reason = change(monkeypatch)
    with pytest.warns(UserWarning, match=f"{part} .*{reason}.*which is slower"):
        model = quantized(directory)
    rows = [row for row in qvlm_hf.precision_table(model) if row.module == part]
    assert len(rows) == 1
    assert rows[0].kernel.startswith(f"transformers ({reason}")
    assert rows[0].kernel in format_precision_table(rows)
    fused = text(model)
    assert torch.equal(fused, text(model, use_cache=False))
    with pytest.warns(UserWarning, match="for comparison"):
        leave_to_transformers(model, "for comparison")
    assert torch.equal(text(model), fused)
    assert change is not offset_norm or norms(model) == {LlamaRMSNorm}


def test_nothing_is_said_where_all_is_known(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantized(directory)
    assert model.stepped_aside == ()
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert len(qvlm_hf.precision_table(model)) == linears


def test_no_forward_pass_of_transformers_is_written_anew():
    """Of Transformers' classes of a model, the package derives from none but norms."""
    written = {
        kind.__name__
        for own in vars(modeling_llama).values()
        if inspect.isclass(own) and issubclass(own, torch.nn.Module)
        for kind in own.__subclasses__()
        if kind.__module__.startswith("qvlm_hf")
    }
    assert written == {"FusedLlamaRMSNorm"}
