"""Producing: what is refused before weights are read, what is passed on, what stays untouched."""

import copy
import importlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import save_tiny, tiny_llava, tiny_messages
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import qvlm_hf
from qvlm_hf import QVLMConfig, QVLMHfQuantizer, QVLMLinear, quantize_model
from qvlm_hf.calibration.options import SWITCHED_OFF
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.hf import config as config_module
from qvlm_hf.hf.round_on_load import planned_report
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.quantize import quantize_without_data

load = AutoModelForImageTextToText.from_pretrained

QUICK = {"recipe": "fixed", "num_samples": 3, "percentiles": (1.0,), "margins": ()}


MISTAKES = [
    (
        {},
        r"scheme='W4A4' has activation ranges to calibrate: give samples \(dataset='samples.jsonl'",
    ),
    ({"dataset": []}, r"dataset needs the model's processor: pass QVLMConfig\(..., processor=Auto"),
    ({"dataset": [], "processor": 1}, "dataset has no samples"),
    ({"dataset": [{"text": "?"}], "processor": 1}, r"dataset\[0\]"),
    ({"dataset": "none.jsonl", "processor": 1}, "none.jsonl: no such file"),
    ({"scheme": "W4A16", "modules_to_not_convert": ["vision"]}, "'vision' matches no module"),
    ({"dataset": tiny_messages(1), "processor": 1, "modules_to_not_convert": ["x.y"]}, "'x.y' mat"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES)
def test_mistakes_are_found_before_a_weight_is_read(no_weights, fields, message):
    config = QVLMConfig(**fields)
    with pytest.raises(ValueError, match=message) as caught:
        load(no_weights, quantization_config=config)
    assert "\n" not in str(caught.value)


def test_generators_lambdas_and_callbacks_survive_and_the_users_config_is_untouched(
    source, processor
):
    seen: list[tuple] = []

    class Callback:
        def on_step(self, name, done, total):
            seen.append((name, done, total))

        def on_calibration_end(self, model, report):
            seen.append((model, report))

    def samples():
        yield from tiny_messages(3)

    options = QUICK | {"dataset": samples(), "processor": processor, "max_block_depth": 1}
    config = QVLMConfig(scheme="W4A4", callbacks=[Callback()], **options)
    before = config.to_dict()
    model = load(source, quantization_config=config, device_map={"": "cpu"})
    assert config.to_dict() == before
    assert config.dataset is not None
    report = model.hf_quantizer.report
    assert seen[-1] == (model, report)
    assert seen[0][0] == "sensitivity"
    assert model.config.quantization_config is model.hf_quantizer.quantization_config
    assert model.config.quantization_config.modules == report.modules
    assert {name for name, _ in quantized_modules(model)} == set(report.modules)
    assert not any(trainable(model))
    # what belonged to the calibration is let go, so the model can be copied and its quantizer sent
    # to other processes
    assert model.hf_quantizer.quantization_config.dataset is None
    twin = copy.deepcopy(model)
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)
    for quantizer in (twin.hf_quantizer, pickle.loads(pickle.dumps(model.hf_quantizer))):
        assert quantizer.report == report
        assert quantizer.quantization_config == model.config.quantization_config


def trainable(model):
    return [
        parameter.requires_grad
        for _, one in quantized_modules(model)
        for parameter in one.parameters()
    ]


class Raising:
    """A callback that fails at one place."""

    def __init__(self, at):
        setattr(self, at, self.fail)

    def fail(self, *arguments):
        raise RuntimeError("no disk for my table")


def test_a_callback_that_fails_at_the_end_leaves_a_complete_quantized_model(processor, inputs, ask):
    told: list[object] = []
    late = SimpleNamespace(on_calibration_end=lambda model, report: told.append(report))
    options = QUICK | {"dataset": tiny_messages(3), "processor": processor}
    failing, plain = tiny_llava(), tiny_llava()
    with pytest.raises(RuntimeError, match="no disk for my table"):
        quantize_model(
            failing, QVLMConfig(**options, callbacks=[Raising("on_calibration_end"), late])
        )
    assert told == []
    report = quantize_model(plain, QVLMConfig(**options, callbacks=[late]))
    assert told == [report]
    # nothing tells them apart but the failure
    for field in ("is_quantized", "quantization_method"):
        assert getattr(failing, field) == getattr(plain, field)
    assert failing.hf_quantizer.report == report
    assert failing.config.to_dict() == plain.config.to_dict()
    for field in ("dataset", "processor", "callbacks"):
        found, wanted = failing.config.quantization_config, plain.config.quantization_config
        assert getattr(found, field) == getattr(wanted, field)
    assert not any(trainable(failing))
    assert torch.equal(ask(failing, inputs)[0], ask(plain, inputs)[0])
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(failing, QVLMConfig(scheme="W4A16"))


def test_a_callback_that_fails_on_the_way_leaves_the_model_as_it_was(processor):
    model, other = tiny_llava(), tiny_llava()
    config = QVLMConfig(
        recipe="fixed",
        dataset=tiny_messages(3),
        processor=processor,
        num_samples=3,
        callbacks=[Raising("on_step")],
    )
    with pytest.raises(RuntimeError, match="no disk for my table"):
        quantize_model(model, config)
    assert getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_calibrating_without_gradients_is_refused_before_a_weight_is_read(no_weights, processor):
    config = QVLMConfig(dataset=tiny_messages(1), processor=processor)
    with pytest.raises(ValueError, match="quantize outside of it"), torch.inference_mode():
        load(no_weights, quantization_config=config)


def test_the_same_through_a_concrete_class(source):
    config = QVLMConfig(scheme="W8A16")
    model = type(tiny_llava()).from_pretrained(source, quantization_config=config)
    assert config.modules == {}
    assert len(model.config.quantization_config.modules) == 34
    schemes = model.config.quantization_config.modules.values()
    assert {scheme.weight_bits for scheme in schemes} == {8}


def test_a_plain_dict_is_taken_too(source):
    model = load(source, quantization_config={"quant_method": "qvlm", "scheme": "W2A16"})
    assert model.model.language_model.layers[1].mlp.up_proj.scheme.weight_bits == 2


def test_a_configuration_beside_full_precision_weights_is_told_where_it_belongs(source):
    rounded = QVLMConfig(scheme="W4A16")
    asked = AutoConfig.from_pretrained(source)
    asked.quantization_config = rounded
    for config in (asked, load(source, quantization_config=rounded).config):
        with pytest.raises(
            ValueError, match=r"no packed weight: .*quantization_config=\)"
        ) as caught:
            load(source, config=config)
        assert "\n" not in str(caught.value)


def test_exclusions_and_the_head(source, tmp_path):
    config = QVLMConfig(
        scheme="W4A8",
        activation_granularity="dynamic_token",
        lm_head_bits=8,
        quantize_vision=False,
        modules_to_not_convert=["down_proj"],
    )
    model = load(source, quantization_config=config)
    modules = model.hf_quantizer.report.modules
    assert modules["lm_head"].weight_bits == 8
    assert not [name for name in modules if "vision_tower" in name or "down_proj" in name]
    assert model.hf_quantizer.report.full_precision[-1].endswith("down_proj")
    tied = save_tiny(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its weight with the embeddings"):
        load(tied, quantization_config=config)


def test_a_tied_model_round_trips(tmp_path, inputs, ask):
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    model = load(tied, quantization_config=QVLMConfig(scheme="W4A16"))
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(ask(again, inputs)[0], ask(model, inputs)[0])


@pytest.mark.parametrize("lm_head_bits", [None, 8])
def test_the_planned_report_is_the_one_that_rounding_gives(lm_head_bits):
    settings = CalibrationSettings(
        activation_bits=16,
        lm_head_bits=lm_head_bits,
        modules_to_not_convert=("fc1",),
        **SWITCHED_OFF,
    )
    model = tiny_llava()
    planned = planned_report(model, settings)
    assert planned == quantize_without_data(model, settings)


def test_rounding_without_data_rotates_nothing_that_it_was_not_asked_to():
    report = quantize_without_data(tiny_llava(), CalibrationSettings(activation_bits=16))
    assert (report.settings["recipe"], report.settings["rotation"]) == ("fixed", None)
    assert not any(scheme.hadamard for scheme in report.modules.values())


@pytest.mark.parametrize("scheme", ["W4A16", "W4A4"])
def test_a_shard_that_is_cut_short_is_named(tmp_path, processor, scheme):
    tiny_llava().save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    data = {"dataset": tiny_messages(3), "processor": processor} if scheme == "W4A4" else {}
    with pytest.raises(ValueError, match=rf"{shard.name}: is no readable safetensors file") as told:
        load(tmp_path, quantization_config=QVLMConfig(scheme=scheme, **data))
    assert "\n" not in str(told.value)


def test_a_weight_that_is_no_number_is_named(tmp_path):
    model = tiny_llava()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    message = r"model.language_model.layers.0.mlp.up_proj: the weight holds NaN or infinity"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, quantization_config=QVLMConfig(scheme="W4A16"))


def test_a_quantized_model_is_not_quantized_again():
    model, config = tiny_llava(), QVLMConfig(scheme="W4A16")
    quantize_model(model, config)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(model, config)


def test_disk_beside_a_gpu_and_tensor_parallelism_are_refused(source):
    with pytest.raises(ValueError, match="offloads to disk, where weights of a GPU cannot be"):
        load(
            source,
            quantization_config=QVLMConfig(scheme="W4A16"),
            device_map={"model": "disk", "lm_head": "cuda:0"},
        )
    quantizer = QVLMHfQuantizer(QVLMConfig(scheme="W4A16"))
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(tp_size=2)))
    with pytest.raises(ValueError, match="tp_size=2: qvlm models cannot be split"):
        quantizer.update_parallel_plan(model, {})
    model.config.distributed_config.tp_size = 1
    quantizer.update_parallel_plan(model, {})


def test_what_transformers_asks_for():
    rounding = QVLMHfQuantizer(QVLMConfig(scheme="W2A16"), pre_quantized=False)
    calibrating = QVLMHfQuantizer(
        QVLMConfig(scheme="W2A16", dataset=tiny_messages(1), processor=1), pre_quantized=False
    )
    loading = QVLMHfQuantizer(QVLMConfig(scheme="W2A16"), pre_quantized=True)
    sizes = [one.quantized_element_size for one in (rounding, calibrating, loading)]
    assert sizes == [0.25, None, None]
    assert rounding.is_serializable()
    assert rounding.is_trainable
    assert rounding.is_compileable
    assert rounding.update_dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype=int8 must be one of float32"):
        rounding.update_dtype(torch.int8)
    for _ in range(2):  # device_map="auto" asks twice; a generator would be empty the second time
        calibrating.validate_environment(device_map="auto")
    loading.validate_environment()


def test_importing_again_is_harmless():
    before = AUTO_QUANTIZATION_CONFIG_MAPPING["qvlm"]
    try:
        assert importlib.reload(qvlm_hf).QVLMConfig is before
        reloaded = importlib.reload(config_module)
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["qvlm"] is reloaded.QVLMConfig
    finally:
        AUTO_QUANTIZATION_CONFIG_MAPPING["qvlm"] = config_module.QVLMConfig = before
    assert AUTO_QUANTIZER_MAPPING["qvlm"] is QVLMHfQuantizer


def test_the_package_exports_what_it_says():
    assert sorted(qvlm_hf.__all__) == qvlm_hf.__all__
    assert all(hasattr(qvlm_hf, name) for name in qvlm_hf.__all__)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{qvlm_hf.__version__}"' in project


def test_a_tower_of_dead_layers_alone(processor):
    """The projector reads what enters its one layer: rounded, not searched."""
    model = tiny_llava(vision_layers=1)
    options = QUICK | {"dataset": tiny_messages(4), "processor": processor, "batch_size": 4}
    options["num_samples"] = 4
    report = quantize_model(model, QVLMConfig(scheme="W4A4", **options))
    assert report.dead == ("model.vision_tower.encoder.layers.0",)
    assert report.segments[0].blocks == ()
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in report.modules


HEADLESS = "^LlavaModel is the model without its output head: quantize the whole one, as AutoModelForImageTextToText loads it; "


def both_ways(processor):
    """Without data and with."""
    return QVLMConfig(scheme="W4A16"), QVLMConfig(
        recipe="fixed", dataset=tiny_messages(2), processor=processor, num_samples=2
    )


def test_a_model_without_its_head_is_told_from_another_version(source, processor, tmp_path):
    for config in both_ways(processor):
        for kind in (AutoModel, LlavaModel):
            with pytest.raises(ValueError, match=HEADLESS):
                kind.from_pretrained(source, quantization_config=config)
        with pytest.raises(ValueError, match=HEADLESS):
            quantize_model(tiny_llava().model, config)
    # and the remedy is one
    load(source, quantization_config=QVLMConfig(scheme="W4A16")).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is LlavaModel
    assert sum(isinstance(module, QVLMLinear) for module in model.modules()) == 34


def lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def prompt_tuning(model):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(model, config)


WRAPPERS = {
    "PeftModel": lora,
    "PeftModelForCausalLM": prompt_tuning,
    "DataParallel": torch.nn.DataParallel,
    "OptimizedModule": torch.compile,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_wrapped_around_a_model_is_named(processor, name):
    model = WRAPPERS[name](tiny_llava())
    message = f"^quantize_model takes a model of Transformers, not {name}: give the model inside"
    for config in both_ways(processor):
        with pytest.raises(ValueError, match=message):
            quantize_model(model, config)
    assert next(quantized_modules(model), None) is None


@pytest.mark.parametrize("thing", [None, "llava", {}, 3])
def test_what_is_no_model_at_all_is_named(thing):
    message = f"takes a model of Transformers, not {type(thing).__name__}"
    with pytest.raises(ValueError, match=message):
        quantize_model(thing, QVLMConfig(scheme="W4A16"))


def test_an_adapter_inside_the_model_is_named(processor):
    model = lora(tiny_llava())
    for config in both_ways(processor):
        message = r"q_proj carries a PEFT adapter: merge or unload the adapter, and quantize"
        with pytest.raises(ValueError, match=message):
            quantize_model(model.get_base_model(), config)
    assert len(quantize_model(model.unload(), QVLMConfig(scheme="W4A16")).modules) == 34


META = "has no values, it lies on the meta device: load the weights first, .*, then "


@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_meta_and_offloaded_are_told_apart(rotation):
    config = QVLMConfig(scheme="W4A16", rotation=rotation)
    with pytest.raises(ValueError, match=f"{META}quantize it"):
        quantize_model(tiny_llava().to("meta"), config)
    model = tiny_llava()
    cpu_offload(model)  # for a GPU
    for module in model.modules():
        for hook in getattr(getattr(module, "_hf_hook", None), "hooks", ()):
            hook.execution_device = "cuda:0"
        if hasattr(getattr(module, "_hf_hook", None), "execution_device"):
            module._hf_hook.execution_device = "cuda:0"
    with pytest.raises(ValueError, match=r"is offloaded: load the model without .*, then quantize"):
        quantize_model(model, config)
    model = tiny_llava()
    quantize_model(model, QVLMConfig(scheme="W4A16"))
    with pytest.raises(ValueError, match=f"{META}dequantize it"):
        model.to("meta").dequantize()


def test_quantize_model_takes_a_dict_of_fields():
    model = tiny_llava()
    report = quantize_model(model, {"scheme": "W3A16"})
    assert {scheme.weight_bits for scheme in report.modules.values()} == {3}
    assert model.config.quantization_config.scheme == "W3A16"
    message = r"^scheme='W4A4' has activation ranges to calibrate: give samples \(dataset="
    with pytest.raises(ValueError, match=message):
        quantize_model(tiny_llava(), {})
    with pytest.raises(ValueError, match=r"^QVLMConfig has no field 'bits': the fields are "):
        quantize_model(tiny_llava(), {"bits": 4})
    for config in (None, "W4A16"):
        message = f"^config={config!r} must be a QVLMConfig, or a dict of its fields"
        with pytest.raises(ValueError, match=message):
            quantize_model(tiny_llava(), config)


def test_a_weight_beyond_float16_is_told_from_a_broken_checkpoint(tmp_path, processor):
    model = tiny_llava()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "linear")
    model = tiny_llava()
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = 1e5
    model.save_pretrained(tmp_path / "norm")
    rounding, calibrating = both_ways(processor)
    wider = "load it in a wider dtype than float16"
    broken = f"holds NaN or infinity: repair the checkpoint, or {wider}, before"
    for path, config, message in (
        ("linear", rounding, f"up_proj: the weight {broken}"),
        ("linear", calibrating, f"the weight of .*up_proj {broken}"),
        ("norm", rounding, f"norm.weight: holds NaN or infinity: {wider}, or download"),
    ):
        options = {"dtype": torch.float16, "quantization_config": config}
        with pytest.raises(ValueError, match=message):
            load(tmp_path / path, **options)
    options = {"dtype": torch.bfloat16, "quantization_config": rounding}
    load(tmp_path / "norm", **options)


def test_what_was_compared_and_taken_is_recorded(processor):
    fixed = {"rotation": None, "activation_granularity": "channel", "max_block_depth": 1}
    model = tiny_llava().eval()
    quantize_model(
        model, QVLMConfig(recipe="auto", dataset=tiny_messages(6), processor=processor, **fixed)
    )
    trials = model.hf_quantizer.report.recipes
    assert {tuple(tried.fields) for tried in trials} == {
        ("rotation", "activation_granularity", *more) for more in ((), ("equalization",))
    }
    saved = model.config.quantization_config.to_dict()
    taken = {"recipe": "fixed", "equalization": True, "written_text": False} | trials[0].fields
    assert {name: saved[name] for name in taken | fixed} == taken | fixed
