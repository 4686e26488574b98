"""torch.compile over a whole quantized model, with and without an adapter: no graph break, the same text, a static cache."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig

IDS = torch.tensor([[1, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    tiny_llava().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantized(directory, scheme, **options):
    config = QVLMConfig(scheme=scheme, activation_granularity=None if scheme.endswith("16") else "dynamic_token", lm_head_bits=8)
    return AutoModelForImageTextToText.from_pretrained(directory, quantization_config=config, **options)


def text(model, **options):
    return model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("scheme", ["W4A8", "W4A16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_and_the_same_logits(directory, scheme, dtype):
    model = quantized(directory, scheme, dtype=dtype)
    with torch.no_grad():
        assert torch._dynamo.explain(model)(input_ids=IDS, use_cache=False).graph_break_count == 0
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(input_ids=IDS, use_cache=False).logits, model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_cache_gives_the_same_text_eager_and_compiled(directory, dtype):
    model = quantized(directory, "W4A8", dtype=dtype)
    expected = text(model)
    assert torch.equal(text(model, cache_implementation="static"), expected)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(text(model, cache_implementation="static"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_with_an_adapter_too(directory, dtype):
    base = text(quantized(directory, "W4A8", dtype=dtype))
    model = get_peft_model(quantized(directory, "W4A8", dtype=dtype), LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=IDS, use_cache=False).logits, expected)
    torch._dynamo.reset()
    expected = text(model)
    assert not torch.equal(expected, base)
    assert torch.equal(text(model, cache_implementation="static"), expected)
    inner = model.get_base_model()
    inner.forward = torch.compile(inner.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(text(model, cache_implementation="static"), expected)


@pytest.mark.slow
def test_the_default_compiler_gives_the_same_text_in_float32(directory):
    model = quantized(directory, "W4A8")
    expected = text(model)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(text(model, cache_implementation="static"), expected)


@pytest.mark.slow
def test_in_bfloat16_the_compiler_must_round_where_eager_does(directory):
    model = quantized(directory, "W4A8", dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, options={"emulate_precision_casts": True})
    with torch.no_grad():
        ours, eager = (torch.log_softmax(run(input_ids=IDS, use_cache=False).logits.float(), -1) for run in (compiled, model))
    assert (eager.exp() * (eager - ours)).sum(-1).max() < 1e-4
