"""docs/format.md: a program that shares no line with qvlm_hf, against QVLMLinear."""

import dataclasses
import json
import struct
import subprocess
import sys

import format_reader
import numpy as np
import pytest
import torch
from packing_by_hand import pack_weight
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llava, tiny_messages, tiny_processor
from torch import Tensor, nn

import qvlm_hf
from qvlm_hf.format.grids import QParams, quantize_weight
from qvlm_hf.format.scheme import GRANULARITIES, QuantScheme
from qvlm_hf.models.graph import canonical_name, resolve
from qvlm_hf.nn.linear import QVLMLinear, packed_tensors

NAME = "model.language_model.layers.1.mlp.down_proj"
KEY = "language_model.model.layers.1.mlp.down_proj"  # as Transformers' LLaVA checkpoints name it


def save(directory, entries, tensors, *, shards=1):
    """Writes entries {canonical name: scheme} and tensors {key: tensor} in several files."""
    modules = {name: scheme.to_dict() for name, scheme in entries.items()}
    config = {"quantization_config": {"quant_method": "qvlm", "modules": modules}}
    (directory / "config.json").write_text(json.dumps(config))
    keys = sorted(tensors)
    for shard in range(shards):
        part = "" if shards == 1 else f"-{shard + 1:05}-of-{shards:05}"
        held = {key: tensors[key] for key in keys[shard::shards]}
        save_file(held, directory / f"model{part}.safetensors", metadata={"format": "pt"})


def check(
    directory, scheme, *,
    in_features=52, bias=True, scaled_input=False, dtype=torch.float32, shards=1,
):  # fmt: skip
    linear = nn.Linear(in_features, 9, bias=bias).to(dtype)
    # Multiples of 1/64: Hadamard sums are exact in any order, so that both programs round the same
    # numbers.
    x = torch.randn(3, 5, in_features) * torch.linspace(0.2, 4, in_features) + 0.3
    x = x.mul(64).round().div(64)
    divisor = x.abs().amax((0, 1)).sqrt() if scaled_input else None
    tensors = pack_weight(linear, scheme, x, divisor)
    saved = {f"{KEY}.{name}": tensor for name, tensor in tensors.items()}
    if bias:
        saved[f"{KEY}.bias"] = linear.bias.detach()
    other = {
        "vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight": torch.randn(2, 2),
        "language_model.lm_head.weight": torch.randn(2, 2),
    }
    save(directory, {NAME: scheme}, saved | other, shards=shards)

    module = QVLMLinear.from_packed(linear, scheme, tensors)
    for factor in (1.5, 1.0):  # beyond the calibrated range, where static grids clip, and within it
        expected = module(x * factor).detach().numpy()
        y = format_reader.module_output(directory, NAME, (x * factor).numpy())
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    # and both are the layer they came from, up to quantization
    error = np.linalg.norm(y - linear.float()(x).detach().numpy()) / np.linalg.norm(y)
    assert error < 1.5 * 2.0 ** -min(scheme.weight_bits - 1, scheme.activation_bits - 3, 5)


@pytest.mark.parametrize(
    ("granularity", "activation_bits", "scaled_input"),
    [
        *((kind, bits, False) for kind in GRANULARITIES for bits in (3, 4, 6, 8) if kind != "none"),
        *(("none", 16, scaled_input) for scaled_input in (False, True)),
    ],
)
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_every_width(tmp_path, granularity, weight_bits, activation_bits, scaled_input):
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    scheme = QuantScheme(**bits, group_size=16, granularity=granularity)
    check(tmp_path, scheme, scaled_input=scaled_input)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("hadamard", [None, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 128, -1])
def test_transforms_symmetry_and_groups(tmp_path, granularity, hadamard, symmetric, group_size):
    bits = {"weight_bits": 5, "activation_bits": 16 if granularity == "none" else 6}
    rest = {"group_size": group_size, "symmetric": symmetric, "hadamard": hadamard}
    scheme = QuantScheme(granularity=granularity, **bits, **rest)
    check(tmp_path, scheme, scaled_input=granularity == "none" and symmetric)


@pytest.mark.parametrize(
    ("hadamard", "options"),
    [
        *((None, {"dtype": torch.float16, "shards": n}) for n in (1, 3)),
        *((None, {"dtype": torch.bfloat16, "shards": n}) for n in (1, 3)),
        (256, {"in_features": 512, "bias": False}),
    ],
)
def test_dtypes_of_the_bias_several_files_and_a_large_block(tmp_path, hadamard, options):
    kind = {"activation_bits": 8, "granularity": "dynamic_token", "hadamard": hadamard}
    check(tmp_path, QuantScheme(weight_bits=4, **kind), **options)


def test_bytes_written_by_hand(tmp_path):
    """Every byte and every product is on this page: no program is wrong in the same way.

    2 x 3 weights of 4 bits, one group: rows [1, 2, 15] and [0, 8, 3], scales 0.5 and 2, zero points
    1 and 8, bias 10 and 0.25; the input in 3 bits per channel, scales 1, 0.5, 2, zero points 0, 4,
    7.
    """
    entry = {"weight_bits": 4, "activation_bits": 3, "group_size": -1, "symmetric": False}
    entry |= {"granularity": "channel", "input_transform": None}
    config = {"quantization_config": {"modules": {"model.proj": entry}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parts = {
        "weight": ("I32", [2, 1], struct.pack("<2i", 0xF21, 0x380)),
        "weight_scale": ("BF16", [2, 1], struct.pack("<2H", 0x3F00, 0x4000)),
        "weight_zero_point": ("U8", [2, 1], bytes([1, 8])),
        "input_scale": ("F32", [3], struct.pack("<3f", 1.0, 0.5, 2.0)),
        "input_zero_point": ("I32", [3], struct.pack("<3i", 0, 4, 7)),
        "bias": ("BF16", [2], struct.pack("<2H", 0x4120, 0x3E80)),
    }
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in parts.items():
        place = [len(data), len(data) + len(content)]
        header[f"proj.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        data += content
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    # x = [2.5, 1, -3]: round(2.5) = 2, 1 / 0.5 = 2, round(-1.5) = -2: a = [2, 2, -2]; nothing is
    # clipped
    #   row 0: 10 + 0.5 * (2 * 0 + 2 * 1 - 2 * 14) = -3
    #   row 1: 0.25 + 2 * (2 * -8 + 2 * 0 - 2 * -5) = -11.75
    # x = [-1, 9, 4]: a_0 >= 0, a_1 <= 7 - 4, a_2 <= 7 - 7: a = [0, 3, 0]
    #   row 0: 10 + 0.5 * 3 * 1 = 11.5;                           row 1: 0.25 + 2 * 3 * 0 = 0.25
    x = [[2.5, 1.0, -3.0], [-1.0, 9.0, 4.0]]
    expected = [[-3.0, -11.75], [11.5, 0.25]]
    assert format_reader.module_output(tmp_path, "model.proj", np.array(x)).tolist() == expected
    tensors = {
        "weight": torch.tensor([[0xF21], [0x380]], dtype=torch.int32),
        "weight_scale": torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16),
        "weight_zero_point": torch.tensor([[1], [8]], dtype=torch.uint8),
        "input_scale": torch.tensor([1.0, 0.5, 2.0]),
        "input_zero_point": torch.tensor([0, 4, 7], dtype=torch.int32),
    }
    linear = nn.Linear(3, 2)
    linear.bias.data = torch.tensor([10.0, 0.25])
    module = QVLMLinear.from_packed(linear, QuantScheme.from_dict(entry), tensors)
    assert module(torch.tensor(x)).tolist() == expected


def test_finds_every_module_of_a_saved_model(tmp_path):
    """Each canonical name of config.json has keys of its own that save_pretrained writes."""
    model = tiny_llava()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    floats = load_file(file)
    words = {k: t.view(torch.int32) if k.endswith(".weight") else t for k, t in floats.items()}
    save_file(words, file)
    layers = [layer for segment in resolve(model) for layer in segment.layers]
    names = [name for layer in layers for site in layer.sites for name in site.modules]
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    for name in [*names, "lm_head"]:
        tensors = format_reader.module_tensors(tmp_path, name)
        weight = modules[name].weight.detach().numpy()
        np.testing.assert_array_equal(tensors["weight"].view(np.float32), weight)
        assert ("bias" in tensors) == (modules[name].bias is not None)


@pytest.fixture
def saved(tmp_path):
    """A directory's parts, to be damaged before they are saved."""
    scheme = QuantScheme(weight_bits=3, activation_bits=4, group_size=16)
    linear, x = nn.Linear(40, 4), torch.randn(2, 3, 40)
    packed = pack_weight(linear, scheme, x)
    return tmp_path, scheme, {f"{KEY}.{name}": t for name, t in packed.items()}, x.numpy()


ONE = "must be one module of the files, found"


def changed(name, change):
    return lambda t: t.update({f"{KEY}.{name}": change(t[f"{KEY}.{name}"])})


def without(name):
    return lambda t: t.pop(f"{KEY}.{name}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("input_zero_point"), "must not have the tensors"),
        (without("weight_zero_point"), "must not have the tensors"),
        (changed("weight_scale", Tensor.float), "weight_scale has dtype F32"),
        (changed("input_scale", Tensor.bfloat16), "input_scale has dtype BF16"),
        (lambda t: t.update({f"{KEY}.qzeros": torch.zeros(1)}), "qzeros has dtype F32"),
        (lambda t: t[f"{KEY}.weight"].__setitem__((0, 3), -1), "the rest of the last word must be"),
        (changed("weight", lambda w: w[:, :3].clone()), "3 words do not hold 40 values of 3 bits"),
        (changed("weight_scale", lambda scale: scale[:, :2].clone()), "scales and"),
        (lambda t: t.clear() or t.update({"other.weight": torch.zeros(1)}), rf"{ONE} \[\]"),
        (lambda t: t.update({f"model.{NAME}.bias": torch.zeros(4)}), ONE),
    ],
)
def test_the_reader_refuses_what_the_format_does_not_allow(saved, damage, message):
    directory, scheme, tensors, x = saved
    damage(tensors)
    save(directory, {NAME: scheme}, tensors)
    with pytest.raises(ValueError, match=message):
        format_reader.module_output(directory, NAME, x)


def test_the_reader_stands_alone():
    code = "import sys; sys.path.insert(0, 'tests'); import format_reader; print(*sys.modules)"
    words, root = [sys.executable, "-c", code], __file__.rpartition("/tests/")[0]
    loaded = {name.partition(b".")[0] for name in subprocess.check_output(words, cwd=root).split()}
    assert b"numpy" in loaded
    assert not {b"torch", b"transformers", b"qvlm_hf", b"safetensors"} & loaded


def test_packed_tensors_are_what_the_format_names():
    scheme = QuantScheme(weight_bits=4, activation_bits=4, group_size=16)
    weight = quantize_weight(torch.randn(4, 40), scheme)
    qparams = QParams(torch.ones(40, dtype=torch.float64), torch.zeros(40, dtype=torch.int64), 4)
    tensors = packed_tensors(weight, scheme, qparams)
    layout = {name: (str(t.dtype).removeprefix("torch."), *t.shape) for name, t in tensors.items()}
    assert layout == {
        "weight": ("int32", 4, 5),
        "weight_scale": ("bfloat16", 4, 3),
        "weight_zero_point": ("uint8", 4, 3),
        "input_scale": ("float32", 40),
        "input_zero_point": ("int32", 40),
    }
    scheme = dataclasses.replace(scheme, granularity="dynamic_token", symmetric=True)
    weight = quantize_weight(torch.randn(4, 40), scheme)
    assert set(packed_tensors(weight, scheme, None)) == {"weight", "weight_scale"}


EACH = {"vision": "token", "projector": "channel", "language": "dynamic_token"}
NEAREST = {"weight_rounding": "nearest", "activation_granularity": "dynamic_token"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_granularity": EACH},
        {"rotation": "hadamard"},
        {"scheme": "W6A8"},  # rotated by default
        {"precision_budget": 3.5},
        {"optimize_vision": True, "batch_size": 3},
        {"rotation": "hadamard", "precision_budget": 5.0, **NEAREST},
    ],
    ids=str,
)
def test_reads_every_module_of_a_calibrated_and_saved_model(tmp_path, options):
    model, processor = tiny_llava().eval(), tiny_processor()
    data = {"dataset": tiny_messages(6), "processor": processor, "num_samples": 6}
    rest = {"recipe": "fixed", "group_size": 48, "max_block_depth": 1}
    config = qvlm_hf.QVLMConfig(**data, **rest, **options)
    report = qvlm_hf.quantize_model(model, config)
    schemes = report.modules.values()
    assert any(scheme.hadamard for scheme in schemes) == (config.rotation is not None)
    assert len({scheme.weight_bits for scheme in schemes}) > 1 or config.precision_budget is None
    qvlm_hf.save_quantized(model, processor, tmp_path / "saved", report=report)
    generator = torch.Generator().manual_seed(0)
    for name in report.modules:
        module = model.get_submodule(name)
        positions = module.input_scale.shape[0] if module.scheme.granularity == "token" else 5
        x = torch.randn(positions, module.in_features, generator=generator)
        expected = module(x).detach().numpy()
        y = format_reader.module_output(tmp_path / "saved", name, x.numpy())
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
