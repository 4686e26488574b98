"""Mixtures of experts, quantized: calibrated or while loading, saved, counted, dequantized."""

import copy
import json

import pytest
import torch
from tiny_families import OWN_DECODERS, tiny_family, tiny_family_processor
from tiny_models import tiny_messages
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, quantize_model, save_quantized
from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.samples import batches, load_samples
from qvlm_hf.calibration.search import ranges, segments
from qvlm_hf.cli import main
from qvlm_hf.format.files import tensor_headers, weight_files
from qvlm_hf.hub.saved import SavedModel
from qvlm_hf.models.experts import find_experts
from qvlm_hf.nn.footprint import count_parameters, footprint
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import quantized_modules

FAMILIES = ("llama4", "qwen3_vl_moe")
SAMPLES = 4
DYNAMIC = {"scheme": "W8A8", "activation_granularity": "dynamic_token", "group_size": 16}
QUICK = {
    "recipe": "fixed",
    "group_size": 16, "num_samples": SAMPLES, "batch_size": 2, "percentiles": (1.0,),
    "margins": (), "max_block_depth": 1, "guard": False, "token_importance": False,
}  # fmt: skip


def family(name, **options):
    return tiny_family(name, name, name, **options)


def processor(name):
    return tiny_family_processor(name, name)


def calibration_data(name):
    return list(batches(load_samples(tiny_messages(SAMPLES)), processor(name), 2))


def logits(model, name):
    with torch.no_grad():
        return model(**calibration_data(name)[0].inputs, use_cache=False).logits


def quantized(name, model=None, **options):
    model = family(name) if model is None else model
    chosen = {"scheme": "W4A4", **QUICK, **options}
    data = {"dataset": tiny_messages(SAMPLES), "processor": processor(name)}
    return model, quantize_model(model, QVLMConfig(**chosen, **data))


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def calibrated(request):
    """Its name, the quantized model and the report; not to be changed."""
    return request.param, *quantized(request.param)


def test_the_report_counts_the_tokens_that_each_expert_got(calibrated):
    """Every token that is no padding goes to as many experts as the router chooses."""
    name, model, report = calibrated
    text = model.config.text_config
    tokens = sum(int(b.inputs["attention_mask"].sum()) for b in calibration_data(name))
    assert tokens < sum(b.inputs["attention_mask"].numel() for b in calibration_data(name))
    assert [routing.experts for routing in report.routing] == list(find_experts(model))
    for routing in report.routing:
        assert sum(routing.tokens) == tokens * text.num_experts_per_tok
        few = [e for e, seen in enumerate(routing.tokens) if seen < ranges._FEW_TOKENS]
        assert list(routing.few_tokens) == few
    assert CalibrationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_every_expert_is_quantized_and_counted(calibrated, tmp_path, capsys):
    name, model, report = calibrated
    for experts in find_experts(model).values():
        for projection in (experts.gate_up_proj, experts.down_proj):
            assert all(type(linear) is QVLMLinear for linear in projection)
    assert count_parameters(model) == sum(p.numel() for p in family(name).parameters())
    folder = save_quantized(model, None, tmp_path / "saved", report=report, max_shard_size="60KB")
    sizes = footprint(family(name), report.modules, dtype=torch.float32)
    files = weight_files(folder)
    assert len(files) > 1
    stored = sum(header.nbytes for file in files for header in tensor_headers(file))
    assert (
        stored
        == sizes.total.quantized_bytes
        == SavedModel(folder).sizes(torch.float32).total.quantized_bytes
    )
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    seen = [count for routing in report.routing for count in routing.tokens]
    few = sum(len(routing.few_tokens) for routing in report.routing)
    line = f"experts: each of {len(seen)} saw {min(seen)} to {max(seen)} tokens, {few} too few"
    assert line in shown
    card = (folder / "README.md").read_text()
    assert f"Each of {len(seen)} experts got {min(seen)} to {max(seen)} tokens" in card
    loaded = load(folder)
    assert torch.equal(logits(loaded, name), logits(model, name))
    assert not loaded.hf_quantizer.is_compileable


def test_experts_compute_what_transformers_does_with_dequantized_weights(calibrated):
    """Weights alone are quantized, so that nothing but the way of computing differs."""
    name = calibrated[0]
    model = family(name)
    quantize_model(model, QVLMConfig(scheme="W4A16", group_size=16))
    expected = logits(model, name)
    plain = copy.deepcopy(model).dequantize()
    if name != "llama4":
        plain.set_experts_implementation("eager")
    assert (logits(plain, name) - expected).abs().max() < 1e-4 * expected.abs().max()
    before, after = family(name).state_dict(), plain.state_dict()
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    experts = next(iter(find_experts(plain).values()))
    assert type(experts) is type(next(iter(find_experts(family(name)).values())))


def expert_inputs(model):
    """Projection of a layer -> the input scales of its experts."""
    found = {}
    for name, module in quantized_modules(model):
        if ".experts." in name:
            found.setdefault(name.rpartition(".")[0], []).append(module.input_scale)
    return found


def test_experts_that_saw_few_tokens_share_ranges_and_are_named(monkeypatch):
    """With so many experts some get no token at all."""
    text = OWN_DECODERS["qwen3_vl_moe"] | {"num_experts": 40}
    options = {"activation_granularity": "channel"}
    model, report = quantized("qwen3_vl_moe", family("qwen3_vl_moe", text_config=text), **options)
    assert all(0 in routing.tokens for routing in report.routing)
    scales = expert_inputs(model)
    for routing in report.routing:
        assert len(routing.few_tokens) > 30
        of_layer = scales[f"{routing.experts}.gate_up_proj"]
        shared = [of_layer[expert] for expert in routing.few_tokens]
        assert all(torch.equal(scale, shared[0]) for scale in shared)
    (warning,) = (each for each in report.warnings if "experts" in each)
    count = sum(len(routing.few_tokens) for routing in report.routing)
    assert warning.startswith(
        f"{count} of 80 experts saw too few tokens ({report.routing[0].experts}"
    )
    assert "\n" not in warning

    monkeypatch.setattr(ranges, "_FEW_TOKENS", 1)
    model, report = quantized("qwen3_vl_moe", **options)
    assert not any(routing.few_tokens for routing in report.routing)
    assert not any("experts" in each for each in report.warnings)
    for of_layer in expert_inputs(model).values():
        assert not any(torch.equal(scale, of_layer[0]) for scale in of_layer[1:])


def test_experts_of_a_stopped_calibration_come_back(monkeypatch, tmp_path):
    options = {"activation_granularity": "channel", "resume_dir": tmp_path}
    model, report = quantized("qwen3_vl_moe", **options)
    monkeypatch.setattr(segments, "initialize_sites", None)  # nothing is searched again
    again, same = quantized("qwen3_vl_moe", **options)
    assert same.routing == report.routing
    assert any(routing.few_tokens for routing in same.routing)
    first, second = model.state_dict(), again.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("weight_rounding", ["gptq", "nearest"])
def test_few_tokens_mean_plain_rounding(monkeypatch, weight_rounding):
    """With ranges of no calibration, plain rounding is what needs no data either."""
    name, scheme = "llama4", {"scheme": "W4A16"}
    monkeypatch.setattr(ranges, "_FEW_TOKENS", 10**6)
    model, report = quantized(name, **scheme, weight_rounding=weight_rounding, equalization=False)
    plain = family(name)
    quantize_model(plain, QVLMConfig(**scheme, group_size=16))
    packed, rounded = dict(quantized_modules(model)), dict(quantized_modules(plain))
    experts = [each for each in packed if ".experts." in each]
    assert experts
    for each in experts:
        assert torch.equal(packed[each].tensors["weight"], rounded[each].tensors["weight"])
    others = [each for each in packed if ".experts." not in each]
    same = [torch.equal(packed[n].tensors["weight"], rounded[n].tensors["weight"]) for n in others]
    assert all(same) == (weight_rounding == "nearest")
    assert report.routing[0].few_tokens == (0, 1, 2, 3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kept", [(), ("experts.down_proj",), ("experts",)], ids=str)
def test_rounded_while_loading(name, kept, tmp_path):
    """From the layout of the Hub, where that is another (qwen3_vl_moe: transposed)."""
    config = QVLMConfig(**DYNAMIC, modules_to_not_convert=list(kept) or None)
    model = family(name)
    model.save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full", quantization_config=config)
    report = quantize_model(model, config)
    assert loaded.hf_quantizer.report.modules == report.modules
    assert torch.equal(logits(loaded, name), logits(model, name))
    experts = next(iter(find_experts(loaded).values()))
    assert ("down_proj" in experts._parameters) == (kept == ("experts",))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), name), logits(model, name))


def test_broken_experts_are_named_and_nothing_is_changed(tmp_path):
    model = family("qwen3_vl_moe")
    experts, module = next(iter(find_experts(model).items()))
    with torch.no_grad():
        module.down_proj[3, 0, 0] = float("nan")
    before = dict(model.named_parameters())
    broken = f"^the weight of {experts}.down_proj.3 "
    with pytest.raises(ValueError, match=broken):
        quantized("qwen3_vl_moe", model)
    after = dict(model.named_parameters())
    assert [*after] == [*before]
    assert all(after[name] is parameter for name, parameter in before.items())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{experts}.down_proj.3: "):
        load(tmp_path, quantization_config=QVLMConfig(**DYNAMIC))
