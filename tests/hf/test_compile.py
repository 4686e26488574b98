"""torch.compile over a whole quantized model, with and without an adapter: no graph break, the same
text, a static cache.
"""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText, CompileConfig, LlavaForConditionalGeneration

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.hf.runtime.compiling import round_as_eager

load = AutoModelForImageTextToText.from_pretrained

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
    config = QVLMConfig(
        scheme=scheme,
        activation_granularity=None if scheme.endswith("16") else "dynamic_token",
        lm_head_bits=8,
    )
    return load(directory, quantization_config=config, **options)


def text(model, **options):
    return model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("W4A8", torch.float32),
        ("W4A16", torch.bfloat16),
        pytest.param("W4A8", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("W4A16", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_one_graph_and_the_same_logits(directory, scheme, dtype):
    model = quantized(directory, scheme, dtype=dtype)
    with torch.no_grad():
        assert torch._dynamo.explain(model)(input_ids=IDS, use_cache=False).graph_break_count == 0
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(
            compiled(input_ids=IDS, use_cache=False).logits,
            model(input_ids=IDS, use_cache=False).logits,
        )


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.bfloat16, "aot_eager"),
        pytest.param(torch.float32, "aot_eager", marks=pytest.mark.slow),
        pytest.param(torch.float32, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_static_cache_gives_the_same_text_eager_and_compiled(directory, dtype, backend):
    model = quantized(directory, "W4A8", dtype=dtype)
    expected = text(model)
    assert torch.equal(text(model, cache_implementation="static"), expected)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    assert torch.equal(text(model, cache_implementation="static"), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_with_an_adapter_too(directory, dtype):
    base = text(quantized(directory, "W4A8", dtype=dtype))
    model = get_peft_model(
        quantized(directory, "W4A8", dtype=dtype), LoraConfig(r=4, target_modules="all-linear")
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(
            torch.compile(model, fullgraph=True, backend="aot_eager")(
                input_ids=IDS, use_cache=False
            ).logits,
            expected,
        )
    torch._dynamo.reset()
    expected = text(model)
    assert not torch.equal(expected, base)
    assert torch.equal(text(model, cache_implementation="static"), expected)
    inner = model.get_base_model()
    inner.forward = torch.compile(inner.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(text(model, cache_implementation="static"), expected)


def options_of(calls, model, **options):
    """What `generate` hands to torch.compile for a static cache, on hardware where it compiles."""
    text(model, cache_implementation="static", **options)
    return calls.pop() if calls else None


def test_generate_compiles_with_the_rounding_of_eager(directory, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: calls.append(options) or call)
    monkeypatch.setattr(
        LlavaForConditionalGeneration, "_valid_auto_compile_criteria", lambda *_: True
    )
    model = quantized(directory, "W4A16")
    ours = {"fullgraph": False, "dynamic": None, "backend": "inductor", "mode": None}
    ours["options"] = {"triton.cudagraphs": True, "emulate_precision_casts": True}
    assert options_of(calls, model) == ours
    asked = CompileConfig(mode="default", fullgraph=True)
    assert options_of(calls, model, compile_config=asked) == asked.to_dict()
    assert options_of(calls, copy.deepcopy(model)) == ours
    assert options_of(calls, pickle.loads(pickle.dumps(quantized(directory, "W4A16")))) == ours
    model.save_pretrained(tmp_path)
    assert "compile" not in (tmp_path / "generation_config.json").read_text()
    assert options_of(calls, load(tmp_path)) == ours
    in_memory = load(directory)
    assert options_of(calls, in_memory) == CompileConfig().to_dict()
    quantize_model(in_memory, QVLMConfig(scheme="W4A16"))
    del in_memory._compiled_call
    assert options_of(calls, in_memory) == ours
    plain = in_memory.dequantize()
    del plain._compiled_call
    assert options_of(calls, plain) == CompileConfig().to_dict()


@pytest.mark.parametrize("missing", ["backend", "hook"])
def test_other_backends_and_other_transformers_compile_as_they_did(missing):
    model = SimpleNamespace(
        **(
            {}
            if missing == "hook"
            else {"_default_compile_config": lambda: CompileConfig(backend="tpu")}
        )
    )
    before = dict(vars(model))
    round_as_eager(model)
    assert vars(model) == before


@pytest.mark.slow
def test_in_bfloat16_levels_flip_unless_the_compiler_rounds_where_eager_does(directory):
    model = quantized(directory, "W4A4", dtype=torch.bfloat16)
    kl = {}
    with torch.no_grad():
        eager = torch.log_softmax(model(input_ids=IDS, use_cache=False).logits.double(), -1)
        for name, config in (("ours", None), ("plain", CompileConfig())):
            torch._dynamo.reset()
            compiled = torch.log_softmax(
                model.get_compiled_call(config)(input_ids=IDS, use_cache=False).logits.double(), -1
            )
            kl[name] = (eager.exp() * (eager - compiled)).sum(-1).max()
    assert kl["ours"] < 1e-4 < kl["plain"]
