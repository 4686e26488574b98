import json
import shutil

import pytest
import torch
from tiny_models import tiny_llava
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qvlm_hf import QVLMConfig
from qvlm_hf.hf.runtime.attention import ATTENTION, attend
from qvlm_hf.ops import attention as ops

load = AutoModelForImageTextToText.from_pretrained

ROUNDED = {"scheme": "W4A8", "activation_granularity": "dynamic_token"}


def tensors(heads=4, kv_heads=4, tokens=1, length=9, dtype=torch.bfloat16, size=16):
    torch.manual_seed(0)
    query = torch.randn(2, heads, tokens, size, dtype=dtype)
    key, value = (torch.randn(2, kv_heads, length, size, dtype=dtype) for _ in range(2))
    return query, key, value


def attention_module(groups=1):
    module = nn.Module()
    module.num_key_value_groups = groups
    return module


@pytest.mark.parametrize(
    "sizes", [{"tokens": 3}, {"tokens": 3, "kv_heads": 2}, {"dtype": torch.float32, "tokens": 2}]
)
def test_several_tokens_are_left_to_transformers(sizes):
    query, key, value = tensors(**sizes)
    module = attention_module(query.shape[1] // key.shape[1])
    ours, _ = attend(module, query, key, value, None, scaling=0.25, is_causal=True)
    theirs, _ = sdpa_attention_forward(
        module, query, key, value, None, scaling=0.25, is_causal=True
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_token_with_dropout_too(kv_heads):
    query, key, value = tensors(kv_heads=kv_heads)
    module = attention_module(4 // kv_heads)
    found = []
    for function in (attend, sdpa_attention_forward):
        torch.manual_seed(1)
        found.append(function(module, query, key, value, None, dropout=0.5, scaling=0.25)[0])
    assert torch.equal(*found)
    assert not torch.equal(found[0], attend(module, query, key, value, None, scaling=0.25)[0])


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_token_equals_that_of_transformers(mask, dtype):
    query, key, value = tensors(kv_heads=2, dtype=dtype, size=32)
    allowed = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    allowed[1, ..., :4] = False
    additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    argument = {None: None, "boolean": allowed, "additive": additive}[mask]
    with torch.no_grad():
        ours, weights = attend(attention_module(2), query, key, value, argument, scaling=0.3)
    theirs, _ = sdpa_attention_forward(
        attention_module(2), query, key, value, argument, scaling=0.3
    )
    assert weights is None
    assert ours.shape == (2, 1, 4, 32)
    torch.testing.assert_close(
        ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


def test_the_default_of_quantized_language_models_and_of_nothing_else(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "full")
    model = load(tmp_path / "full", quantization_config=QVLMConfig(**ROUNDED))
    assert model.config.text_config._attn_implementation == ATTENTION
    assert model.config.vision_config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "quantized")
    assert ATTENTION not in {
        value
        for key, value in json.loads((tmp_path / "quantized" / "config.json").read_text())[
            "text_config"
        ].items()
        if "attn" in key
    }
    loaded = load(tmp_path / "quantized")
    assert loaded.config.text_config._attn_implementation == ATTENTION
    loaded.set_attn_implementation("sdpa")
    assert loaded.config.text_config._attn_implementation == "sdpa"


def test_a_dequantized_model_attends_as_any_other(tmp_path):
    tiny_llava().save_pretrained(tmp_path)
    full = load(tmp_path)
    usual = full.config.text_config._attn_implementation
    for asked in (None, "eager"):
        options = {"quantization_config": QVLMConfig(**ROUNDED), "attn_implementation": asked}
        model = load(tmp_path, **options)
        assert model.dequantize().config.text_config._attn_implementation == (asked or usual)
        attention = model.model.language_model.layers[0].self_attn
        assert attention.config._attn_implementation == (asked or usual)


@pytest.mark.parametrize("asked", ["eager", "sdpa", {"text_config": "eager"}])
def test_what_the_user_asks_for_stays(tmp_path, asked):
    tiny_llava().save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=QVLMConfig(**ROUNDED), attn_implementation=asked)
    assert model.config.text_config._attn_implementation == (
        asked if isinstance(asked, str) else asked["text_config"]
    )


@pytest.fixture
def kernel_only(monkeypatch):
    """Forbids what the kernel leaves to PyTorch's operators; without a compiler there is no kernel."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")

    def refuse(*arguments):
        raise AssertionError("a call went past the kernel")

    assert ops.load() is None
    monkeypatch.setattr(ops, "attend_with_pytorch", refuse)


def wide(directory, kv_heads, dtype=torch.float32):
    """Heads of 32, the smallest of the kernel."""
    tiny_llava(text_hidden_size=128, key_value_heads=kv_heads).save_pretrained(directory)
    return load(directory, quantization_config=QVLMConfig(**ROUNDED), dtype=dtype)


BATCH = {  # left-padded: the second question is shorter
    "input_ids": torch.tensor([[1, 5, 6, 7, 8, 9], [3, 3, 3, 1, 9, 7]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_same_text_as_with_sdpa(tmp_path, kv_heads, cache, kernel_only):
    model = wide(tmp_path, kv_heads)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "disable_compile": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ours = model.generate(**BATCH, cache_implementation=cache, **options)
    model.set_attn_implementation({"text_config": "sdpa"})
    theirs = model.generate(**BATCH, cache_implementation=cache, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.sequences.shape[1] > 10
    torch.testing.assert_close(
        torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("heads", "dtype", "backend"),
    [
        *((2, dtype, "aot_eager") for dtype in (torch.float32, torch.bfloat16)),
        *(pytest.param(n, torch.float32, "inductor", marks=pytest.mark.slow) for n in (4, 2)),
    ],
)
def test_compiled_without_a_break_the_same_text_by_the_kernel(
    tmp_path, heads, dtype, backend, kernel_only
):
    model = wide(tmp_path, heads, dtype)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**BATCH, disable_compile=True, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    assert torch.equal(model.generate(**BATCH, disable_compile=True, **options), expected)
    torch._dynamo.reset()
