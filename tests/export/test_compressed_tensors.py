"""What the format can say: which schemes, how wide, in which groups."""

import re

import pytest
import torch

from qvlm_hf.export.compressed_tensors import (
    Stored,
    convert,
    quantization_config,
    stored_as,
    with_one_group_size,
)
from qvlm_hf.format.grids import quantize_weight
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.linear import packed_tensors


def scheme(**fields):
    usual = {"weight_bits": 4, "activation_bits": 16, "granularity": "none", "symmetric": True}
    return QuantScheme(**usual | fields)


@pytest.mark.parametrize(
    ("fields", "in_features", "bits", "group_size"),
    [
        ({}, 256, 4, 128),
        ({}, 96, 4, -1),  # a row shorter than a group
        ({}, 128, 4, -1),
        ({}, 4304, 4, 16),  # 33.6 groups of 128 become 269 of 16
        ({"group_size": -1}, 4304, 4, -1),
        ({"weight_bits": 2}, 256, 2, 128),
        ({"weight_bits": 3}, 256, 4, 128),
        ({"weight_bits": 5}, 256, 8, 128),
        ({"weight_bits": 8}, 256, 8, 128),
    ],
)
def test_stored_as(fields, in_features, bits, group_size):
    assert stored_as("m", scheme(**fields), in_features) == Stored(
        weight_bits=bits, group_size=group_size, symmetric=True, quantized_input=False
    )


REFUSED = {
    "its static activation ranges have a zero point per input channel, which no consumer reads": [
        (4, 4, "channel"), (8, 8, "channel"),
    ],
    "its static activation ranges have a zero point per position, which no consumer reads": [
        (4, 4, "token"), (8, 8, "token"),
    ],
    "its inputs have a range per group, which no consumer computes: quantize with": [
        (4, 8, "dynamic_group"), (8, 8, "dynamic_group"),
    ],
    "no consumer runs W.A. with one scale per row and no zero points: quantize with scheme='W8A8'": [
        (4, 8, "dynamic_token"), (6, 6, "dynamic_token"), (8, 4, "dynamic_token"),
        (8, 7, "dynamic_token"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "kind"), [(message, kind) for message in REFUSED for kind in REFUSED[message]]
)
def test_what_no_consumer_runs_is_refused(message, kind):
    fields = dict(zip(("weight_bits", "activation_bits", "granularity"), kind, strict=True))
    for has_input_scale in (False, kind[2] != "dynamic_token"):
        with pytest.raises(ValueError, match=f"^m: {message}"):
            stored_as("m", scheme(**fields, group_size=-1), 64, has_input_scale=has_input_scale)


def test_stored_input_scales_are_refused():
    with pytest.raises(ValueError, match="divided by stored scales, which no consumer does"):
        stored_as("m", scheme(), 64, has_input_scale=True)


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "in_features"), [(32, 88), (-1, 40), (8, 24)])
def test_no_weight_changes(weight_bits, symmetric, group_size, in_features):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    kind = scheme(weight_bits=weight_bits, symmetric=symmetric, group_size=group_size)
    quantized = quantize_weight(torch.randn(24, in_features), kind)
    form = stored_as("m", kind, in_features)
    tensors = convert(packed_tensors(quantized, kind, None), kind, form, in_features, torch.float32)
    group = quantization_config({"m": form}, [])["config_groups"]["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    weight = compressor.decompress(tensors, QuantizationScheme.model_validate(group))["weight"]
    assert torch.equal(weight, quantized.dequantize())


def stored(bits=4, size=-1, symmetric=True):
    return Stored(weight_bits=bits, group_size=size, symmetric=symmetric, quantized_input=False)


def test_zero_points_bring_one_group_size():
    rows, groups = stored(symmetric=False), stored(size=64, symmetric=False)
    together = with_one_group_size({"a": rows, "b": groups}, {"a": 96, "b": 128})
    assert {kind.group_size for kind in together.values()} == {32}
    assert with_one_group_size({"a": rows}, {"a": 96}) == {"a": rows}
    symmetric = {"a": stored(), "b": stored(bits=8, size=64)}  # keep their own groups
    assert with_one_group_size(symmetric, {"a": 96, "b": 128}) == symmetric


@pytest.mark.parametrize("other", [stored(bits=8, symmetric=False), stored()])
def test_zero_points_of_other_widths_or_beside_none_are_refused(other):
    with pytest.raises(ValueError, match="with zero points cannot be loaded side by side"):
        with_one_group_size({"a": stored(symmetric=False), "b": other}, {"a": 96, "b": 128})


def test_patterns_fit_both_programs():
    modules = {
        "model.language_model.layers.0.mlp.up_proj": stored(),
        "model.language_model.layers.1.mlp.up_proj": stored(),
        "model.vision_tower.encoder.layers.1.mlp.fc1": stored(bits=8),
    }
    config = quantization_config(modules, ["lm_head"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    (pattern,) = config["config_groups"]["group_1"]["targets"]
    (ignored,) = config["ignore"]

    def fits(pattern, name):
        return re.match(pattern.removeprefix("re:"), name) is not None

    for layers in ("model.vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers"):
        assert fits(pattern, f"{layers}.1.mlp.fc1")
        assert not fits(pattern, f"{layers}.11.mlp.fc1")
        assert not fits(pattern, f"{layers}.1.mlp.fc12")
    assert fits(ignored, "lm_head")
    assert fits(ignored, "language_model.lm_head")
