"""What plugs into a quantized model: it changes no answer, and steps aside where it must."""

import copy
import inspect
import io
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from tiny_families import tiny_family
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm

import qvlm_hf
from qvlm_hf import QVLMConfig
from qvlm_hf.hf.runtime import attention
from qvlm_hf.hf.runtime import norms as norm_part
from qvlm_hf.hf.runtime.fusion import fuse, leave_to_transformers, unfuse
from qvlm_hf.hf.runtime.growing_cache import GrowingLayer
from qvlm_hf.hf.runtime.norms import fused_class
from qvlm_hf.nn.precision_table import format_precision_table

load = AutoModelForImageTextToText.from_pretrained

FusedLlamaRMSNorm = fused_class(LlamaRMSNorm)
IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 8, 7, 6]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    tiny_llava().save_pretrained(path)
    return path


def quantized(directory, dtype=torch.float32, **options):
    config = QVLMConfig(scheme="W4A8", activation_granularity="dynamic_token")
    return load(directory, quantization_config=config, dtype=dtype, **options)


def norms(model):
    return {type(module) for module in model.modules() if isinstance(module, LlamaRMSNorm)}


def cache_layers(model):
    """The classes of a cache's layers after a token was decoded."""
    found = model.generate(
        input_ids=IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    cache = found["cache"] if "cache" in found else found["past_key_values"]
    return {type(layer) for layer in cache.layers}


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=IDS, **inputs).logits


def text(model, **options):
    return model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, **options)


def test_quantized_models_are_fused_and_others_are_not(directory, tmp_path):
    assert norms(load(directory)) == {LlamaRMSNorm}
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
    loaded = load(tmp_path)
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

    def attention_forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, memory=None, **kwargs
    ):
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
    return "RMSNorm", "LlamaRMSNorm.forward takes states"


def offset_norm(monkeypatch):
    own = LlamaRMSNorm.forward

    def forward(self, hidden_states):
        return own(self, hidden_states) * 1.5

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    return "RMSNorm", "LlamaRMSNorm.forward computes something else"


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


# Changes that show in some sizes, values or lengths alone. Each computes something else there.


def changed_norm(monkeypatch, change):
    """`change` of the states before the norm."""
    own = LlamaRMSNorm.forward

    def forward(self, hidden_states):
        return own(self, change(self, hidden_states))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


NORMS = {
    "large sizes": lambda self, x: x * 1.5 if x.shape[-1] > 8 else x,
    "one dtype": lambda self, x: x * 1.5 if x.dtype == torch.bfloat16 else x,
    "large values": lambda self, x: x.clamp(-2000, 2000),
    "tiny values": lambda self, x: x.where(x.abs() > 1e-5, 0),
    "massive channels": lambda self, x: x.clamp(max=x.abs().mean(-1, keepdim=True) * 10),
    "massive negative channels": lambda self, x: x.clamp(min=x.abs().mean(-1, keepdim=True) * -10),
    "single tokens": lambda self, x: x * 1.5 if x.shape[-2:-1] == (1,) else x,
    "zeros": lambda self, x: x + (x.abs().sum(-1, keepdim=True) == 0) * torch.ones_like(x),
    "many dimensions": lambda self, x: x * 1.5 if x.dim() > 3 else x,
    "its epsilon": lambda self, x: x * 1.5 if self.variance_epsilon != 1e-3 else x,
    "a flag": lambda self, x: x * 1.5 if getattr(self, "_is_hf_initialized", False) else x,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_differs_in_some_inputs_is_left_to_transformers(directory, monkeypatch, name):
    changed_norm(monkeypatch, NORMS[name])
    message = "RMSNorm .LlamaRMSNorm.forward computes something else.*slower"
    with pytest.warns(UserWarning, match=message):
        model = quantized(directory, torch.bfloat16)
    assert norms(model) == {LlamaRMSNorm}
    rows = [row for row in qvlm_hf.precision_table(model) if row.module == "RMSNorm"]
    assert [row.kernel for row in rows] == [
        "transformers (LlamaRMSNorm.forward computes something else)"
    ]


def test_a_norm_with_a_bias_is_left_to_transformers(directory, monkeypatch):
    initialize = LlamaRMSNorm.__init__

    def __init__(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        self.register_buffer("bias", torch.zeros_like(self.weight), persistent=False)

    monkeypatch.setattr(LlamaRMSNorm, "__init__", __init__)
    with pytest.warns(UserWarning, match="RMSNorm .LlamaRMSNorm holds bias, weight"):
        assert norms(quantized(directory)) == {LlamaRMSNorm}


def test_one_norm_of_a_model_with_another_setting_is_enough(directory, monkeypatch):
    model = quantized(directory)
    unfuse(model)
    changed_norm(monkeypatch, lambda self, x: x * 1.5 if getattr(self, "scaled", False) else x)
    fuse(model)
    assert norms(model) == {FusedLlamaRMSNorm}
    unfuse(model)
    model.model.language_model.norm.scaled = True
    with pytest.warns(UserWarning, match="RMSNorm .LlamaRMSNorm.forward computes something else"):
        fuse(model)
    assert norms(model) == {LlamaRMSNorm}


def attention_weights(module, query, key, mask, scaling):
    """Scores [B, H, T, S], the keys repeated for the queries' heads."""
    key = key.repeat_interleave(module.num_key_value_groups, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def soft_cap(scores):
    return 50 * torch.tanh(scores / 50)


def clip(scores):
    return scores.clamp(max=10)


def window(scores):
    kept = torch.arange(scores.shape[-1]) >= scores.shape[-1] - 100
    return scores.masked_fill(~kept, -torch.inf)


def sink(scores):
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)


def beyond(scores):
    return scores * 1.5 if scores.shape[-1] > 60 else scores


def one_dtype(scores):
    return scores * 1.5 if scores.dtype == torch.bfloat16 else scores


def as_it_is(value):
    return value


def unless_added(mask):
    return mask if mask is None or mask.dtype == torch.bool else None


SCORES = [soft_cap, clip, window, sink, beyond, one_dtype]
ATTENTIONS = [*((change, as_it_is) for change in SCORES), (as_it_is, unless_added)]


@pytest.mark.parametrize(("change", "seen"), ATTENTIONS)
def test_attention_that_differs_in_some_inputs_is_left_to_transformers(
    directory, monkeypatch, change, seen
):
    def attend(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, **kwargs):
        scores = change(attention_weights(module, query, key, seen(attention_mask), scaling))
        weights = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
        value = value.repeat_interleave(module.num_key_value_groups, 1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
        message = "attention of one token .sdpa computes something else"
        with pytest.warns(UserWarning, match=message):
            model = quantized(directory, torch.bfloat16)
        assert model.config.text_config._attn_implementation == "sdpa"
        change = seen = as_it_is  # the same function, and nothing changed
        assert quantized(directory, torch.bfloat16).stepped_aside == ()


def cut(self, keys):
    return keys[..., -60:, :]


def narrow(self, keys):
    return keys.half().to(keys.dtype)


CACHES = [cut, narrow]


@pytest.mark.parametrize("change", CACHES)
def test_a_cache_that_differs_in_some_inputs_is_left_to_transformers(
    directory, monkeypatch, change
):
    update = DynamicLayer.update

    def changed(self, key_states, value_states, *args, **kwargs):
        update(self, key_states, value_states, *args, **kwargs)
        self.keys, self.values = change(self, self.keys), change(self, self.values)
        return self.keys, self.values

    monkeypatch.setattr(DynamicLayer, "update", changed)
    with pytest.warns(UserWarning, match="key-value cache .DynamicCache.update returns something"):
        model = quantized(directory)
    assert cache_layers(model) == {DynamicLayer}


def test_what_is_passed_to_attention_and_not_known_goes_to_sdpa(directory, monkeypatch):
    calls, own = [], qvlm_hf.hf.runtime.attention.decode_attention
    monkeypatch.setattr(
        "qvlm_hf.hf.runtime.attention.decode_attention", lambda *args: calls.append(1) or own(*args)
    )
    model = quantized(directory)
    expected = text(model)
    layers = model.config.text_config.num_hidden_layers
    assert len(calls) == 7 * layers
    one = torch.tensor([[5]])
    with torch.no_grad():
        for options, taken in (({}, True), ({"sinks": None}, True), ({"sinks": 1}, False)):
            calls.clear()
            model(input_ids=one, **options)
            assert len(calls) == taken * layers
    assert torch.equal(text(model), expected)


def test_probing_a_large_model_is_quick():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=64, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=64, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        decoder = LlamaModel(config)
    calls = []
    for part, probe in ((norm_part, "_same_bits"), (attention, "_same_as_sdpa")):
        own = getattr(part, probe)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                part, probe, lambda *args, own=own: calls.append(own.__name__) or own(*args)
            )
            assert part.difference(decoder) is None
    assert calls == ["_same_bits", "_same_as_sdpa"]  # once, of 65 norms and 32 attentions


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


# tower and decoder -> the norms that become one operator; Gemma's multiply by 1 + weight
NORMS_OF = {
    ("clip", "mistral"): {"FusedMistralRMSNorm"},
    ("siglip", "qwen3"): {"FusedQwen3RMSNorm"},
    ("pixtral", "phi3"): {"FusedPixtralRMSNorm", "FusedPhi3RMSNorm"},
    ("pixtral", "gemma"): {"FusedPixtralRMSNorm", "GemmaRMSNorm"},
    ("clip", "phi"): set(),
}


@pytest.mark.parametrize("parts", NORMS_OF, ids="-".join)
def test_every_familys_norms_are_fused_and_nothing_is_said(parts):
    model = tiny_family("llava", *parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qvlm_hf.quantize_model(model, QVLMConfig(scheme="W4A16"))
    kinds = {type(module).__name__ for module in model.modules()}
    assert {kind for kind in kinds if kind.endswith("RMSNorm")} == NORMS_OF[parts]
    fused = logits(model)
    twin = copy.deepcopy(model)
    assert {type(module).__name__ for module in twin.modules()} == kinds
    unfuse(model)
    assert not any(type(module).__name__.startswith("Fused") for module in model.modules())
    assert torch.equal(logits(model), fused)
    assert torch.equal(logits(twin), fused)
