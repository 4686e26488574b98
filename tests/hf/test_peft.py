"""PEFT as it comes: adapters on a quantized model train, save, reload and merge after dequantize();
what PEFT cannot do is loud.
"""

import copy
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import tiny_messages
from transformers import AutoModelForImageTextToText, PreTrainedModel, Trainer, TrainingArguments

import qvlm_hf.nn.siblings
from qvlm_hf import QVLMConfig, QVLMLinear, quantize_model, save_quantized
from qvlm_hf.calibration.samples import collate, load_samples

TESTS = Path(__file__).parents[1]
CONFIG = QVLMConfig(scheme="W4A8", activation_granularity="dynamic_token", group_size=32)
# Transformers 5.23 renamed it
CHECKPOINTING = "activation_checkpointing"
if not hasattr(PreTrainedModel, f"{CHECKPOINTING}_enable"):
    CHECKPOINTING = "gradient_checkpointing"
UNREAD = "vision_tower.encoder.layers.2."  # LLaVA reads the second-last layer of its vision tower


@pytest.fixture(scope="module")
def directory(tmp_path_factory, source, processor):
    """A quantized model with its processor."""
    path = tmp_path_factory.mktemp("quantized") / "tiny"
    model = AutoModelForImageTextToText.from_pretrained(source, quantization_config=CONFIG)
    return save_quantized(model, processor, path, report=model.hf_quantizer.report)


@pytest.fixture(scope="module")
def batch(processor):
    """Eight questions about eight pictures, with answers to learn."""
    made = collate(load_samples(tiny_messages(8)), processor)
    return made.inputs | {"labels": made.labels}


def load(directory, **options):
    return AutoModelForImageTextToText.from_pretrained(directory, **options)


def adapted(model, targets="all-linear", **options):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, **options))


def cast(batch, dtype):
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(gradients):
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def train(model, batch, steps=10):
    """The loss before each step, and after the last."""
    batch = cast(batch, model.dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return [*losses, model(**batch).loss.item()]


def logits(model, batch):
    with torch.no_grad():
        return model(**{name: batch[name] for name in batch if name != "labels"}).logits


def q_proj(model):
    """The quantized module, whether an adapter is on it or not."""
    module = model.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    return getattr(module, "base_layer", module)


@pytest.fixture(scope="module")
def trained(directory, batch, tmp_path_factory):
    """A trained adapter: the model, its directory and its answers."""
    model = adapted(load(directory))
    train(model, batch)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return model, path, logits(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_training_lowers_the_loss_and_changes_adapters_alone(directory, batch, targets, dtype):
    model = load(directory, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    tuned = adapted(model, targets)
    losses = train(tuned, batch)
    assert losses[-1] < 0.5 * losses[0]
    adapters = {name: p for name, p in tuned.named_parameters() if "lora_" in name}
    assert all(p.grad is None for name, p in tuned.named_parameters() if name not in adapters)
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        for name, p in adapters.items()
        if UNREAD not in name
    )
    after = tuned.unload().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_fresh_process_loads_the_adapter_in_three_ways(directory, batch, trained, tmp_path):
    _, path, expected = trained
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    torch.save(inputs, tmp_path / "inputs.pt")
    files = (tmp_path / "inputs.pt", tmp_path / "out.pt", directory, path)
    command = [sys.executable, *map(str, (TESTS / "hf" / "fresh_adapter.py", *files))]
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = torch.load(tmp_path / "out.pt")
    assert set(answers) == {"PeftModel", "load_adapter", "from_pretrained"}
    assert all(torch.equal(answer, expected) for answer in answers.values())
    assert not torch.equal(expected, logits(load(directory), batch))


def test_without_its_adapter_the_model_is_bit_for_bit_the_old_one(directory, batch):
    base = logits(load(directory), batch)
    model = adapted(load(directory))
    train(model, batch, steps=2)
    tuned = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), tuned)
    assert torch.equal(logits(model.unload(), batch), base)


def test_save_quantized_wants_the_model_without_its_adapter(directory, batch, trained, tmp_path):
    model = load(directory)
    model.load_adapter(trained[1])
    message = (
        "save_quantized saves no PEFT adapter: save it with its own save_pretrained, and unload"
    )
    for wrapped in (model, adapted(load(directory)), adapted(load(directory)).get_base_model()):
        with pytest.raises(ValueError, match=message):
            save_quantized(wrapped, None, tmp_path / "with", report=None)
        assert not list(tmp_path.iterdir())
    model = adapted(load(directory)).unload()
    again = load(save_quantized(model, None, tmp_path / "without", report=None))
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_modules_of_one_input_are_computed_together_except_where_a_gradient_is_wanted(
    directory, batch, monkeypatch
):
    calls, together = [], qvlm_hf.nn.siblings.linears
    monkeypatch.setattr(
        qvlm_hf.nn.siblings, "linears", lambda *args: calls.append(1) or together(*args)
    )

    def counted(run):
        calls.clear()
        run()
        return len(calls)

    model = load(directory)
    alone = counted(lambda: logits(model, batch))
    assert alone >= 4  # q/k/v and gate/up of two layers, and those of the vision tower
    model = adapted(model)
    assert counted(lambda: logits(model, batch)) == alone
    # with gradients only the first layer of the vision tower, whose input comes from frozen
    # weights, is left
    assert counted(lambda: train(model.train(), batch, steps=1)) == 1 + alone
    assert counted(lambda: logits(model, batch)) == alone
    model = model.unload()
    assert counted(lambda: logits(model, batch)) == alone


def test_computing_together_changes_no_gradient(directory, batch):
    gradients = []
    for dissolved in (False, True):
        model = adapted(load(directory))
        for module in model.modules():
            if dissolved and isinstance(module, QVLMLinear) and module.shared is not None:
                module.shared[0].dissolve()
        train(model, batch, steps=2)
        gradients.append(gradients_of(model))
    assert_equal(gradients)


def test_each_row_of_a_batch_may_have_its_own_adapter(directory, batch):
    model = adapted(load(directory))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    names = ["default", "other", "__base__", "other", "default", "__base__", "default", "other"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
    single = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        single[name] = logits(model, batch)
    with model.disable_adapter():
        single["__base__"] = logits(model, batch)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], single[name][row], rtol=1e-3, atol=1e-3)
    assert (single["default"] - single["other"]).abs().max() > 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(directory, batch, reentrant):
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = load(directory)
        runs.append([])
        model.model.language_model.layers[0].input_layernorm.register_forward_hook(
            lambda *_, seen=runs[-1]: seen.append(1)
        )
        if checkpointing:
            enable = getattr(model, f"{CHECKPOINTING}_enable")
            enable(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}})
        model.enable_input_require_grads()  # the reentrant kind sends gradients only to layers whose input has one
        model = adapted(model, r"model\.language_model\..*(q_proj|v_proj|down_proj)")
        train(model, batch, steps=2)
        gradients.append(gradients_of(model))
    # two steps and a look at the loss; two forward passes are repeated
    assert list(map(len, runs)) == [3, 5]
    assert_equal(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preparing_for_kbit_training_leaves_the_format_as_it_is(directory, batch, tmp_path, dtype):
    expected = logits(load(directory, dtype=torch.float32), batch)
    model = prepare_model_for_kbit_training(load(directory, dtype=dtype))
    assert q_proj(model).weight_scale.dtype == torch.float32  # PEFT's doing; kernels want bfloat16
    tuned = adapted(model)
    tuned.eval()
    assert q_proj(model).weight_scale.dtype == torch.bfloat16
    assert dtype != torch.float32 or torch.equal(logits(tuned, batch), expected)
    assert train(tuned, batch)[-1] < 0.5 * train(adapted(load(directory)), batch, steps=0)[0]
    model = prepare_model_for_kbit_training(tuned.unload())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), batch), logits(model.eval(), batch))


def test_the_trainer_trains_an_adapter_and_refuses_a_model_without_one(
    directory, batch, processor, tmp_path
):
    samples = load_samples(tiny_messages(8))

    def together(chosen):
        made = collate(chosen, processor)
        return made.inputs | {"labels": made.labels}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant",
        logging_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False, **{CHECKPOINTING: True},
    )  # fmt: skip
    model = load(directory)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(model=model, args=arguments, train_dataset=samples, data_collator=together)
    tuned = adapted(model)
    trainer = Trainer(model=tuned, args=arguments, train_dataset=samples, data_collator=together)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    assert torch.equal(logits(again, batch), logits(tuned.eval(), batch))


PACKED = (
    "^a quantized module's packed weight takes no arithmetic: call model.dequantize\\(\\) first\\.$"
)
UNTRAINABLE = (
    "^a quantized module's packed weight cannot be trained: train an adapter, or quantize without"
)
ATTENTION = r"model\.language_model\..*(q_proj|v_proj)"
MERGED = {  # reads the weight only to merge: adds to it, scales it, turns it
    "LoRA": LoraConfig(r=4),
    "IA3": IA3Config(feedforward_modules=[]),
    "OFT": OFTConfig(oft_block_size=8),
}


def with_adapter(model, config):
    """`config` on a copy of the model, with random adapter weights."""
    config = copy.deepcopy(config)
    config.target_modules = ATTENTION
    torch.manual_seed(0)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def weight_only(source, tmp_path_factory):
    """A model whose dequantized form gives the same numbers."""
    config = QVLMConfig(scheme="W8A16", group_size=32)
    path = tmp_path_factory.mktemp("weight-only")
    load(source, quantization_config=config).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", MERGED)
def test_merging_into_packed_weights_is_refused_and_changes_nothing(weight_only, batch, name):
    model = with_adapter(load(weight_only), MERGED[name])
    before, expected = copy.deepcopy(model.state_dict()), logits(model, batch)
    plain = load(weight_only)
    plain.dequantize()
    base = logits(plain, batch)
    plain = with_adapter(plain, MERGED[name])
    torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-3, atol=1e-3)
    assert (expected - base).abs().max() > 0.02  # the adapter does something
    for merge in (model.merge_adapter, model.merge_and_unload):
        for safe in (False, True):
            with pytest.raises(ValueError, match=PACKED):
                merge(safe_merge=safe)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert torch.equal(logits(model, batch), expected)
    model.dequantize()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-3, atol=1e-3)


# Every kind of adapter that PEFT has, as it is made without thinking. It works, or says our line.
OPTIONS = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "ADAPTION_PROMPT": {"target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ".*input_layernorm"},
    "OFT": {"oft_block_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"r": 4, "num_vectors": 8, "vector_length": 8},
    "WAVEFT": {"n_frequency": 16},
}
MATRIX = {kind.value: {} for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
INITS = ("gaussian", "eva", "olora", "pissa", "corda", "orthogonal", "pissa_niter_4", "mica")
MATRIX |= {f"LORA {name}": {"init_lora_weights": name} for name in (*INITS, "lora_ga")}
FLAGS = ("use_dora", "use_qalora", "use_rslora", "lora_bias")
MATRIX |= {f"LORA {name}": {name: True} for name in FLAGS}
BY_PARAMETER = {"target_modules": ["none"], "target_parameters": ["self_attn.q_proj.weight"]}
MATRIX["LORA target_parameters"] = BY_PARAMETER
MATRIX["MISS bat"] = {"r": 8, "init_weights": "bat"}
READS_WEIGHTS = {  # to begin with, or in each forward pass
    *("ADAMSS", "DEFT", "DELORA", "FROD", "HIRA", "HRA", "OSF", "PEANUT", "PSOFT", "SHIRA"),
    *("SUPERTUNING", "TINYLORA", "LORA corda", "LORA mica", "LORA olora", "LORA pissa"),
    *("LORA pissa_niter_4", "LORA target_parameters", "LORA use_dora", "MISS bat"),
}


def made(name):
    """A configuration, on the attention of the language model unless the kind wants something else."""
    kind, *_ = name.split()
    config = next(own for key, own in PEFT_TYPE_TO_CONFIG_MAPPING.items() if key.value == kind)
    usual = {"target_modules": ATTENTION, "num_virtual_tokens": 4, "num_tasks": 2}
    usual["task_type"] = "CAUSAL_LM"
    fields = {field.name for field in dataclasses.fields(config)}
    usual = {name: value for name, value in usual.items() if name in fields}
    return config(**(usual | OPTIONS.get(kind, {}) | MATRIX[name]))


def tried(model, name, batch):
    """What an adapter gives until an error: its logits, gradients and merged logits; and the error."""
    results = []
    try:
        torch.manual_seed(0)
        adapter = get_peft_model(model, made(name)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        results.append([logits(adapter, batch)])
        torch.manual_seed(2)
        adapter.train()
        adapter(**batch).loss.backward()
        results.append(list(gradients_of(adapter).values()))
        if hasattr(adapter.base_model, "merge_and_unload"):
            results.append([logits(adapter.eval().merge_and_unload(), batch)])
    except Exception as error:
        if len(results) == 2 and re.match(PACKED, str(error)):  # merging changed nothing
            assert torch.equal(logits(adapter, batch), results[0][0])
        return results, error
    return results, None


@pytest.fixture(scope="module")
def packed_and_plain(weight_only):
    """The same numbers twice, in packed weights and in float ones."""
    plain = load(weight_only)
    plain.dequantize()
    return load(weight_only), plain


@pytest.mark.filterwarnings("ignore")  # PEFT's, about what a configuration leaves open
@pytest.mark.parametrize("name", MATRIX)
def test_every_kind_of_adapter_works_or_says_what_to_do(packed_and_plain, batch, name):
    packed, plain = map(copy.deepcopy, packed_and_plain)
    base = logits(packed, batch)
    results, error = tried(packed, name, batch)
    expected, other = tried(plain, name, batch)
    for found, wanted in zip(results, expected, strict=False):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    if name == "GLORA":  # asks for the class nn.Linear and no other, in a line of its own
        assert isinstance(error, ValueError)
        assert "is not a plain torch.nn.Linear" in str(error)
    elif isinstance(error, ValueError) and re.match(PACKED, str(error)):
        assert name in READS_WEIGHTS or len(results) >= 2  # merging alone
    else:  # what PEFT says of the float model, or nothing
        assert (type(error), str(error)) == (type(other), str(other))
    if name in READS_WEIGHTS:
        assert not results
        assert re.match(PACKED, str(error))
        for module in packed.modules():  # the adapters that were made before the refusal
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        assert torch.equal(logits(packed, batch), base)


@pytest.mark.parametrize(
    "config", [LoHaConfig(r=4), LoKrConfig(r=4), LoraConfig(init_lora_weights="orthogonal")]
)
def test_what_reads_the_form_alone_is_saved_loaded_and_trained(directory, batch, tmp_path, config):
    config = copy.deepcopy(config)
    config.target_modules = ATTENTION
    torch.manual_seed(0)
    model = get_peft_model(load(directory, dtype=torch.bfloat16), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, batch, steps=20)
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(directory, dtype=torch.bfloat16), tmp_path)
    fed = cast(batch, torch.bfloat16)
    assert torch.equal(logits(again, fed), logits(model, fed))


def test_a_packed_projector_is_not_trained_and_a_float_one_is(directory, source, batch, tmp_path):
    options = {"targets": ["q_proj", "v_proj"], "modules_to_save": ["multi_modal_projector"]}
    with pytest.raises(ValueError, match=UNTRAINABLE):
        adapted(load(directory), **options)
    options_of_model = {"activation_granularity": "dynamic_token", "quantize_projector": False}
    config = QVLMConfig(scheme="W4A8", **options_of_model)
    load(source, quantization_config=config).save_pretrained(tmp_path / "model")
    model = adapted(load(tmp_path / "model"), **options)
    before = load(tmp_path / "model").model.multi_modal_projector.linear_1.weight
    losses = train(model, batch)
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(logits(again, batch), logits(model, batch))
    name = "base_model.model.model.multi_modal_projector.modules_to_save.default.linear_1"
    assert not torch.allclose(again.get_submodule(name).weight, before)


def test_a_packed_head_is_not_trained(source):
    model = load(source, quantization_config=QVLMConfig(scheme="W4A16", lm_head_bits=8))
    with pytest.raises(ValueError, match=UNTRAINABLE):
        adapted(model, ["q_proj"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8"])
def test_dequantize_then_merge(source, batch, tmp_path, scheme):
    granularity = None if scheme == "W4A16" else "dynamic_token"
    config = QVLMConfig(scheme=scheme, activation_granularity=granularity, group_size=32)
    model = adapted(load(source, quantization_config=config))
    train(model, batch)
    quantized = logits(model, batch)
    assert model.dequantize() is model.get_base_model()
    dequantized = logits(model, batch)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, QVLMLinear) for module in merged.modules())
    near = {"rtol": 1e-4, "atol": 1e-4 * dequantized.std().item()}
    torch.testing.assert_close(logits(merged, batch), dequantized, **near)
    # weight-only: the same weights in another order of sums; 8-bit activations: rounded inputs, 2 %
    # of the answers' spread
    assert (dequantized - quantized).std() < (1e-5 if scheme == "W4A16" else 0.05) * quantized.std()
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path), batch), logits(merged, batch))
    report = quantize_model(merged, CONFIG)
    count = sum(isinstance(module, QVLMLinear) for module in merged.modules())
    assert len(report.modules) == count > 0
    assert (logits(merged, batch) - dequantized).std() < 0.3 * dequantized.std()


def test_a_module_is_copied_and_saved_without_its_siblings(directory, batch):
    model = load(directory)
    module = q_proj(model)
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    lone = copy.deepcopy(module)
    file = io.BytesIO()
    torch.save(module, file)
    assert file.tell() < size + 8000  # 8000: torch.save's own, with alignment to 64 bytes
    x = torch.randn(2, 3, module.in_features)
    with torch.no_grad():
        assert torch.equal(lone(x), module(x))
    assert lone.shared is None
    twin = copy.deepcopy(model)
    attention = twin.model.language_model.layers[0].self_attn
    members = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert attention.q_proj.shared[0].modules == members
    assert torch.equal(logits(twin, batch), logits(model, batch))
