import json

import pytest
import torch
from tiny_models import tiny_llava
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qvlm_hf import QVLMConfig
from qvlm_hf.integration.attention import ATTENTION, attend

ROUNDED = {"scheme": "W4A8", "activation_granularity": "dynamic_token"}


def tensors(heads=4, kv_heads=4, tokens=1, length=9, dtype=torch.bfloat16):
    torch.manual_seed(0)
    query = torch.randn(2, heads, tokens, 16, dtype=dtype)
    key, value = (torch.randn(2, kv_heads, length, 16, dtype=dtype) for _ in range(2))
    return query, key, value


def attention_module(groups=1):
    module = nn.Module()
    module.num_key_value_groups = groups
    return module


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_one_token_attends_to_what_it_should(mask, dtype, kv_heads):
    query, key, value = tensors(dtype=dtype, kv_heads=kv_heads)
    allowed = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    allowed[1, ..., :4] = False
    additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    argument = {None: None, "boolean": allowed, "additive": additive}[mask]
    ours, weights = attend(attention_module(4 // kv_heads), query, key, value, argument, scaling=0.3)
    key, value = (t.double().repeat_interleave(4 // kv_heads, 1) for t in (key, value))
    double = (query.double() @ key.transpose(-1, -2)) * 0.3
    if mask is not None:
        double = double.masked_fill(~allowed, -torch.inf)
    exact = (double.softmax(-1) @ value).transpose(1, 2)
    assert weights is None
    assert ours.shape == (2, 1, 4, 16)
    assert ours.dtype == dtype
    step = torch.finfo(dtype).eps
    assert (ours.double() - exact).abs().max() < 8 * step  # the scores are rounded to the dtype: |score| < 8


@pytest.mark.parametrize("sizes", [{"tokens": 3}, {"tokens": 3, "kv_heads": 2}, {"dtype": torch.float32}])
def test_everything_else_is_left_to_torch(sizes):
    query, key, value = tensors(**sizes)
    module = attention_module(query.shape[1] // key.shape[1])
    ours, _ = attend(module, query, key, value, None, scaling=0.25, is_causal=True)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.25, is_causal=True)
    assert torch.equal(ours, theirs)


def test_the_default_of_quantized_language_models_and_of_nothing_else(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "full")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "full", quantization_config=QVLMConfig(**ROUNDED))
    assert model.config.text_config._attn_implementation == ATTENTION
    assert model.config.vision_config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "quantized")
    assert ATTENTION not in {
        value for key, value in json.loads((tmp_path / "quantized" / "config.json").read_text())["text_config"].items() if "attn" in key
    }
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized")
    assert loaded.config.text_config._attn_implementation == ATTENTION
    loaded.set_attn_implementation("sdpa")
    assert loaded.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("asked", ["eager", "sdpa", {"text_config": "eager"}])
def test_what_the_user_asks_for_stays(tmp_path, asked):
    tiny_llava().save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=QVLMConfig(**ROUNDED), attn_implementation=asked)
    assert model.config.text_config._attn_implementation == (asked if isinstance(asked, str) else asked["text_config"])


def test_a_decoded_token_equals_that_of_eager_attention_bit_for_bit(tmp_path):
    tiny_llava().save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=QVLMConfig(**ROUNDED), dtype=torch.bfloat16)
    ids, logits = torch.tensor([[1, 5, 6, 7, 8]]), []
    for implementation in (ATTENTION, "eager"):
        with torch.no_grad():
            model.set_attn_implementation({"text_config": "sdpa"})
            past = model(input_ids=ids, use_cache=True).past_key_values
            model.set_attn_implementation({"text_config": implementation})
            logits.append(model(input_ids=torch.tensor([[9]]), past_key_values=past).logits)
    assert torch.equal(*logits)
